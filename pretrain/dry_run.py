"""One real step before a long run: does it fit, how fast is it, how long will it take."""

from __future__ import annotations

import resource
import sys

import torch

from mae_transfer.engine.distribution import Processes
from mae_transfer.engine.progress import duration
from mae_transfer.engine.run_folder import RunFolder
from pretrain.config import PretrainConfig
from pretrain.objective import PretrainRun
from pretrain.planner import training_flops

_REPEAT_BELOW_SECONDS = 60.0


def dry_run(config: PretrainConfig, processes: Processes) -> str:
    """Take one real step, a second one if the first was short (it warms up), and report. Nothing is written.

    Raises:
        UserError: whatever the real run would refuse before it starts, but for what is in ``run.dir``.
    """
    run = PretrainRun(config, processes)
    trainer = run.trainer(RunFolder(config.run.dir))
    seconds = trainer.timed_steps(1)[0]
    if processes.any(seconds < _REPEAT_BELOW_SECONDS):
        seconds = trainer.timed_steps(1)[0]
    batch_size = config.train.batch_size
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    trained = sum(parameter.numel() for parameter in run.model.parameters() if parameter.requires_grad)
    gflops = training_flops(run.model, mask_ratio=config.mask.ratio) / 1e9
    speed = batch_size / seconds
    return "\n".join(
        (
            f"model            {config.model.size}, {parameters / 1e6:.2f} M parameters ({trained / 1e6:.2f} M train)",
            f"work             {gflops:.3g} GFLOP an image (forward and backward, by formula)",
            f"data             {run.num_samples} images, {run.num_steps} steps of {batch_size} on "
            f"{processes.world_size} process(es)",
            f"step             {seconds:.2f} s, {speed:.1f} images/s, {speed * gflops:.0f} GFLOP/s",
            f"peak memory      {peak_memory(processes.device) / 2**30:.2f} GiB a process "
            f"({'GPU' if processes.device.type == 'cuda' else 'resident, data included'})",
            f"projected time   {duration(seconds * run.num_steps)} for the whole run, without evaluation and pictures",
        )
    )


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that torch held on a GPU, or that this process had resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes there, KiB on Linux
