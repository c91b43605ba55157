"""The installer: which Pythons it takes, when it has nothing to do; Detectron2 is verified and never replaced."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def install() -> ModuleType:
    specification = importlib.util.spec_from_file_location("install_under_test", ROOT / "tools" / "install.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize("version", [(3, 11), (3, 12), (3, 13)])
def test_suitable_pythons(install: ModuleType, version: tuple[int, int]) -> None:
    assert install.unsuitable(version) is None


@pytest.mark.parametrize(("version", "word"), [((3, 8), "too old"), ((3, 10), "too old"), ((3, 14), "newer")])
def test_an_unsuitable_python_is_named_with_what_to_do(
    install: ModuleType, version: tuple[int, int], word: str
) -> None:
    reason = install.unsuitable(version)
    assert f"Python {version[0]}.{version[1]}" in reason
    assert word in reason
    assert "make test PYTHON=" in reason


def test_a_32_bit_python_is_refused(install: ModuleType) -> None:
    assert "64-bit" in install.unsuitable((3, 11), bits=32)


def test_installer_needs_only_the_standard_library() -> None:
    # -S -I: no site-packages, no current folder; a third-party import at the top would fail here.
    command = [sys.executable, "-S", "-I", str(ROOT / "tools" / "install.py"), "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "detectron2" in result.stdout


def test_the_lock_pins_everything_and_names_torch_first(install: ModuleType) -> None:
    text = install.LOCK.read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert all("==" in line for line in lines)
    pair = install.torch_pair(text)
    assert [line.split("==")[0] for line in pair] == ["torch", "torchvision"]
    assert lines[:2] == pair
    names = [line.split("==")[0].lower() for line in lines]
    assert "opencv-python-headless" not in names
    assert int(dict(line.split("==") for line in lines)["setuptools"].split(".")[0]) < 81


def test_the_lock_satisfies_setup_py(tmp_path: Path) -> None:
    """Every requirement of the package and of its extras is pinned, to a version that the requirement allows."""
    from packaging.requirements import Requirement

    command = [sys.executable, "-W", "ignore", "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    requires = (tmp_path / "mae_transfer.egg-info" / "requires.txt").read_text()
    lock = (ROOT / ".ci" / "requirements.lock").read_text().splitlines()
    pinned = dict(line.lower().replace("_", "-").split("==") for line in lock if "==" in line)
    for line in requires.splitlines():
        if line and not line.startswith("["):
            requirement = Requirement(line)
            version = pinned[requirement.name.lower()]
            assert requirement.specifier.contains(version), f"{line} against the lock's {version}"


def test_a_complete_environment_is_reused_and_a_broken_one_repaired(
    install: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    monkeypatch.setattr(install, "run", lambda command, what: steps.append(what))
    monkeypatch.setattr(install, "make_venv", lambda venv: Path(sys.executable))
    monkeypatch.setattr(install, "install_detectron2", lambda python, site_packages: steps.append("detectron2"))
    monkeypatch.setattr(install, "python_in", lambda venv: Path(sys.executable))
    monkeypatch.setattr(install, "QUICK_CHECK", "import json")

    install.install_all(tmp_path)
    assert "torch" in steps[0]
    assert "detectron2" in steps
    steps.clear()
    install.install_all(tmp_path)  # stamped and importable
    assert steps == []
    monkeypatch.setattr(install, "QUICK_CHECK", "import no_such_module")
    install.install_all(tmp_path)  # stamped, but does not import
    assert "torch" in steps[0]
    steps.clear()
    monkeypatch.setattr(install, "QUICK_CHECK", "import json")
    (tmp_path / install.STAMP).write_text("another lock\n")
    install.install_all(tmp_path)  # out of date
    assert "torch" in steps[0]


def test_no_stamp_after_a_failed_step(install: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "make_venv", lambda venv: Path(sys.executable))
    monkeypatch.setattr(install, "torch_pair", lambda text: ["no-such-package-for-mae-transfer==1"])
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(install.InstallError, match="torch and torchvision"):
        install.install_all(tmp_path)
    assert not (tmp_path / install.STAMP).exists()


def bare_venv(folder: Path) -> tuple[Path, Path]:
    """An environment without packages whose pip is the one of this Python; its Python and its folder of packages."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    where = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.run(where, capture_output=True, text=True, check=True).stdout.strip())
    import pip

    (packages / "pip").symlink_to(Path(pip.__file__).parent)
    return python, packages


def fake_wheel(folder: Path) -> Path:
    """A wheel of the pinned name and version, with a top-level `tools` as the real one has."""
    wheel = folder / "sal_detectron2-0.7.2-cp310-cp310-linux_x86_64.whl"
    information = "sal_detectron2-0.7.2.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("detectron2/__init__.py", "")
        archive.writestr("detectron2/modeling/__init__.py", "")
        archive.writestr("tools/__init__.py", "")
        archive.writestr(f"{information}/METADATA", "Metadata-Version: 2.1\nName: sal-detectron2\nVersion: 0.7.2\n")
        archive.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nTag: cp310-cp310-linux_x86_64\n")
        archive.writestr(f"{information}/RECORD", "")
    return wheel


def test_detectron2_is_verified_installed_once_and_never_replaced(
    install: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import hashlib

    python, packages = bare_venv(tmp_path / "environment")
    wheel = fake_wheel(tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))

    with pytest.raises(install.InstallError, match="verified by its hash"):  # not the wheel that was examined
        install.install_detectron2(python, packages)
    assert not (packages / "detectron2").exists()

    monkeypatch.setattr(install, "DETECTRON2_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    install.install_detectron2(python, packages)
    assert (packages / "detectron2" / "modeling").is_dir()
    assert not (packages / "tools").exists()
    assert not list(packages.glob(".detectron2-*"))

    wheel.unlink()  # from here on nothing could be installed
    install.install_detectron2(python, packages)  # importable: stays
    (packages / "detectron2" / "modeling" / "__init__.py").write_text("import no_such_module")
    with pytest.raises(install.InstallError, match="installing Detectron2"):  # our own, broken: would be repaired
        install.install_detectron2(python, packages)
    (packages / "sal_detectron2-0.7.2.dist-info" / "METADATA").unlink()
    with pytest.raises(install.InstallError, match="not replaced"):  # somebody's own build, broken: theirs to mend
        install.install_detectron2(python, packages)
    assert (packages / "detectron2" / "__init__.py").exists()
