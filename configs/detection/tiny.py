"""Mask R-CNN that a CPU trains in minutes: ViT-Tiny, light heads, native-scale crops.

Source: the shape of ViTDet's recipe, made small. No published number exists for it.
"""

from .common.base import dataset, model, optimizer, schedule, train

dataset.image_size = 256
dataset.resize = "native"
dataset.workers = 1

train.max_iter = 900
train.batch_size = 2
train.checkpoint_period = 100

model.size = "tiny"
model.position_size = None
model.window_size = 8
model.drop_path = 0.0
model.channels = 128
model.anchor_sizes = [16, 32, 64, 128, 256]
model.rpn_convs = 1
model.proposals_train = 500
model.rois_per_image = 64
model.box_convs = 0
model.box_fcs = 1
model.box_fc_width = 512
model.mask_convs = 2

optimizer.lr = 5e-4
optimizer.layer_decay = 0.9
optimizer.weight_decay = 0.05
schedule.kind = "cosine"
schedule.warmup_iters = 50
