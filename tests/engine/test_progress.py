"""What a person sees of a run that goes on."""

from __future__ import annotations

import io
import logging
import sys

import pytest

from mae_transfer.engine.progress import Progress, duration


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def report(progress: Progress, step: int, **more: float) -> None:
    progress.update(step, loss=0.5, lr=1.5e-4, images_per_second=812.4, seconds=2.0, **more)  # type: ignore[arg-type]


def test_a_line_in_a_log(caplog: pytest.LogCaptureFixture) -> None:
    progress = Progress(num_steps=100, first_step=10, show=True)
    with caplog.at_level(logging.INFO):
        report(progress, 20, mfu=0.614, memory_bytes=3 * 2**30, data_wait=0.03)
        report(progress, 30)  # within half a minute of the last line
        report(progress, 100)
    first, last = caplog.messages
    assert first == ("step 20/100, loss 0.5000, lr 1.50e-04, 812 images/s, MFU 61%, 3.0 GiB, data wait 3%, 0:16 left")
    assert last.startswith("step 100/100") and last.endswith("0:00 left") and "MFU" not in last


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = Progress(num_steps=40, first_step=0, show=True)
    progress._bar.mininterval = 0
    report(progress, 20, mfu=0.5, memory_bytes=2**30, data_wait=0.5)
    progress.close()
    shown = terminal.getvalue()
    assert "20/40" in shown and "MFU 50%, 1.0 GiB, data wait 50%, 0:02 left" in shown


def test_other_processes_are_silent(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = Progress(num_steps=4, first_step=0, show=False)
    with caplog.at_level(logging.INFO):
        report(progress, 4)
    progress.close()
    assert not terminal.getvalue() and not caplog.messages


@pytest.mark.parametrize(("seconds", "text"), [(5, "0:05"), (65, "1:05"), (3723, "1:02:03"), (604800, "168:00:00")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
