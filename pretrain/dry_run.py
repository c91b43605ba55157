"""What a pretraining run will take, from a few real steps and from formulae."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from mae_transfer.engine.distribution import Processes
from mae_transfer.engine.rehearsal import parameter_counts, parameter_table, rehearse
from pretrain.config import PretrainConfig
from pretrain.monitor import monitors
from pretrain.objective import PretrainRun
from pretrain.planner import Memory, forward_work, memory


def dry_run(config: PretrainConfig, processes: Processes) -> str:
    """Take a few real steps, and each evaluation once, and report. Nothing is written to ``run.dir``.

    Raises:
        UserError: whatever the real run would refuse before it starts, but for what is in ``run.dir``.
    """
    run = PretrainRun(config, processes)
    seen = rehearse(run, lambda folder: monitors(run, folder))
    work = forward_work(run.model, mask_ratio=config.mask.ratio)
    planned = _planned_memory(run)
    notes = ["forward and backward", "the formula overlooks that images need no gradient"]
    if config.model.checkpointing:
        notes.append("the counter sees blocks computed twice")
    if processes.device.type == "cpu":
        notes.append("on a CPU it sees attention's scores twice")
    lines = [
        parameter_table(run.model),
        "",
        f"model            {config.model.size}, {parameter_counts(run.model)}",
        f"work             {run.sample_flops / 1e9:.3g} GFLOP an image by formula, {_counted_gflops(run):.3g} by "
        f"counter ({'; '.join(notes)})",
        f"decoder          {work.decoder_per_token:.1%} of the encoder's work per token (paper, Section 3: under 10 % "
        f"for ViT-L), on {work.decoder_tokens} tokens against {work.encoder_tokens}; "
        f"{work.decoder_share:.1%} of all work",
        seen.data(),
        seen.step(),
        seen.waiting(),
        f"{seen.memory()}; a GPU would hold "
        f"{planned.total / 2**30:.2f} by formula: parameters, gradients and moments "
        f"{(planned.parameters + planned.gradients + planned.moments) / 2**30:.2f}, activations "
        f"{(planned.activations + planned.copies) / 2**30:.2f}",
        seen.projected(),
    ]
    return "\n".join(lines)


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
