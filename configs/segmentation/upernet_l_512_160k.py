# ViT-L. Source: MAE paper, Table 5, for the number. No config for L was published: drop path .2 is from its recipe,
# the rest is B's. Expected mIoU on ADE20K val, single scale: 53.6.
_base_ = "./_base_/upernet.py"
encoder = {"size": "large"}  # from which: drop path .2, layer decay .65, taps 7, 11, 15, 23, head 1024 wide
