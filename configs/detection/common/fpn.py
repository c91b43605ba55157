"""Mask R-CNN with four taps and FPN: the recipe behind the MAE paper's Table 4 (Li et al. 2021, arXiv 2111.11429).

Windows of 14x14 patches but for the four tapped blocks, which are global. Relative position is a zero-initialised table
of biases; each block has its own, as in BEiT's fine-tuning. (MIMDet's public reproduction shares one among the windowed
blocks and one among the global ones, with windows of 16.) It is not decayed.
"""

from .base import dataset, model, optimizer, schedule, train

model.pyramid = "fpn"
model.norm = "SyncBN"
model.relative_position = "bias"
model.position_size = None  # the pretrained table is resized once, to the grid of the training square

optimizer.lr = 8e-5
optimizer.layer_decay = 1.0  # none in this recipe
schedule.kind = "cosine"
schedule.warmup_iters = 461  # a quarter of an epoch: 118 000 / 64 / 4
