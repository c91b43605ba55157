"""What a model draws in a step, as a function of where it is in the run."""

from __future__ import annotations

import torch

from mae_transfer.data.draws import Draws, Purpose


def seed_step(*, seed: int, step: int, part: int, device: torch.device) -> None:
    """Seed the generators of the CPU and of ``device`` for one forward pass: no random state has to be saved.

    Args:
        part: tells the passes of a step apart: accumulation round x number of processes + rank.
    """
    words = Draws(seed=seed, purpose=Purpose.STEP, epoch=step, index=part).words(1)
    state = int(words[0] >> 1)
    # Not torch.manual_seed: every call of it is kept in a list for devices that have not been used yet.
    torch.default_generator.manual_seed(state)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(state)
