# ViT-L frozen under a linear classifier of its patches. Source and numbers: see _base_/probe.py; none published.
_base_ = "./_base_/probe.py"
encoder = {"size": "large"}
