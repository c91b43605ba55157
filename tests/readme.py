"""What the tests of README pages share: their code blocks, running what stands there, and their links."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path


def blocks(page: Path, language: str) -> list[str]:
    """The contents of a page's fenced code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[str]:
    """The lines of its shell blocks."""
    return [line for block in blocks(page, "bash") for line in block.splitlines() if line.strip()]


def run(command: Sequence[str], folder: Path) -> None:
    """Run in ``folder``; fails with the end of what the command said."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"


def check_links(page: Path) -> None:
    """Every link to a file leads to one."""
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target
