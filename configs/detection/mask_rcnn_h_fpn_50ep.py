"""Mask R-CNN with ViT-H, four taps and FPN, 50 epochs of COCO (Li et al. 2021, arXiv 2111.11429).

No result is published for this size with this recipe. Drop path is that of L.
Patches are of 16 pixels: the published encoder's patch projection is resized from 14.
"""

from .mask_rcnn_h_fpn_100ep import dataset, model, optimizer, schedule, train

train.max_iter //= 2  # 100 -> 50 epochs
