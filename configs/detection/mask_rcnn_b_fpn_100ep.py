"""Mask R-CNN with ViT-B, four taps and FPN, 100 epochs of COCO: the recipe behind the MAE paper's Table 4.

Li et al. 2021 (arXiv 2111.11429). Expected on val2017 from MAE's IN1K encoder (1600 epochs): box AP 50.3, mask AP 44.9.
"""

from .common.base import dataset, model, optimizer, schedule, train

model.size = "base"
model.pyramid = "fpn"
model.norm = "SyncBN"
model.relative_position = "bias"
model.position_size = None  # the pretrained table is resized once, to the grid of the training square

optimizer.lr = 8e-5
optimizer.layer_decay = 1.0  # none in this recipe
schedule.kind = "cosine"
schedule.warmup_iters = 461  # a quarter of an epoch: 118 000 / 64 / 4
