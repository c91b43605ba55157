# upernet_tiny.py's data and length with its encoder frozen under a linear classifier. Nothing is published for it.
_base_ = "./upernet_tiny.py"
encoder = {"frozen": True, "relative_position": None, "layer_scale": None, "drop_path": 0.0}
head = {"kind": "linear", "channels": None, "dropout": 0.0, "aux_weight": 0}
