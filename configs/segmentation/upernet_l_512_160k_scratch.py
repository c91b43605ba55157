# ViT-L from random weights, for comparison. Source: none, and no number is published. Layer decay, which keeps
# pretrained layers where they are, is off; the rest is upernet_l_512_160k.py's.
_base_ = "./upernet_l_512_160k.py"
train = {"layer_decay": 1.0}
