# A head on the last block of an encoder that stays as it was pretrained: what the features are worth by themselves.
# Nothing is published for MAE by this protocol; the schedule is DINOv2's for linear heads (40k iterations, 1e-3).
_base_ = "./upernet.py"
encoder = {"frozen": True, "relative_position": None, "layer_scale": None, "drop_path": 0.0}
head = {"kind": "linear", "dropout": 0.0, "aux_weight": 0}
train = {"max_iters": 40_000, "lr": 1e-3, "weight_decay": 1e-4}
