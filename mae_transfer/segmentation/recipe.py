"""From settings to MMSegmentation's config: BEiT's ADE20K recipe, as used by MAE (Appendix A.4).

Four functions, each one part of the config: ``model``, ``data``, ``schedule``, ``runtime``. Everything that follows
from a setting is computed here and nowhere else. Values are plain dictionaries, so that the config can be dumped and
used by MMSegmentation's own tools.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from mae_transfer.checkpoint import SIZE_ARGUMENTS
from mae_transfer.errors import ConfigError
from mae_transfer.position import to_pair
from mae_transfer.segmentation.geometry import whole_maps
from mae_transfer.segmentation.masks import Colour
from mae_transfer.segmentation.settings import Settings, loss_names
from mae_transfer.segmentation.source import Split, splits_of
from mae_transfer.sizes import Size, get_size

MAX_WARMUP = 1500
CAT_MAX_RATIO = 0.75  # no class fills more of a training crop, where ten tries find one
LABEL_PAD = 255
AUX_WEIGHT = 0.4  # of the auxiliary head's loss, under UperNet
SIMPLE_PYRAMID_CHANNELS = 256  # ViTDet's; a narrower encoder keeps its width


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What settings alone do not tell: the encoder file's metadata, the class names, and the processes.

    ``size`` and ``patch_size`` are resolved; ``encoder`` holds what else the encoder must share with its file
    (``checkpoint.weights_arguments``); mean and std are RGB in 0..1. ``class_weights`` are counted in the masks,
    where a training wants them.
    """

    size: str
    patch_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...]
    encoder: Mapping[str, Any] = field(default_factory=dict)
    palette: tuple[Colour, ...] = ()  # in pictures; empty: made
    class_weights: tuple[float, ...] | None = None
    num_processes: int = 1
    gpus: bool = False

    @property
    def dimensions(self) -> Size:
        """Of the encoder, and the recipe's numbers; those of ``base`` for an encoder of no named size."""
        own = {name: self.encoder[name] for name in SIZE_ARGUMENTS if name in self.encoder}
        return replace(get_size("base" if own else self.size), **own)


def model(settings: Settings, facts: Facts) -> dict[str, Any]:
    """The encoder, its pyramid and a head: UperNet, or one for probing on the last block's map alone."""
    crop = crop_size(settings, facts.patch_size)
    encoder, size = settings.encoder, facts.dimensions
    pyramid = _pyramid(settings)
    neck = _neck(settings, facts, pyramid)
    # Channels of the maps that the heads read.
    channels = [size.width] if neck is None else [neck.get("out_channels", size.width)] * 4
    return {
        "type": "MAESegmentor",
        "data_preprocessor": {
            "type": "SegDataPreProcessor",
            "mean": [255 * value for value in facts.mean],
            "std": [255 * value for value in facts.std],
            "bgr_to_rgb": True,  # images are read as BGR; MAE was trained on RGB
            "pad_val": 0,
            "seg_pad_val": LABEL_PAD,
            "size": crop,
        },
        "backbone": {
            "type": "MAEViT",
            "size": size.name,
            "patch_size": facts.patch_size,
            "image_size": crop,
            "taps": size.segmentation_taps if pyramid == "four_tap" else (size.depth - 1,),
            "relative_position": encoder.relative_position,
            "layer_scale": encoder.layer_scale,
            "drop_path": size.segmentation_drop_path if encoder.drop_path is None else encoder.drop_path,
            "checkpointing": encoder.checkpointing,
            "frozen": encoder.frozen,
            "freeze_blocks": settings.train.freeze_blocks,
            "init_checkpoint": settings.init_checkpoint,
            **{name: value for name, value in facts.encoder.items() if name != "layer_scale"},  # a setting here
        },
        "neck": neck,
        "decode_head": _decode_head(settings, facts, channels),
        "auxiliary_head": _auxiliary_head(settings, facts, channels),
        "train_cfg": {},
        "test_cfg": {
            "mode": "slide",
            "crop_size": crop,
            "stride": _stride(settings, crop),
            "window_batch": settings.test.window_batch,
            "precision": "bf16" if settings.train.precision == "bf16" else "fp32",
        },
    }


