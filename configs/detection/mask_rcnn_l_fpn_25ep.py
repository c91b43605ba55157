"""Mask R-CNN with ViT-L, four taps and FPN, 25 epochs of COCO (Li et al. 2021, arXiv 2111.11429).

No number is published for this schedule: the paper draws it without printing it.
"""

from .mask_rcnn_l_fpn_100ep import dataset, model, optimizer, schedule, train

train.max_iter //= 4  # 100 -> 25 epochs
