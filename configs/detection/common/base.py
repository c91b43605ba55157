"""What every detection config starts from: ViTDet's Mask R-CNN recipe (arXiv 2203.16527), with no data named.

Numbers that are not here are defaults of the functions called; numbers that follow from the data, the checkpoint or
another key are filled in by mae_transfer.detection.config.resolve.
"""

# ruff: noqa: C408  (LazyConfig's own style: sections read as calls)
from detectron2.config import LazyCall as L

from mae_transfer.detection.model import mask_rcnn
from mae_transfer.detection.optimizer import adamw, schedule

dataset = dict(
    train=dict(
        name=None,  # coco_2017_train, lvis_v1_train … below DETECTRON2_DATASETS, instead of json and images
        json=None,
        images=None,
        fraction=1.0,  # share of the images, chosen by fraction_seed; a smaller one lies within a larger one
        fraction_seed=0,
        keep_empty=False,  # train on images without an instance, too
    ),
    val=dict(name=None, json=None, images=None, max_size=None),  # max_size: leave out images with a longer side
    image_size=1024,
    resize="jitter",  # or native: pixels are not resampled, training takes crops of image_size
    scale=[0.1, 2.0],
    flips=["horizontal"],
    mean=None,  # RGB, 0 to 1; by default the checkpoint's, or ImageNet's
    std=None,
    workers=4,
)

train = dict(
    output_dir="runs/detection",
    init_checkpoint=None,
    max_iter=184375,  # 100 epochs x 118 000 images of COCO / batch 64
    epochs=None,  # instead of max_iter: passes over the training images
    batch_size=64,  # of all processes and accumulation rounds together
    accumulate=1,  # rounds that a batch is computed in: as many times less memory
    seed=0,
    precision="bf16",
    device="auto",
    clip_norm=None,
    ema=None,  # decay of an average of the weights, such as 0.9999; evaluation and prediction then use it
    freeze_blocks=0,  # k: patch embedding, positions and the first k blocks keep the checkpoint's weights
    divergence_factor=4.0,  # give up when the loss stays so many times above its usual height; 0: never
    checkpoint_period=5000,
    keep=2,
    eval_period=0,  # 0: at the end only
    best="segm/AP",  # what model_best.pth is best in; None for no such file
    log_period=20,
    pictures=8,
    picture_score=0.5,
)

model = L(mask_rcnn)(position_size=224)
optimizer = L(adamw)(lr=1e-4, weight_decay=0.1, betas=[0.9, 0.999], layer_decay=0.7, decay_rule="clean")
schedule = L(schedule)(kind="steps", warmup_iters=250, warmup_factor=0.001)
