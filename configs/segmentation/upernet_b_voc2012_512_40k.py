# ViT-B on Pascal VOC 2012, 21 classes. Source: upernet_b_512_160k.py's recipe at MMSegmentation's sizes
# for this data set, for one of its usual lengths. No number is published for MAE.
_base_ = "./_base_/upernet.py"
dataset = {"name": "voc2012"}
encoder = {"size": "base"}
train = {"max_iters": 40_000}
