# upernet_b_pascal_context_480_80k.py without the background: 59 classes. No number is published for MAE.
_base_ = "./upernet_b_pascal_context_480_80k.py"
dataset = {"name": "pascal_context_59"}
