"""MMEngine's Runner with checkpoints that are whole or not there, read as plain data, and gone on from exactly."""

from __future__ import annotations

import pickle
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch
from mmengine.device import get_device
from mmengine.dist import broadcast, is_main_process
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModule, is_model_wrapper
from mmengine.runner import Runner
from torch import Tensor, nn

from mae_transfer.checkpoint.files import read_torch
from mae_transfer.engine.checkpoints import verify_checkpoint
from mae_transfer.engine.files import write_torch
from mae_transfer.engine.parallel import compile_blocks, shard
from mae_transfer.engine.signals import StopRequest
from mae_transfer.errors import CheckpointError, ConfigError
from mae_transfer.segmentation.processes import is_sharded, optimizer_shares, share_of, share_statistics, whole
from mae_transfer.segmentation.release import in_our_names

# What counts a scheduler's progress; what it counts towards is today's config.
_PROGRESS = ("last_step", "_global_step", "_last_value")


class SegmentationRunner(Runner):
    """Runner for one process or several, with checkpoints of one format whatever the model is spread over.

    Keys of its own in the config: ``distributed`` ("ddp" or "fsdp2", of several processes) and ``compile_blocks``.
    """

    _resume: bool  # set by Runner
    _load_from: str | None
    stop_request: StopRequest | None = None  # read by the hook SaveOnSignal

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.on_exit = ExitStack()  # what hooks have open; closed when the training ends, however it ends
        super().__init__(*args, **kwargs)

    def train(self) -> nn.Module:
        """As Runner's."""
        with self.on_exit:
            return super().train()

    @property
    def module(self) -> nn.Module:
        """The model without what spreads it over processes."""
        return self.model.module if is_model_wrapper(self.model) else self.model

    def wrap_model(self, model_wrapper_cfg: dict[str, Any] | None, model: nn.Module) -> nn.Module:
        """As Runner's; or compiled block by block, and in shards of all processes."""
        backbone = getattr(model, "backbone", None)
        if self.cfg.get("compile_blocks") and backbone is not None:
            compile_blocks(backbone)
        if not self.distributed or self.cfg.get("distributed", "ddp") == "ddp":
            return super().wrap_model(model_wrapper_cfg, model)
        model = model.to(get_device())
        cast(BaseModule, model).init_weights()  # now, while the tensors are whole
        for tensor in model.state_dict().values():
            broadcast(tensor)
        blocks = list(backbone.blocks) if backbone is not None else []
        shard(model, blocks, device=torch.device(get_device()), world_size=self.world_size)
        return model

    def _init_model_weights(self) -> None:
        if not is_sharded(self.model):
            super()._init_model_weights()

    def save_checkpoint(
        self,
        out_dir: str,
        filename: str,
        file_client_args: dict[str, Any] | None = None,
        save_optimizer: bool = True,
        save_param_scheduler: bool = True,
        meta: dict[str, Any] | None = None,
        by_epoch: bool = True,
        backend_args: dict[str, Any] | None = None,
    ) -> None:
        """As Runner's, in its format; all processes call this together. Killed meanwhile, the file of before stays.

        Raises:
            RunFailed: the disk is full.
        """
        share_statistics(self.module)
        checkpoint: dict[str, Any] = {
            "meta": {
                "epoch": self.epoch,
                "iter": self.iter + 1,
                **(meta or {}),
                "cfg": self.message_hub.get_info("cfg"),  # as formatted once: it takes half a second
                "seed": self.seed,
                "experiment_name": self.experiment_name,
                "time": time.strftime("%Y%m%d_%H%M%S"),
                "dataset_meta": self.train_dataloader.dataset.metainfo,
                "facts": self.facts(),
            },
            "state_dict": whole(self.module.state_dict()),
            "message_hub": self.message_hub.state_dict(),
        }
        if save_optimizer:
            checkpoint["optimizer"] = whole(self.optim_wrapper.state_dict())
        if save_param_scheduler:
            checkpoint["param_schedulers"] = [scheduler.state_dict() for scheduler in self.param_schedulers or ()]
        self.call_hook("before_save_checkpoint", checkpoint=checkpoint)
        if is_main_process():
            write_torch(Path(out_dir) / filename, checkpoint)

    def facts(self) -> dict[str, int]:
        """What must not change when a run is gone on with, or it would not see the same samples."""
        batch = self.train_dataloader.batch_size * self.world_size
        return {
            "train.batch_size": batch,
            "train.seed": self.seed,
            "number of training images": len(self.train_dataloader.dataset),
        }

    def load_or_resume(self) -> None:
        """As Runner's, but goes on from the last whole checkpoint *in the work dir*, wherever that was moved."""
        if self._resume and not self._load_from:
            found = self._last_good()
            if found is not None:
                self._load_from = str(found)
            else:
                self.logger.info(f"{self.work_dir} holds no checkpoint yet: starting from the beginning")
                self._resume = False
        super().load_or_resume()

    def _last_good(self) -> Path | None:
        found = checkpoints_of(self.work_dir)
        for path in reversed(found):
            try:
                verify_checkpoint(path)
            except CheckpointError as error:
                self.logger.warning(f"{error}; falling back to the checkpoint before it")
            else:
                return path
        if found:
            raise CheckpointError(f"no checkpoint in {self.work_dir} is whole; start anew in another --work-dir")
        return None

    def resume(
        self, filename: str, resume_optimizer: bool = True, resume_param_scheduler: bool = True, **_: Any
    ) -> None:
        """Go on from a checkpoint: weights, moments, schedule, best score, and the place among the samples.

        Numbers that today's config sets (rates, decay, length) are today's; a rate goes on from where it was, in
        proportion.

        Raises:
            CheckpointError: it is of another model or other parameter groups.
            ConfigError: the run would see other samples, or has done more iterations than it is to do.
        """
        checkpoint = self.load_checkpoint(filename)
        meta = checkpoint["meta"]
        for name, value in self.facts().items():
            before = meta.get("facts", {}).get(name, value)
            if before != value:
                raise ConfigError(
                    f"{filename} was trained with {name}={before} and this run has {value}: it would not see the same "
                    "samples. Restore what it was, or start a new run in another --work-dir"
                )
        if meta["iter"] > self.max_iters:
            raise ConfigError(f"{filename} has done {meta['iter']} iterations; train.max_iters is {self.max_iters}")
        self.train_loop._epoch, self.train_loop._iter = meta["epoch"], meta["iter"]
        self.message_hub.load_state_dict(checkpoint["message_hub"])
        self._move_paths()
        if resume_optimizer and "optimizer" in checkpoint:
            self._resume_optimizer(checkpoint["optimizer"], filename)
        if resume_param_scheduler:
            self._resume_schedule(checkpoint.get("param_schedulers", []), filename)
        self._has_loaded = True
        self.logger.info(f"resumed {filename} behind iteration {self.iter}")

    def _resume_optimizer(self, saved: dict[str, Any], filename: str) -> None:
        own = self.optim_wrapper.state_dict()
        if [len(group["params"]) for group in saved["param_groups"]] != [len(g["params"]) for g in own["param_groups"]]:
            raise CheckpointError(
                f"the optimizer of {filename} has other parameter groups; train.freeze_blocks, encoder.frozen, "
                "train.layer_decay and train.weight_decay_groups must stay what they were when the run began"
            )
        groups = [
            _going_on(before, now) for before, now in zip(saved["param_groups"], own["param_groups"], strict=True)
        ]
        state = {**optimizer_shares(saved, self.optim_wrapper.optimizer), "param_groups": groups}
        if own.get("base_param_settings") is not None and saved.get("base_param_settings") is not None:
            state["base_param_settings"] = _going_on(saved["base_param_settings"], own["base_param_settings"])
        self.optim_wrapper.load_state_dict(state)

    def _resume_schedule(self, saved: list[dict[str, Any]], filename: str) -> None:
        schedulers = self.param_schedulers or []
        if len(saved) != len(schedulers):
            raise ConfigError(
                f"the schedule of {filename} has {len(saved)} parts and this run's has {len(schedulers)}; leave "
                "train.warmup_iters as it was when the run began"
            )
        for scheduler, state in zip(schedulers, saved, strict=True):
            scheduler.load_state_dict({name: state[name] for name in _PROGRESS})

    def _move_paths(self) -> None:
        """Checkpoints that the state names lie in today's work dir, and are removed there when they are outdated."""
        for name in ("best_ckpt", "last_ckpt"):
            if name in self.message_hub.runtime_info:
                moved = Path(self.work_dir) / Path(self.message_hub.get_info(name)).name
                self.message_hub.update_info(name, str(moved))

    def load_checkpoint(self, filename: str, *_: Any, **__: Any) -> dict[str, Any]:
        """Weights into the model, strictly; returns the whole checkpoint, for ``resume``. Read on the CPU, safely."""
        checkpoint = read_checkpoint(filename)
        self.call_hook("after_load_checkpoint", checkpoint=checkpoint)
        fill(self.module, checkpoint["state_dict"], filename)
        return checkpoint


