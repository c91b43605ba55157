# upernet_tiny.py's data and length with its encoder frozen under two 3x3 convolutions. Nothing is published for it.
_base_ = "./linear_tiny.py"
head = {"kind": "fcn", "channels": 64}