def _pyramid(settings: Settings) -> str:
    """ "four_tap" and "simple" are for UperNet; a probing head reads the last block's map as it is: "none"."""
    probing = settings.head.kind != "upernet"
    pyramid = settings.encoder.pyramid or ("none" if probing else "four_tap")
    if probing != (pyramid == "none"):
        expected = "none" if probing else "four_tap or simple"
        raise ConfigError(f"encoder.pyramid is {pyramid}; head.kind={settings.head.kind} expects {expected}")
    return pyramid


def _neck(settings: Settings, facts: Facts, pyramid: str) -> dict[str, Any] | None:
    if pyramid == "none":
        return None
    width = facts.dimensions.width
    shared = {"width": width, "patch_size": facts.patch_size}
    if pyramid == "simple":
        norm = settings.encoder.pyramid_norm or "ln"  # ViTDet's
        return {"type": "MAESimplePyramid", **shared, "norm": norm, "out_channels": min(width, SIMPLE_PYRAMID_CHANNELS)}
    return {"type": "MAEPyramid", **shared, "norm": settings.encoder.pyramid_norm or _norm_name(settings, facts)}


def _decode_head(settings: Settings, facts: Facts, channels: Sequence[int]) -> dict[str, Any]:
    head = settings.head
    width = head.channels or facts.dimensions.width
    shared = {
        **_head(settings, facts, width),
        "loss_decode": _losses(settings, facts, 1.0),
        "sampler": _hard_pixels(settings, facts),
    }
    if head.kind == "linear":
        if head.channels is not None:
            raise ConfigError("head.channels has no meaning under head.kind=linear, which classifies the map itself")
        return {"type": "MAELinearHead", "in_channels": channels[0], "in_index": 0, **shared}
    if head.kind == "fcn":
        convolutions = {"channels": width, "num_convs": 2, "concat_input": False}
        return {"type": "FCNHead", "in_channels": channels[0], "in_index": 0, **convolutions, **shared}
    return {
        "type": "MAEUPerHead",
        "in_channels": list(channels),
        "in_index": list(range(len(channels))),
        "pool_scales": head.pool_scales,
        "channels": width,
        **shared,
    }


def _auxiliary_head(settings: Settings, facts: Facts, channels: Sequence[int]) -> dict[str, Any] | None:
    """FCN on the third map, under UperNet alone."""
    head = settings.head
    weight = head.aux_weight
    if weight is None:
        weight = AUX_WEIGHT if head.kind == "upernet" else 0.0
    if weight == 0:
        return None
    if head.kind != "upernet":
        raise ConfigError(f"head.aux_weight is {weight:g}; only head.kind=upernet has an auxiliary head: set it to 0")
    return {
        "type": "FCNHead",
        "in_channels": channels[2],
        "in_index": 2,
        "channels": head.aux_channels,
        "num_convs": 1,
        "concat_input": False,
        "loss_decode": _losses(settings, facts, weight),
        **_head(settings, facts, head.aux_channels),
    }


def _head(settings: Settings, facts: Facts, channels: int) -> dict[str, Any]:
    """What every head is given; ``channels`` are those that it normalises."""
    return {
        "num_classes": len(facts.classes),
        "dropout_ratio": settings.head.dropout,
        "norm_cfg": _norm(settings, facts, channels),
        "align_corners": False,
    }


