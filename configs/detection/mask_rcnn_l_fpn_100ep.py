"""Mask R-CNN with ViT-L, four taps and FPN, 100 epochs of COCO: the recipe behind the MAE paper's Table 4.

Li et al. 2021 (arXiv 2111.11429). Expected on val2017 from MAE's IN1K encoder (1600 epochs): box AP 53.3, mask AP 47.2.
Drop path (.3) follows from the size in mae_transfer/sizes.py.
"""

from .mask_rcnn_b_fpn_100ep import dataset, model, optimizer, schedule, train

model.size = "large"
