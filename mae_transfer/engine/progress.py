"""Progress of a run: a bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import logging
import sys
import time

from tqdm import tqdm

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """Steps done, loss, learning rate, images a second, time left. Silent unless ``show``."""

    def __init__(self, *, num_steps: int, first_step: int, show: bool) -> None:
        terminal = sys.stderr.isatty()
        self._bar = tqdm(total=num_steps, initial=first_step, unit="step", disable=not (show and terminal))
        self._lines = show and not terminal
        self._num_steps = num_steps
        self._step = first_step
        self._last_line = -_SECONDS_BETWEEN_LINES
        self._busy_seconds = 0.0
        self._steps_timed = 0

    def update(self, step: int, *, loss: float, lr: float, images_per_second: float, seconds: float) -> None:
        """Report that ``step`` steps are done, the last few of which took ``seconds`` together."""
        self._busy_seconds += seconds
        self._steps_timed += step - self._step
        self._bar.set_postfix_str(f"loss {loss:.4f}, lr {lr:.2e}, {images_per_second:.0f} images/s", refresh=False)
        self._bar.update(step - self._step)
        self._step = step
        now = time.monotonic()
        if self._lines and (now - self._last_line >= _SECONDS_BETWEEN_LINES or step == self._num_steps):
            self._last_line = now
            left = (self._num_steps - step) * self._busy_seconds / max(1, self._steps_timed)
            logger.info(
                "step %d/%d, loss %.4f, lr %.2e, %.0f images/s, %s left",
                *(step, self._num_steps, loss, lr, images_per_second, duration(left)),
            )

    def close(self) -> None:
        self._bar.close()


def duration(seconds: float) -> str:
    """``1:02:03`` for 3723 seconds, ``1:05`` for 65."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
