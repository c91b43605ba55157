"""tiny.py with the cascade's three box heads.

Source: the shape of ViTDet's Cascade Mask R-CNN (arXiv 2203.16527), made small. No published number exists for it.
"""

from .tiny import dataset, model, optimizer, schedule, train

model.cascade = True
