"""ViTDet's Mask R-CNN with ViT-H, 75 epochs of COCO (arXiv 2203.16527, Table 5).

Expected on val2017 from MAE's IN1K encoder: box AP 56.7, mask AP 50.1 (paper; release 56.7 / 50.2).
Patches are of 16 pixels: the published encoder's patch projection is resized from 14.
"""

from mae_transfer.sizes import SIZES

from .mask_rcnn_b_sfp_100ep import dataset, model, optimizer, schedule, train

train.max_iter = train.max_iter * SIZES["huge"].sfp_epochs // 100

model.size = "huge"
model.patch_size = 16
optimizer.layer_decay = SIZES["huge"].sfp_layer_decay
optimizer.decay_rule = "all"  # the release clears every exception for this size
