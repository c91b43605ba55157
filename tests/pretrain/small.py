"""The smallest run that is a real one: a two-block model on a dozen 16-pixel pictures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

ARGUMENTS = (
    *("data.image_size=16", "data.workers=0", "model.size=tiny", "model.patch_size=4", "model.width=32"),
    *("model.depth=2", "model.num_heads=2", "model.decoder_dim=32", "model.decoder_depth=1"),
    *("model.decoder_num_heads=2", "train.batch_size=8", "train.precision=fp32", "optim.warmup_epochs=1"),
    *("checkpoint.every_steps=3", "log.every_steps=1", "log.tensorboard=false", "log.reconstruct_every_epochs=0"),
)

# What differs between two equal runs.
CLOCK = ("time", "images_per_second", "data_wait", "mfu", "memory_gib", "probe_seconds")


def children(process: int) -> list[int]:
    """The processes that a process has started, torchrun's workers for example."""
    found = subprocess.run(["pgrep", "-P", str(process)], capture_output=True, text=True, check=False)
    return [int(child) for child in found.stdout.split()]


def wait_for(condition: Callable[[], object], *processes: subprocess.Popen[str], seconds: float = 120) -> None:
    """Until ``condition`` holds.

    Raises:
        AssertionError: a process ended before, or it took too long; with what they wrote. None is left running.
    """
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end or any(process.poll() is not None for process in processes):
            for process in processes:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            written = [text for process in processes for text in process.communicate() if text]
            raise AssertionError("the run ended or took too long: " + "\n".join(written))
        time.sleep(0.01)


def timeless(metrics: Path) -> list[dict[str, Any]]:
    """Lines of a metrics.jsonl without what a clock says."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in line.items() if name not in CLOCK} for line in lines]
