"""Mask R-CNN with ViT-B, four taps and FPN, 50 epochs of COCO (Li et al. 2021, arXiv 2111.11429).

Expected on val2017 from MAE's IN1K encoder:
MIMDet's reproduction (arXiv 2204.02964) has box AP 50.2, mask AP 44.9; the paper draws its result without printing it.
"""

from .mask_rcnn_b_fpn_100ep import dataset, model, optimizer, schedule, train

train.max_iter //= 2  # 100 -> 50 epochs
