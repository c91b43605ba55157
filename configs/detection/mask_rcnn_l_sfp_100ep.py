"""ViTDet's Mask R-CNN with ViT-L, 100 epochs of COCO (arXiv 2203.16527, Table 5).

Expected on val2017 from MAE's IN1K encoder: box AP 55.6, mask AP 49.2 (paper; release 55.5 / 49.2).
"""

from mae_transfer.sizes import SIZES

from .mask_rcnn_b_sfp_100ep import dataset, model, optimizer, schedule, train

model.size = "large"
optimizer.layer_decay = SIZES["large"].sfp_layer_decay
