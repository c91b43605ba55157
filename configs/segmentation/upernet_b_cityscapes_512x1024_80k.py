# ViT-B on Cityscapes, 19 classes. Source: upernet_b_512_160k.py's recipe at MMSegmentation's sizes
# for this data set, for one of its usual lengths. No number is published for MAE.
_base_ = "./_base_/upernet.py"
dataset = {"name": "cityscapes", "crop_size": (512, 1024), "resize": (2048, 1024)}
encoder = {"size": "base"}
train = {"max_iters": 80_000}
