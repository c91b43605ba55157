"""Mask R-CNN with ViT-L, four taps and FPN, from random weights, 400 epochs of COCO (Li et al. 2021, arXiv 2111.11429).

Expected on val2017: box AP 50.7, mask AP 44.9.
"""

from .mask_rcnn_l_fpn_100ep import dataset, model, optimizer, schedule, train

train.max_iter *= 4  # 100 -> 400 epochs
optimizer.lr = 1.6e-4
optimizer.weight_decay = 0.2
