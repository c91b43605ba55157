"""Mask R-CNN with ViT-H, four taps and FPN, from random weights, 400 epochs of COCO (Li et al. 2021, arXiv 2111.11429).

No result is published for this size from random weights.
"""

from .mask_rcnn_h_fpn_100ep import dataset, model, optimizer, schedule, train

train.max_iter *= 4  # 100 -> 400 epochs
optimizer.lr = 1.6e-4
optimizer.weight_decay = 0.2
