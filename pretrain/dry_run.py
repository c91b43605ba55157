"""Real steps before a long run: does it fit, how fast is it, where does the work go, how long will it take."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mae_transfer.engine.distribution import Processes
from mae_transfer.engine.hardware import memory_in_use
from mae_transfer.engine.progress import duration
from mae_transfer.engine.run_folder import RunFolder
from mae_transfer.engine.trainer import Hook
from pretrain.config import PretrainConfig
from pretrain.monitor import monitors
from pretrain.objective import PretrainRun
from pretrain.planner import Memory, forward_work, memory

_SECONDS = 15.0  # for steps after the first, which warms up
_LONG_STEP = 60.0  # is measured by itself, and nothing else is
_MOST_STEPS = 10


def dry_run(config: PretrainConfig, processes: Processes) -> str:
    """Take a few real steps, and each evaluation once, and report. Nothing is written to ``run.dir``.

    Raises:
        UserError: whatever the real run would refuse before it starts, but for what is in ``run.dir``.
    """
    run = PretrainRun(config, processes)
    with tempfile.TemporaryDirectory() as scratch:
        folder = RunFolder(Path(scratch) / "run")
        folder.reconstructions.mkdir(parents=True)
        hooks = monitors(run, folder)
        trainer = run.trainer(folder)
        steps = trainer.timed_steps(1)
        first = steps[0][0]
        short = not processes.any(first > _LONG_STEP)
        wanted = 1 + processes.largest([max(1, min(_MOST_STEPS, int(_SECONDS / first)))])[0]
        left = run.num_steps - trainer.step
        if short and left:
            steps = trainer.timed_steps(min(wanted, left))
            if len(steps) > 1:  # the first of these starts the loader anew, which a run does once
                steps = steps[1:]
        seconds = statistics.median(taken for taken, _ in steps)
        data_wait = sum(waited for _, waited in steps) / max(sum(taken for taken, _ in steps), 1e-9)
        peak = memory_in_use(processes.device)
        counted = _counted_gflops(run)
        extra = _timed_hooks(run, hooks) if short else {}
    batch_size, gflops = config.train.batch_size, run.sample_flops / 1e9
    speed = batch_size / seconds
    assert trainer.peak_flops is not None
    ceiling = trainer.peak_flops / 1e9
    work = forward_work(run.model, mask_ratio=config.mask.ratio)
    planned = _planned_memory(run)
    total = seconds * run.num_steps + sum(extra.values())
    others = ", ".join(f"{name} {duration(spent)}" for name, spent in extra.items())
    notes = ["forward and backward", "the formula overlooks that images need no gradient"]
    if config.model.checkpointing:
        notes.append("the counter sees blocks computed twice")
    if processes.device.type == "cpu":
        notes.append("on a CPU it sees attention's scores twice")
    known = "measured" if config.log.peak_gflops is None else "given"
    lines = [
        parameter_table(run.model),
        "",
        f"model            {config.model.size}, {_millions(run.model)} ({_millions(run.model, trained=True)} train)",
        f"work             {gflops:.3g} GFLOP an image by formula, {counted:.3g} by counter ({'; '.join(notes)})",
        f"decoder          {work.decoder_per_token:.1%} of the encoder's work per token (paper, Section 3: under 10 % "
        f"for ViT-L), on {work.decoder_tokens} tokens against {work.encoder_tokens}; "
        f"{work.decoder_share:.1%} of all work",
        f"data             {run.num_samples} images, {run.num_steps} steps of {batch_size} on "
        f"{processes.world_size} process(es)",
        f"step             {seconds:.3g} s (median of {len(steps)}), {speed:.1f} images/s, "
        f"{speed * gflops:.3g} GFLOP/s = {speed * gflops / ceiling:.0%} of the {known} {ceiling:.0f} (MFU)",
        f"data wait        {data_wait:.1%} of the step",
        f"peak memory      {peak / 2**30:.2f} GiB a process "
        f"({'GPU' if processes.device.type == 'cuda' else 'resident, data and libraries included'}); a GPU would hold "
        f"{planned.total / 2**30:.2f} by formula: parameters, gradients and moments "
        f"{(planned.parameters + planned.gradients + planned.moments) / 2**30:.2f}, activations "
        f"{(planned.activations + planned.copies) / 2**30:.2f}",
        f"projected time   {duration(total)} for the whole run: steps {duration(seconds * run.num_steps)}"
        + (f", {others}" if extra else "")
        + ("" if short or not hooks else "; evaluation and pictures not measured, as a step alone takes this long"),
    ]
    return "\n".join(lines)


def parameter_table(model: nn.Module) -> str:
    """fvcore's table of parameters, where fvcore is installed."""
    try:
        from fvcore.nn import parameter_count_table
    except ImportError:
        return "parameters       no table: fvcore is not installed (pip install fvcore, or the detection extra)"
    return str(parameter_count_table(model, max_depth=1))


def _millions(model: nn.Module, *, trained: bool = False) -> str:
    count = sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)
    return f"{count / 1e6:.2f} M" + ("" if trained else " parameters")


def _counted_gflops(run: PretrainRun) -> float:
    """torch's own count of one image's forward and backward pass."""
    height, width = run.config.data.size
    images = torch.zeros(1, run.config.data.channels, height, width, device=run.processes.device)
    noise = torch.arange(run.sampler.num_patches, dtype=torch.float32, device=images.device)[None]
    with FlopCounterMode(display=False) as counter, run.precision.autocast():
        run.model(images, noise).loss.backward()
    run.model.zero_grad(set_to_none=True)
    return counter.get_total_flops() / 1e9


def _planned_memory(run: PretrainRun) -> Memory:
    train, world_size = run.config.train, run.processes.world_size
    return memory(
        run.model,
        micro_batch=train.batch_size // (world_size * train.accumulate),
        num_processes=world_size,
        sharded=train.distributed == "fsdp2" and world_size > 1,
        recompute=run.config.model.checkpointing,
        precision=train.precision,
        mask_ratio=run.config.mask.ratio,
    )


def _timed_hooks(run: PretrainRun, hooks: list[Hook]) -> dict[str, float]:
    """Seconds that each kind of evaluation takes in the whole run, from doing it once."""
    spent = {}
    run.model.eval()
    with torch.no_grad():
        for hook in hooks:
            before = time.perf_counter()
            hook.run(0)
            times = -(-run.num_steps // hook.every_steps)
            name = {"evaluate": "evaluation", "reconstruct": "pictures"}.get(hook.run.__name__, hook.run.__name__)
            spent[f"{times} x {name}"] = (time.perf_counter() - before) * times
    run.model.train()
    return spent
