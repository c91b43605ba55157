"""ViTDet's Cascade Mask R-CNN with ViT-L, 100 epochs of COCO (arXiv 2203.16527 and its release).

Expected on val2017 from MAE's IN1K encoder: box AP 57.6, mask AP 50.0 (release).
Everything but the three box heads, which regress one box for all classes, is as in the Mask R-CNN of this size.
"""

from .mask_rcnn_l_sfp_100ep import dataset, model, optimizer, schedule, train

model.cascade = True
