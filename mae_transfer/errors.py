"""What a user can cause, as errors that say what was given, what was expected and what to do.

Every error here is a ``ValueError``: a caller may catch one kind, or all of them as ``UserError``.
The tools turn them into one line on standard error and exit status 2 (``run_tool``).
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable, Iterable
from types import ModuleType

EXIT_BAD_INPUT = 2
EXIT_FAILED_RUN = 1
EXIT_PREEMPTED = 75  # saved on SIGTERM or SIGUSR1; start again to go on (EX_TEMPFAIL of sysexits.h)


class UserError(ValueError):
    """Something the user gave cannot be used; the message says what, what was expected, and what to do."""


class ConfigError(UserError):
    """A configuration key or value."""


class CheckpointError(UserError):
    """A checkpoint file: unreadable, of an unknown family, or not matching the model."""


class DataError(UserError):
    """Images, annotations or the folders that should hold them."""


class MissingDependencyError(UserError, ImportError):
    """An optional framework is needed here and is not installed."""


class RunFailed(RuntimeError):
    """A run that started and could not go on (loss not finite, too many unreadable images …): exit status 1."""


def nearest(key: str, valid: Iterable[str]) -> str | None:
    """The valid key closest in spelling to ``key``, or None when nothing is close.

    >>> nearest("train.epoch", ["train.epochs", "optim.base_lr"])
    'train.epochs'
    """
    candidates = sorted(valid)
    close = difflib.get_close_matches(key, candidates, n=1, cutoff=0.6)
    if close:
        return close[0]
    # "epochs" for "train.epochs": the right leaf without its section, or with the wrong one.
    leaf = key.rsplit(".", 1)[-1]
    same_leaf = [name for name in candidates if name.rsplit(".", 1)[-1] == leaf]
    return same_leaf[0] if same_leaf else None


def unknown_key(key: str, valid: Iterable[str]) -> ConfigError:
    """The error for a key that does not exist, naming the nearest one that does."""
    valid = list(valid)
    guess = nearest(key, valid)
    if guess:
        return ConfigError(f"unknown key {key}; did you mean {guess}?")
    return ConfigError(f"unknown key {key}; valid keys are: {', '.join(sorted(valid))}")


_INSTALL = {
    "detection": "python tools/install.py detectron2 && pip install -e '.[detection]'",
    "segmentation": "pip install -e '.[segmentation]'",
}


def require(module: str, extra: str) -> ModuleType:
    """Import ``module`` or say how to install the ``extra`` that brings it.

    Raises:
        MissingDependencyError: the module itself is absent. A module that is present but fails inside
            its own imports raises its own error: hiding that would send the user the wrong way.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        command = _INSTALL.get(extra, f"pip install -e '.[{extra}]'")
        raise MissingDependencyError(
            f"{module} is needed for this and is not installed. Install it with: {command}"
        ) from error


def run_tool(main: Callable[[list[str] | None], int | None], argv: list[str] | None = None) -> int:
    """Run a tool's ``main`` and turn what a user caused into a line on standard error and an exit status.

    Returns:
        ``main``'s own status, 2 for a ``UserError``, 1 for a ``RunFailed``. Anything else is a defect of ours and
        keeps its traceback.
    """
    try:
        return main(argv) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except RunFailed as error:
        print(f"failed: {error}", file=sys.stderr)
        return EXIT_FAILED_RUN
