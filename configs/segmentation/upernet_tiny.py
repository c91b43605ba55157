# A sibling that trains on two CPU cores in minutes: tiny encoder with patch 8, small crops, a light head.
# For one's own small data sets and for trying the chain; nothing is published for it.
_base_ = "./_base_/upernet.py"
dataset = {"crop_size": 192, "workers": 2}
encoder = {"size": "tiny", "patch_size": 8}
head = {"channels": 64, "aux_channels": 64}
# A short run from a short pretraining: a higher rate than BEiT's, and lower layers that may move.
train = {"max_iters": 600, "batch_size": 4, "lr": 1e-3, "layer_decay": 0.8, "log_interval": 20, "val_interval": 300}
