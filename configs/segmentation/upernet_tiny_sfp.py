# upernet_tiny.py in the modern variant: see upernet_b_sfp_512_160k.py. Nothing is published for it.
_base_ = "./upernet_tiny.py"
encoder = {"relative_position": None, "layer_scale": None, "pyramid": "simple"}