def data(settings: Settings, facts: Facts) -> dict[str, Any]:
    """Data loaders, evaluators and the test-time-augmentation pipeline."""
    dataset = settings.dataset
    train_split, val_split = splits_of(dataset)
    crop = crop_size(settings, facts.patch_size)
    bound = dataset.resize or (4 * min(crop), min(crop))
    read: list[dict[str, Any]] = [{"type": "LoadPicture"}]
    resize = {"type": "Resize", "scale": bound, "keep_ratio": True}
    train_pipeline = [
        *read,
        {"type": "LoadLabels"},
        {"type": "RandomResize", "scale": bound, "ratio_range": dataset.scale_range, "keep_ratio": True},
        {"type": "RandomCrop", "crop_size": crop, "cat_max_ratio": CAT_MAX_RATIO},
        {"type": "RandomFlip", "prob": 0.5},
        {"type": "PhotoMetricDistortion"},
        {"type": "PackSegInputs"},
    ]
    # The mask is read after resizing: predictions are brought to the image's own size and compared there.
    test_pipeline = [*read, resize, {"type": "LoadLabels"}, {"type": "PackSegInputs"}]
    scaled = [{"type": "Resize", "scale_factor": scale, "keep_ratio": True} for scale in settings.test.scales]
    flipped = [{"type": "RandomFlip", "prob": prob, "direction": "horizontal"} for prob in (0.0, 1.0)]
    # Scales multiply the *resized* image: ``resize`` comes before TestTimeAug.
    augmented = {
        "type": "TestTimeAug",
        "transforms": [scaled, flipped, [{"type": "LoadLabels"}], [{"type": "PackSegInputs"}]],
    }

    def source(split: Split, pipeline: Sequence[dict[str, Any]], **extra: Any) -> dict[str, Any]:
        return {
            "type": "LabelledImages",
            **asdict(split),
            "classes": list(facts.classes),
            "palette": list(facts.palette) or None,
            "pipeline": list(pipeline),
            **extra,
        }

    workers = {"num_workers": dataset.workers, "persistent_workers": dataset.workers > 0}
    validation = {
        "batch_size": 1,
        **workers,
        "sampler": {"type": "DefaultSampler", "shuffle": False},
        "dataset": source(val_split, test_pipeline, test_mode=True),
    }
    # "gpu": several processes hand each other their results, on CPUs too; "cpu" would be files in the current folder.
    evaluator = {"type": "IoUMetric", "iou_metrics": ["mIoU"], "collect_device": "gpu"}
    return {
        "train_dataloader": {
            "batch_size": _batch_per_process(settings, facts),
            **workers,
            "sampler": {"type": "ReplaySampler", "shuffle": True},
            "dataset": source(
                train_split, train_pipeline, fraction=dataset.fraction, fraction_seed=dataset.fraction_seed
            ),
        },
        "val_dataloader": validation,
        "test_dataloader": {**validation},
        "val_evaluator": evaluator,
        "test_evaluator": {**evaluator},
        "tta_pipeline": [*read, resize, augmented],
        "tta_model": {"type": "SegTTAModel"},
    }


def schedule(settings: Settings, facts: Facts) -> dict[str, Any]:
    """AdamW with layer decay; linear warm-up from a millionth, then linear to zero at the end of the run."""
    train = settings.train
    warmup = _warmup(settings)
    decay = facts.dimensions.segmentation_layer_decay if train.layer_decay is None else train.layer_decay
    decline = {
        "type": "PolyLR",
        "power": 1.0,
        "eta_min": 0.0,
        "begin": warmup,
        "end": train.max_iters,
        "by_epoch": False,
    }
    rise = {"type": "LinearLR", "start_factor": 1e-6, "begin": 0, "end": warmup, "by_epoch": False}
    return {
        "optim_wrapper": {
            **_wrapper(train.precision, gpus=facts.gpus),
            "accumulative_counts": train.accumulate,
            "optimizer": {
                "type": "AdamW",
                "lr": train.lr,
                "betas": (0.9, 0.999),
                "weight_decay": train.weight_decay,
                "fused": True,  # one pass over the parameters, a tenth of a small model's step on a CPU
            },
            "paramwise_cfg": {"decay_rate": decay, "weight_decay_groups": train.weight_decay_groups},
            "constructor": "MAELayerDecayConstructor",
            "clip_grad": None if train.clip_grad is None else {"max_norm": train.clip_grad},
        },
        "param_scheduler": [rise, decline] if warmup else [decline],
        "train_cfg": {
            "type": "MAETrainLoop",
            "max_iters": train.max_iters,
            "val_interval": _val_interval(settings),
        },
        "val_cfg": {"type": "ValLoop"},
        "test_cfg": {"type": "TestLoop"},
    }


