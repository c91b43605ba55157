"""ViTDet's Mask R-CNN with ViT-B, 100 epochs of COCO (arXiv 2203.16527, Table 5).

Expected on val2017 from MAE's IN1K encoder: box AP 51.6, mask AP 45.9 (paper and release).
Layer decay, drop path and the blocks with global attention follow from the size in mae_transfer/sizes.py.
"""

from mae_transfer.sizes import SIZES

from .common.base import dataset, model, optimizer, schedule, train

model.size = "base"
optimizer.layer_decay = SIZES["base"].sfp_layer_decay
optimizer.decay_rule = "parity"  # pos_embed and torch's norms are not decayed; "clean" spares every norm and bias
