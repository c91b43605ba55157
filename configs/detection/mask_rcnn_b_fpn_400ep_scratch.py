"""Mask R-CNN with ViT-B, four taps and FPN, from random weights, 400 epochs of COCO (Li et al. 2021, arXiv 2111.11429).

Expected on val2017: box AP 48.9, mask AP 43.6.
"""

from .mask_rcnn_b_fpn_100ep import dataset, model, optimizer, schedule, train

train.max_iter *= 4  # 100 -> 400 epochs
optimizer.lr = 1.6e-4
optimizer.weight_decay = 0.2
