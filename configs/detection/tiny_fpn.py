"""tiny.py with four taps, FPN and tables of biases in the place of the simple pyramid and decomposed relative position.

Source: the shape of Li et al.'s recipe (arXiv 2111.11429), made small. No published number exists for it.
"""

from .tiny import dataset, model, optimizer, schedule, train

model.pyramid = "fpn"
model.norm = "GN"  # batches of two are too small for the recipe's batch norm
model.relative_position = "bias"