def runtime(settings: Settings, facts: Facts, work_dir: str) -> dict[str, Any]:
    """Hooks, logs, checkpoints, environment."""
    train = settings.train
    return {
        "default_scope": "mmseg",
        "custom_imports": {"imports": ["mae_transfer.segmentation"], "allow_failed_imports": False},
        "work_dir": work_dir,
        "default_hooks": {
            "timer": {"type": "IterTimerHook"},
            "logger": {"type": "LoggerHook", "interval": train.log_interval, "log_metric_by_epoch": False},
            "param_scheduler": {"type": "ParamSchedulerHook"},
            "checkpoint": {
                "type": "CheckpointHook",
                "by_epoch": False,
                "interval": train.checkpoint_interval or _val_interval(settings),
                "max_keep_ckpts": train.keep_checkpoints,
                "save_best": "mIoU",
                "rule": "greater",
            },
            "sampler_seed": {"type": "DistSamplerSeedHook"},
        },
        "custom_hooks": [
            {"type": "RecordMetrics", "interval": train.log_interval},
            *([] if train.ema is None else [{"type": "AverageWeights", "decay": train.ema}]),
            {"type": "ShareForValidation"},
            {"type": "StopOnBadLoss"},
            {"type": "SaveOnSignal"},
            {"type": "PredictionPictures", "folder": f"{work_dir}/predictions", "count": settings.test.pictures},
        ],
        "visualizer": {
            "type": "SegLocalVisualizer",
            "vis_backends": [{"type": "LocalVisBackend"}],  # TensorBoard is written by RecordMetrics
            "name": f"visualizer of {work_dir}",  # MMEngine keeps one by name, of the first run in a process
        },
        "log_processor": {"by_epoch": False, "window_size": train.log_interval},
        "log_level": "INFO",
        "env_cfg": {
            "cudnn_benchmark": True,
            "mp_cfg": {"mp_start_method": "fork", "opencv_num_threads": 0},
            "dist_cfg": {"backend": "nccl" if facts.gpus else "gloo"},
        },
        "randomness": {"seed": train.seed},
        "model_wrapper_cfg": {"type": "MAEDistributedDataParallel"},
        "distributed": train.distributed,
        "compile_blocks": train.compile,
        "load_from": None,
        "resume": False,
        "launcher": "none",
    }


