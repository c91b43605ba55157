# ViT-H. Source: none. Nothing was published for it, neither config nor number; this is L's recipe. The encoder's
# 14-pixel patches are resampled to 16, as ViTDet does in detection, so that crops of 512 hold whole patches.
_base_ = "./_base_/upernet.py"
encoder = {"size": "huge", "patch_size": 16, "resize_patches": True}  # from which: taps 9, 14, 19, 31
