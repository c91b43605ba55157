"""What every test shares."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Subprocesses of the tests import the packages from the checkout, whatever their working directory.
ROOT = Path(__file__).resolve().parent.parent
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
# Two test processes on two cores: a thread pool each would only make them wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's folder."""
    return ROOT