def _val_interval(settings: Settings) -> int:
    train = settings.train
    return min(train.val_interval or max(1, train.max_iters // 10), train.max_iters)


def _warmup(settings: Settings) -> int:
    """Iterations of the rise. MMEngine's LinearLR reaches its end on its last iteration, so one alone never would."""
    warmup, max_iters = settings.train.warmup_iters, settings.train.max_iters
    if warmup is None:
        warmup = min(MAX_WARMUP, max_iters // 10)
        return warmup if warmup > 1 else 0
    if warmup == 1 or not 0 <= warmup < max_iters:
        raise ConfigError(f"train.warmup_iters is {warmup}; expected 0, or 2 to {max_iters - 1} (train.max_iters - 1)")
    return warmup


def crop_size(settings: Settings, patch_size: int) -> tuple[int, int]:
    """(H, W) of training crops and test windows.

    Raises:
        ConfigError: not a whole number of patches, or of what the pyramid resamples patches to.
    """
    crop = to_pair(settings.dataset.crop_size, "dataset.crop_size")
    unit = whole_maps(patch_size)
    if crop[0] % unit or crop[1] % unit:
        below = max(min(crop) // unit * unit, unit)
        raise ConfigError(
            f"dataset.crop_size {crop[0]}x{crop[1]} does not fit {patch_size}-pixel patches and the pyramid over them; "
            f"both sides must be multiples of {unit}, such as {below} or {below + unit}"
        )
    return crop


def _stride(settings: Settings, crop: tuple[int, int]) -> tuple[int, int]:
    if settings.test.stride is None:
        return (crop[0] * 2 // 3, crop[1] * 2 // 3)
    stride = to_pair(settings.test.stride, "test.stride")
    if stride[0] > crop[0] or stride[1] > crop[1]:
        raise ConfigError(f"test.stride {stride[0]}x{stride[1]} leaves gaps between windows of {crop[0]}x{crop[1]}")
    return stride


def _batch_per_process(settings: Settings, facts: Facts) -> int:
    return _micro_batch(settings, facts) * settings.train.accumulate


def _micro_batch(settings: Settings, facts: Facts) -> int:
    """Images that a process computes at once."""
    batch, rounds = settings.train.batch_size, settings.train.accumulate
    if batch % (facts.num_processes * rounds):
        raise ConfigError(
            f"train.batch_size {batch} is that of an iteration and cannot be shared evenly by {facts.num_processes} "
            f"process(es) x train.accumulate={rounds}; use a multiple of {facts.num_processes * rounds}"
        )
    return batch // (facts.num_processes * rounds)


def _losses(settings: Settings, facts: Facts, weight: float) -> dict[str, Any] | list[dict[str, Any]]:
    """The losses that head.loss names, each by ``weight``; their sum is trained."""
    # As published, averaged over all pixels, ignored ones included (MMSegmentation warns of it once). The mean of
    # micro-batches and of processes is then that of the whole batch. Class weights are averaged over by their own sum.
    cross_entropy = {"type": "CrossEntropyLoss", "use_sigmoid": False, "loss_weight": weight, "avg_non_ignore": False}
    weights = class_weights(settings, facts)
    if weights is not None:
        cross_entropy["class_weight"] = list(weights)
    known = {"cross_entropy": cross_entropy, "dice": {"type": "MAEDiceLoss", "loss_weight": weight}}
    losses = [known[name] for name in loss_names(settings.head)]
    return losses[0] if len(losses) == 1 else losses


def class_weights(settings: Settings, facts: Facts) -> tuple[float, ...] | None:
    """The weight of each class in cross entropy; None for none.

    Raises:
        ConfigError: as many weights as there are classes were expected.
    """
    given = settings.head.class_weights
    if isinstance(given, str):
        return facts.class_weights if given == "balanced" else None
    if len(given) != len(facts.classes):
        raise ConfigError(
            f"head.class_weights has {len(given)} numbers for {len(facts.classes)} classes; give one for each, in "
            f"their order ({', '.join(facts.classes[:3])} …)"
        )
    return given


def _hard_pixels(settings: Settings, facts: Facts) -> dict[str, Any] | None:
    """MMSegmentation's sampler keeps 100 000 pixels an image in any case, which is all of a small crop: here it is a
    share of the crop, the same as that is of Cityscapes' 1024x512."""
    head = settings.head
    if not head.ohem:
        return None
    height, width = crop_size(settings, facts.patch_size)
    kept = height * width // 5 if head.ohem_min_kept is None else head.ohem_min_kept
    return {"type": "OHEMPixelSampler", "thresh": head.ohem_threshold, "min_kept": kept}


def _norm_name(settings: Settings, facts: Facts) -> str:
    """The heads' normalisation. SyncBN needs GPUs and is BN on one process, so "auto" picks by both."""
    name = settings.head.norm
    if name == "auto":
        name = "syncbn" if facts.num_processes > 1 and facts.gpus else "bn"
    alone = name == "bn" or facts.num_processes == 1
    pooled = settings.head.kind == "upernet"
    if pooled and alone and name != "gn" and _micro_batch(settings, facts) == 1:
        raise ConfigError(
            "a batch of 1 image at once leaves batch normalisation nothing to average over in the pooled branch; give "
            "train.batch_size of at least 2 a process and round of train.accumulate, or head.norm=gn"
        )
    return name


def _norm(settings: Settings, facts: Facts, channels: int) -> dict[str, Any]:
    name = _norm_name(settings, facts)
    if name == "gn":
        # At least two channels a group: one alone is normalised to nothing on the pooled branch's map of one pixel.
        return {"type": "GN", "num_groups": math.gcd(32, max(1, channels // 2)), "requires_grad": True}
    return {"type": "SyncBN" if name == "syncbn" else "BN", "requires_grad": True}


def _wrapper(precision: str, *, gpus: bool) -> dict[str, Any]:
    if precision == "fp32":
        return {"type": "MAEOptimWrapper"}
    if precision == "bf16":
        return {"type": "MAEAmpOptimWrapper", "dtype": "bfloat16"}
    if not gpus:
        raise ConfigError("train.precision fp16 needs a CUDA device; use bf16 or fp32 here")
    return {"type": "MAEAmpOptimWrapper", "dtype": "float16"}
