# ViT-B from random weights, for comparison. Source: none, and no number is published. Layer decay, which keeps
# pretrained layers where they are, is off; the rest is upernet_b_512_160k.py's.
_base_ = "./upernet_b_512_160k.py"
train = {"layer_decay": 1.0}