def _going_on(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Today's settings of a parameter group, at the point of the schedule that the saved one had reached."""
    reached = before["lr"] / before["initial_lr"] if before.get("initial_lr") else 1.0
    start = now.get("initial_lr", now["lr"])
    return {**now, "lr": before["lr"] if start == before.get("initial_lr") else start * reached}


def checkpoints_of(folder: str | Path) -> list[Path]:
    """The checkpoints ``iter_N.pth`` in a work dir, the last one last."""
    return sorted(Path(folder).glob("iter_*.pth"), key=lambda path: int(path.stem.rsplit("_", 1)[1]))


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Put a segmentation checkpoint's weights into a whole model, strictly.

    Raises:
        CheckpointError: the file is missing, unsafe or damaged, or of another model.
    """
    fill(model, read_weights(path), path)


def fill(model: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    """``load_weights`` of a state dict already read from ``path``."""
    own = model.state_dict()
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    differing = [
        f"{name} {tuple(state[name].shape)}, the model has {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    problems = [
        f"{label} {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for label, names in (("lacks", missing), ("also holds", unexpected), ("shapes differ:", differing))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{path} is not of this model: {'; '.join(problems)}. Give the config and the dataset.* options it was "
            "trained with (its work dir holds them as a .py file)"
        )
    model.load_state_dict({name: share_of(state[name], tensor) for name, tensor in own.items()})


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """``state_dict`` of a checkpoint that MMEngine wrote, a release of MMSegmentation's own MAE in our names.

    Raises as ``read_checkpoint``.
    """
    return in_our_names(read_checkpoint(path)["state_dict"])


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """All of a checkpoint that MMEngine wrote.

    Raises:
        CheckpointError: missing, damaged, or holding objects other than tensors, arrays and MMEngine's histories.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} does not exist")
    # A history names its own methods through ``getattr``: a stand-in is allowed under that name which gives out nothing
    # else.
    content = read_torch(path, histories=[HistoryBuffer, (history_method, "builtins.getattr")])
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} holds no state_dict; expected a checkpoint that train_seg wrote")
    return content


def history_method(owner: Any, name: str) -> Any:
    """A statistic of MMEngine's HistoryBuffer by its name, and nothing else.

    Raises:
        UnpicklingError: asked for anything else.
    """
    if owner is not HistoryBuffer or name not in ("min", "max", "mean", "current"):
        raise pickle.UnpicklingError(f"the file asks for {name} of {owner}")
    return getattr(HistoryBuffer, name)
