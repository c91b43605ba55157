# ViT-B on Pascal Context, 60 classes. Source: upernet_b_512_160k.py's recipe at MMSegmentation's sizes
# for this data set, for one of its usual lengths. No number is published for MAE.
_base_ = "./_base_/upernet.py"
dataset = {"name": "pascal_context", "crop_size": 480, "resize": (520, 520)}
encoder = {"size": "base"}
train = {"max_iters": 80_000}
