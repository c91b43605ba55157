"""Promises about the whole: what imports what, and that every tool starts."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOOLS = sorted((ROOT / "tools").glob("*.py"))
HOSTS = {"detectron2": "detection", "mmseg": "segmentation", "mmengine": "segmentation", "mmcv": "segmentation"}

# Each room and the rooms that it may import, besides its own: imports run one way, downwards.
GROUND = [
    "errors",
    "sizes",
    "position",
    "recompute",
    "relative",
    "attention",
    "vit",
    "pyramid",
    "layer_decay",
    "checkpoint",
]
SHARED = ["data", "engine", "probe", "visualize", "charts", "report"]
HOST_ROOMS = ["detection", "segmentation", "classification"]


def modules(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Full names of every module that a file imports anywhere, inside functions too; not under TYPE_CHECKING."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            node.body = []
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    return names


def room(module: str) -> str:
    parts = module.split(".")
    return parts[0] if parts[0] != "mae_transfer" else ".".join(parts[1:2]) or "mae_transfer"


@pytest.mark.parametrize("package", ["mae_transfer", "pretrain"])
def test_importing_a_package_pulls_in_no_framework(package: str) -> None:
    frameworks = (*HOSTS, "transformers")
    code = f"import sys, {package}; print([name for name in {frameworks} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_frameworks_are_imported_only_below_their_own_folder() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for folder in ("mae_transfer", "pretrain", "tools")
        for path in modules(folder)
        for name in imported(path)
        if name.split(".")[0] in (*HOSTS, "transformers") and HOSTS.get(name.split(".")[0], "nowhere") not in path.parts
    ]
    assert not wrong


def test_imports_run_one_way() -> None:
    wrong = []
    for path in [*modules("mae_transfer"), *modules("pretrain")]:
        relative = path.relative_to(ROOT).with_suffix("")
        own = room(".".join(relative.parts))
        targets = {room(name) for name in imported(path) if name.split(".")[0] in ("mae_transfer", "pretrain")}
        if own in GROUND:
            allowed = set(GROUND[: GROUND.index(own) + 1])
        elif own in SHARED:
            allowed = {*GROUND, *SHARED}
        elif own == "pretrain":
            allowed = {*GROUND, *SHARED, "pretrain"}
        elif own in HOST_ROOMS:
            allowed = {*GROUND, *SHARED, own}
        else:
            continue  # __init__, demo, predict and the like stand above every room
        wrong += [f"{relative} imports {target}" for target in targets - allowed - {own}]
    assert not wrong


@pytest.mark.parametrize("tool", TOOLS, ids=lambda path: path.name)
def test_every_tool_prints_its_help(tool: Path) -> None:
    done = subprocess.run([sys.executable, str(tool), "--help"], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout.lower()


@pytest.mark.parametrize("tool", TOOLS, ids=lambda path: path.name)
def test_tools_are_thin(tool: Path) -> None:
    """A tool parses, calls the library, prints. The installer is the exception: it runs before there is a library."""
    if tool.name == "install.py":
        return
    lines = [line for line in tool.read_text(encoding="utf-8").splitlines() if line.strip()]
    assert len(lines) <= 30
