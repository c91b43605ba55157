"""Mask R-CNN with ViT-B, four taps and FPN, 100 epochs of COCO (Li et al. 2021, arXiv 2111.11429).

Expected on val2017 from MAE's IN1K encoder: box AP 50.3, mask AP 44.9 (the paper, from 1600 epochs of pretraining).
"""

from .common.fpn import dataset, model, optimizer, schedule, train

model.size = "base"
