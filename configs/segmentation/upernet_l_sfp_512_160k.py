# The modern variant: no relative position, no layer scale, and ViTDet's simple pyramid of the last block (256 wide,
# layer norms). Source: ViTDet for the pyramid, upernet_l_512_160k.py for the rest; no number is published.
_base_ = "./upernet_l_512_160k.py"
encoder = {"relative_position": None, "layer_scale": None, "pyramid": "simple"}
