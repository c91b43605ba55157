"""Set up what the project needs, with nothing but Python's standard library.

    python tools/install.py                everything into .venv beside this repository; done again only when needed
    python tools/install.py detectron2     only Detectron2, into the environment of the Python that runs this

A finished environment carries a stamp: the hash of the pinned versions, of this file, of setup.py and of the Python
version. While the stamp fits and a quick import succeeds, there is nothing to do. An environment without it was
interrupted or is out of date: pip is run again over it, which repairs it.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / ".ci" / "requirements.lock"
VENV = ROOT / ".venv"
STAMP = "mae-transfer.stamp"
FIRST_PYTHON, LAST_PYTHON = (3, 11), (3, 13)
DISK_GIB = 8  # 5.5 for the packages, the rest for pip's own temporary files

# Detectron2's Python of 2024 as somebody packed it: commit a59f0563 and a one-line fix for Python 3.11. The wheel is
# tagged for Python 3.10 because of a compiled part that Mask R-CNN does not use: torchvision has the operators.
DETECTRON2 = "sal-detectron2==0.7.2"
DETECTRON2_SHA256 = "491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561"
DETECTRON2_TAGS = ["--python-version", "3.10", "--implementation", "cp", "--abi", "cp310", "--platform", "linux_x86_64"]

QUICK_CHECK = (
    "import torch, torchvision, timm, detectron2.modeling, mmseg.registry, faster_coco_eval, skimage, mae_transfer"
)


class InstallError(Exception):
    """What went wrong and what to do about it, for the person at the terminal."""


def unsuitable(version: tuple[int, int], bits: int = 64) -> str | None:
    """Why this Python cannot be used and what to do, or None when it can.

    Args:
        version: major and minor number.
        bits: width of a pointer; there is no torch for 32-bit Pythons.
    """
    wanted = f"Python {FIRST_PYTHON[0]}.{FIRST_PYTHON[1]} to {LAST_PYTHON[0]}.{LAST_PYTHON[1]}"
    remedy = (
        f"{wanted} is needed (3.11 is what the pinned versions were tested with). Install it, for example "
        "`apt install python3.11 python3.11-venv`, `pyenv install 3.11` or `conda create -n py311 python=3.11`, "
        "and say which one to use: `make test PYTHON=/path/to/python3.11`"
    )
    if bits != 64:
        return f"this Python is a {bits}-bit program and torch needs a 64-bit one. {remedy}"
    if version < FIRST_PYTHON:
        return f"this is Python {version[0]}.{version[1]}, too old for the pinned numpy and scipy. {remedy}"
    if version > LAST_PYTHON:
        return f"this is Python {version[0]}.{version[1]}, newer than what the packages were tried with. {remedy}"
    return None


def torch_pair(lock_text: str) -> list[str]:
    """The two pinned requirements that are installed before everything else."""
    lines = [line.strip() for line in lock_text.splitlines()]
    return [line for line in lines if line.split("==")[0] in ("torch", "torchvision")]


def fingerprint(python_version: str) -> str:
    """Hash of everything that decides what a finished environment holds."""
    digest = hashlib.sha256(python_version.encode())
    for path in (LOCK, Path(__file__).resolve(), ROOT / "setup.py"):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def run(command: list[str], what: str) -> None:
    """Run a command, its output shown, and say in words what failed."""
    print(f"== {what}", flush=True)
    code = subprocess.run(command, check=False).returncode
    if code != 0:
        raise InstallError(f"{what} failed (exit status {code}); the lines above say why. Command: {' '.join(command)}")


def answers(python: Path, code: str) -> bool:
    """Whether this Python exists and runs the code without an error."""
    if not python.exists():
        return False
    return subprocess.run([str(python), "-W", "ignore", "-c", code], capture_output=True, check=False).returncode == 0


def python_in(venv: Path) -> Path:
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def make_venv(venv: Path) -> Path:
    """An environment whose Python starts and has pip; one that does not is made anew.

    Returns:
        its Python.
    """
    python = python_in(venv)
    same_python = f"import pip, sys; assert sys.version_info[:2] == {sys.version_info[:2]}"
    if answers(python, same_python):
        return python
    if venv.exists():
        print(f"== {venv} is half-made or belongs to another Python: made anew", flush=True)
    try:
        run([sys.executable, "-m", "venv", "--clear", str(venv)], f"making {venv}")
    except InstallError as error:
        raise InstallError(
            f"{error}\nOn Debian and Ubuntu the module is a package of its own: apt install python3-venv"
        ) from None
    return python


def install_detectron2(python: Path, site_packages: Path) -> None:
    """Put Detectron2's Python beside the other packages, unless some Detectron2 can already be imported.

    The wheel's hash is verified by pip before anything is unpacked. It is unpacked next to its place and then moved by
    renaming, Detectron2 last, so that an interruption never leaves a part of it where it could be imported.

    Args:
        python: interpreter whose environment is meant.
        site_packages: that environment's folder of packages.
    """
    if answers(python, "import detectron2.modeling"):
        print("== Detectron2 is there already and stays as it is", flush=True)
        return
    ours = f"import importlib.metadata as m; assert 'sal-detectron2==' + m.version('sal-detectron2') == {DETECTRON2!r}"
    anybody_s = "import detectron2; assert detectron2.__file__"  # a folder without __init__.py is only a leftover
    if not answers(python, ours) and answers(python, anybody_s):
        raise InstallError(
            "a detectron2 is installed but `import detectron2.modeling` fails: run it to see why. It is not replaced; "
            "`pip uninstall detectron2 sal-detectron2` removes it, and then this command installs ours"
        )
    with tempfile.TemporaryDirectory(dir=site_packages, prefix=".detectron2-") as folder:
        requirement = Path(folder) / "requirement.txt"
        requirement.write_text(f"{DETECTRON2} --hash=sha256:{DETECTRON2_SHA256}\n", encoding="utf-8")
        target = Path(folder) / "unpacked"
        command = [
            str(python),
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--require-hashes",
            "--only-binary=:all:",
        ]
        command += [*DETECTRON2_TAGS, "--target", str(target), "--requirement", str(requirement)]
        run(command, f"installing Detectron2 ({DETECTRON2}, verified by its hash)")
        # The wheel also holds a top-level folder `tools`, which would shadow other people's and is not needed.
        for part in [*target.glob("*.dist-info"), target / "detectron2"]:
            place = site_packages / part.name
            if place.exists():
                shutil.rmtree(place)
            part.rename(place)


def install_all(venv: Path) -> None:
    """Make, repair or update the environment; nothing is done when it is complete."""
    stamp = venv / STAMP
    version = ".".join(str(part) for part in sys.version_info[:3])
    wanted = fingerprint(version)
    python = python_in(venv)
    if stamp.is_file() and stamp.read_text(encoding="utf-8").strip() == wanted:
        if answers(python, QUICK_CHECK):
            return
        print(f"== {venv} is stamped as complete but does not import: repaired", flush=True)
    stamp.unlink(missing_ok=True)
    free = shutil.disk_usage(venv.parent).free / 2**30
    if not venv.exists() and free < DISK_GIB:
        raise InstallError(f"{free:.1f} GiB are free under {venv.parent}; the environment needs about {DISK_GIB}")
    python = make_venv(venv)
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check"]
    run([*pip, *torch_pair(LOCK.read_text(encoding="utf-8"))], "installing torch and torchvision (5.5 GB, a minute)")
    run([*pip, "--quiet", "--requirement", str(LOCK)], "installing the pinned packages (a minute)")
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site_packages = Path(
        subprocess.run([str(python), "-c", where], capture_output=True, text=True, check=True).stdout.strip()
    )
    install_detectron2(python, site_packages)
    run([*pip, "--quiet", "--no-deps", "--editable", str(ROOT)], "installing this project, editable")
    run([str(python), "-W", "ignore", "-c", QUICK_CHECK], "trying to import everything")
    stamp.write_text(wanted + "\n", encoding="utf-8")
    print(f"== {venv} is complete", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["all", "detectron2"], default="all", help="what to install")
    parser.add_argument("--venv", type=Path, default=VENV, help="environment to make (default: %(default)s)")
    arguments = parser.parse_args(argv)
    reason = unsuitable(sys.version_info[:2], 64 if sys.maxsize > 2**32 else 32)
    if reason:
        print(f"error: {reason}", file=sys.stderr)
        return 2
    try:
        if arguments.what == "detectron2":
            install_detectron2(Path(sys.executable), Path(sysconfig.get_path("purelib")))
        else:
            install_all(arguments.venv.absolute())
    except InstallError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
