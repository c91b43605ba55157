"""What tests of data share."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """A folder with ``coco128`` of ../shared/data unpacked in it; tests that need it are skipped where it is absent."""
    archive = root.parent / "shared" / "data" / "coco128.tar"
    if not archive.is_file():
        pytest.skip(f"no real images: {archive} is absent")
    folder = tmp_path_factory.mktemp("real")
    with tarfile.open(archive) as content:
        content.extractall(folder, filter="data")
    return folder
