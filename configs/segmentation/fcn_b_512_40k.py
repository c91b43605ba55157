# ViT-B frozen under two 3x3 convolutions. Source and numbers: see _base_/probe.py; none published.
_base_ = "./linear_b_512_40k.py"
head = {"kind": "fcn"}
