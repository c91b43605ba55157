"""Progress of a run: a bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import logging
import sys
import time

from tqdm import tqdm

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """Steps done, loss, learning rate, speed, what it takes of the machine, time left. Silent unless ``show``.

    The time left counts training only: evaluation and pictures are added when they come.
    """

    def __init__(self, *, num_steps: int, first_step: int, show: bool) -> None:
        terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=num_steps,
            initial=first_step,
            unit="step",
            disable=not (show and terminal),
            # The time left is ours: tqdm's would count evaluation as training.
            bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
            dynamic_ncols=True,
        )
        self._lines = show and not terminal
        self._num_steps = num_steps
        self._step = first_step
        self._last_line = -_SECONDS_BETWEEN_LINES
        self._busy_seconds = 0.0
        self._steps_timed = 0

    def update(
        self,
        step: int,
        *,
        loss: float,
        lr: float,
        images_per_second: float,
        seconds: float,
        mfu: float | None = None,
        memory_bytes: int | None = None,
        data_wait: float | None = None,
    ) -> None:
        """Report that ``step`` steps are done.

        Args:
            seconds: that the last few steps, up to this one, took together.
            mfu: model FLOP/s over those of the measured ceiling, 0 to 1.
            memory_bytes: peak.
            data_wait: share of ``seconds`` that was spent waiting for batches.
        """
        self._busy_seconds += seconds
        self._steps_timed += step - self._step
        left = (self._num_steps - step) * self._busy_seconds / max(1, self._steps_timed)
        parts = [f"loss {loss:.4f}", f"lr {lr:.2e}", f"{images_per_second:.0f} images/s"]
        if mfu is not None:
            parts.append(f"MFU {mfu:.0%}")
        if memory_bytes is not None:
            parts.append(f"{memory_bytes / 2**30:.1f} GiB")
        if data_wait is not None:
            parts.append(f"data wait {data_wait:.0%}")
        text = ", ".join([*parts, f"{duration(left)} left"])
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(step - self._step)
        self._step = step
        now = time.monotonic()
        if self._lines and (now - self._last_line >= _SECONDS_BETWEEN_LINES or step == self._num_steps):
            self._last_line = now
            logger.info("step %d/%d, %s", step, self._num_steps, text)

    def close(self) -> None:
        self._bar.close()


def duration(seconds: float) -> str:
    """``1:02:03`` for 3723 seconds, ``1:05`` for 65."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
