# ViT-B. Source: MAE paper, Table 5 (100 epochs) and mmseg's reproduction (160k iterations).
# Expected mIoU on ADE20K val, single scale: 48.1 (paper), 48.13 (mmseg); multi-scale 48.70 (mmseg).
# A public log on the way: 16k 38.65, 32k 43.97, 48k 45.96, 160k 48.15.
_base_ = "./_base_/upernet.py"
encoder = {"size": "base"}  # from which: drop path .1, layer decay .65, taps 3, 5, 7, 11, head 768 wide
