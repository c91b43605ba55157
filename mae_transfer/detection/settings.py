"""What the numbers of the train section must satisfy, and how long and how fast they make a run."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from detectron2.config import instantiate
from omegaconf import DictConfig

from mae_transfer.data.sampler import num_steps
from mae_transfer.detection.optimizer import scaled_lr
from mae_transfer.errors import ConfigError


def one_length(cfg: DictConfig, overridden: Collection[str]) -> None:
    """Of train.epochs and train.max_iter, let the one given on the command line replace the one in the file.

    Raises:
        ConfigError: both, or neither.
    """
    train = cfg.train
    epochs, max_iter = train.get("epochs"), train.get("max_iter")
    if epochs is not None and max_iter is not None:
        on_line = [key for key in ("epochs", "max_iter") if f"train.{key}" in overridden]
        if len(on_line) != 1:
            raise ConfigError(f"train.epochs={epochs} and train.max_iter={max_iter} are both given; set one to null")
        train["max_iter" if on_line == ["epochs"] else "epochs"] = None
    if epochs is None and max_iter is None:
        raise ConfigError("the run has no length: give train.epochs or train.max_iter")


def check_settings(cfg: DictConfig) -> None:
    """Refuse values of the train section that cannot be meant.

    Raises:
        ConfigError: naming the first, and what is expected.
    """
    at_least_one = ("whole number above 0", lambda value: _whole(value) and value >= 1)
    at_least_zero = ("whole number, 0 or above", lambda value: _whole(value) and value >= 0)
    rules: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "batch_size": at_least_one,
        "accumulate": at_least_one,
        "checkpoint_period": at_least_one,
        "keep": at_least_one,
        "log_period": at_least_one,
        "eval_period": at_least_zero,
        "pictures": at_least_zero,
        "freeze_blocks": at_least_zero,
        "seed": at_least_zero,
        "max_iter": at_least_one,
        "epochs": ("number above 0", lambda value: _number(value) and value > 0),
        "clip_norm": ("number above 0, or null for no clipping", lambda value: _number(value) and value > 0),
        "ema": ("number between 0 and 1 such as 0.9999, or null", lambda value: _number(value) and 0 < value < 1),
        "divergence_factor": ("factor above 1, or 0 for no check", lambda v: _number(v) and (v == 0 or v > 1)),
        "best": ("metric such as segm/AP, or null for no best checkpoint", lambda value: isinstance(value, str)),
    }
    optional = ("max_iter", "epochs", "clip_norm", "ema", "best")
    for key, (expected, holds) in rules.items():
        if not (cfg.train[key] is None and key in optional) and not holds(cfg.train[key]):
            raise ConfigError(f"train.{key}={cfg.train[key]}: expected a {expected}")
    if cfg.train.freeze_blocks and not cfg.train.init_checkpoint:
        raise ConfigError(
            f"train.freeze_blocks={cfg.train.freeze_blocks} without train.init_checkpoint would keep random weights"
        )
    best, names = cfg.train.best, metric_names(cfg)
    if best is not None and best not in names:
        raise ConfigError(f"train.best={best}: no evaluation gives that; use one of {', '.join(names[:6])}, bbox/AP …")


def metric_names(cfg: DictConfig) -> list[str]:
    """The numbers that an evaluation gives where there is something to compute them from (APr, APc, APf in LVIS)."""
    common = ["AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf", "AR", "AR1", "AR10", "ARs", "ARm", "ARl"]
    categories = [f"AP-{category.name}" for category in cfg.dataset.categories]
    return [f"{kind}/{name}" for kind in ("segm", "bbox") for name in common] + [
        f"{kind}/{name}" for kind in ("segm", "bbox") for name in categories
    ]


def settle_length(cfg: DictConfig, num_images: int | None = None) -> None:
    """``schedule.max_iter``, the iterations of the run, from train.max_iter, or from train.epochs once the number of
    training images is known.

    Raises:
        ConfigError: the schedule does not fit in it.
    """
    train = cfg.train
    if train.max_iter is not None:
        cfg.schedule.max_iter = train.max_iter
    elif num_images is not None:
        cfg.schedule.max_iter = num_steps(epochs=train.epochs, num_samples=num_images, batch_size=train.batch_size)
    else:
        return
    instantiate(cfg.schedule)  # for its errors


def describe(cfg: DictConfig, *, num_images: int, num_processes: int) -> str:
    """What the log says of a run's length, batches and learning rate."""
    train, optimizer = cfg.train, cfg.optimizer
    length = cfg.schedule.max_iter
    rounds = f" in {train.accumulate} rounds" if train.accumulate > 1 else ""
    said = (
        f"{length} iterations of {train.batch_size} images ({num_processes} process(es) x "
        f"{train.batch_size // num_processes}{rounds}) = {length * train.batch_size / num_images:.2f} epochs of "
        f"{num_images} images; precision {train.precision}; weight decay rule {optimizer.get('decay_rule', 'clean')}"
    )
    reference = optimizer.get("lr_batch_size")
    if reference is None:
        return f"{said}; learning rate {optimizer.lr:g}, not scaled with the batch size"
    scaled = scaled_lr(optimizer.lr, batch_size=train.batch_size, lr_batch_size=reference)
    return f"{said}; learning rate {optimizer.lr:g} x {train.batch_size} / {reference} = {scaled:g}"


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
