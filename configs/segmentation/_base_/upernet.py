# BEiT's ADE20K recipe, as the MAE paper used it (Appendix A.4), in the words of mae_transfer/segmentation/settings.py.
# What a setting leaves open (None there) is derived: model, data pipelines, sliding window and schedule follow from
# these in mae_transfer/segmentation/recipe.py. `tools/train_seg.py CONFIG --print-config` shows the whole.

dataset = {  # without a name and a root: ADE20K, 150 classes, 0 ("other") ignored, at data/ade/ADEChallengeData2016
    "crop_size": 512,  # also the test window; its stride is two thirds (341), images are brought to (2048, 512)
    "scale_range": (0.5, 2.0),
}
encoder = {
    "relative_position": "bias",  # zero-initialised, one table a block, beside the pretrained absolute embedding
    "layer_scale": 1.0,
}
head = {"dropout": 0.1, "aux_channels": 256, "aux_weight": 0.4}
train = {
    "max_iters": 160_000,  # of the public reproductions; the paper trained 100 epochs, about 126 000
    "batch_size": 16,
    "lr": 1e-4,
    "weight_decay": 0.05,
    "warmup_iters": None,  # 1500; a tenth of shorter runs
    "precision": "bf16",
    "val_interval": None,  # a tenth of the run
}
