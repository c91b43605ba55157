"""Detectron2's log on the screen and in the run's folder, for as long as the run lasts."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mae_transfer.errors import RunFailed, UserError

_LOGGERS = ("detectron2", "fvcore", "mae_transfer")
_FORMAT = "[%(asctime)s %(name)s] %(message)s"


@contextmanager
def log_to(folder: Path, rank: int = 0) -> Iterator[None]:
    """Log to ``folder/log.txt`` and, from the first process, to standard output.

    Detectron2's own set-up keeps its files open for good, so that a second run in one process would go on writing to
    the first one's log.
    """
    handlers: list[logging.Handler] = [logging.FileHandler(folder / ("log.txt" if rank == 0 else f"log_{rank}.txt"))]
    if rank == 0:
        handlers.append(logging.StreamHandler(sys.stdout))
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    for handler in handlers:
        handler.addFilter(_is_no_known_failure)
        handler.setFormatter(logging.Formatter(_FORMAT, datefmt="%m-%d %H:%M:%S"))
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.INFO)
        for handler in handlers:
            logging.getLogger(name).addHandler(handler)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
            for handler in handlers:
                logging.getLogger(name).removeHandler(handler)
        for handler in handlers:
            handler.close()


def _is_no_known_failure(record: logging.LogRecord) -> bool:
    """Detectron2 logs the traceback of whatever ends a training; what a user caused is one line, said by the tool."""
    return record.exc_info is None or not isinstance(record.exc_info[1], UserError | RunFailed)
