"""What ``make demo`` runs, in order: the commands a user would type, on scenes that it composes itself.

Every stage is one of the tools in a process of its own. Finished stages are remembered in the output folder and not run
again; one that was interrupted goes on where its tool can.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from tqdm import tqdm

from mae_transfer.demo_page import build_page
from mae_transfer.demo_plan import ROOT, SIZES, Layout, Record, Stage, shown, stages
from mae_transfer.engine.files import write_text
from mae_transfer.errors import ConfigError, RunFailed


def read_record(layout: Layout, stage: Stage) -> Record:
    """The record of a stage in this folder; a new one where there is none.

    Raises:
        ConfigError: the folder's stage was run with another command: another size, or another version of the demo.
    """
    path = layout.record(stage.name)
    if not path.is_file():
        return Record(command=stage.command)
    content = json.loads(path.read_text(encoding="utf-8"))
    record = Record(**{**content, "command": tuple(content["command"])})
    if record.command != stage.command:
        raise ConfigError(
            f"{layout.out} holds a demo made with other settings (stage {stage.name}). Remove it, or name another "
            "folder: make demo OUT=FOLDER"
        )
    return record


def is_done(stage: Stage, record: Record) -> bool:
    """Whether there is nothing left to do; a stage that cannot be continued writes its product whole or not at all."""
    return stage.product.exists() and (record.finished or stage.started is None)


def run_stage(stage: Stage, layout: Layout, on_progress: Callable[[float], None]) -> Record:
    """Run a stage to its end, or not at all when its record says that it is done.

    Raises:
        RunFailed: its command failed; the end of its log is in the message.
    """
    record = read_record(layout, stage)
    if is_done(stage, record):
        return record
    begun = stage.started is not None and stage.started.exists() and any(stage.started.iterdir())
    command = [sys.executable, *stage.command, *(stage.resume if begun else ())]
    log = layout.log(stage.name)
    for folder in (log.parent, layout.record(stage.name).parent):
        folder.mkdir(parents=True, exist_ok=True)
    # Frameworks' warnings belong in the log; PYTHONPATH lets the tools run from a checkout that was not installed.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    begin = time.monotonic()
    code = None
    with log.open("a", encoding="utf-8") as stream:
        stream.write(f"$ {shown(command[1:])}\n")
        stream.flush()
        with subprocess.Popen(command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, env=environment) as process:
            try:
                while code is None:
                    try:
                        code = process.wait(timeout=1)
                    except subprocess.TimeoutExpired:
                        on_progress(min(stage.progress(), 1.0))
            finally:
                if process.poll() is None:
                    process.send_signal(signal.SIGTERM)  # the tools save and stop
                spent = record.seconds + time.monotonic() - begin
                record = replace(record, seconds=spent, finished=code == 0)
                write_text(layout.record(stage.name), json.dumps(asdict(record), indent=1) + "\n")
    if code != 0:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        raise RunFailed(f"{stage.title} ended with exit status {code}. The end of {log}:\n{tail}")
    if not stage.product.exists():
        raise RunFailed(f"{stage.title} ended well but left no {stage.product}; see {log}")
    return record


def run_demo(out: Path, size_name: str) -> Path:
    """All stages, then the page.

    Returns:
        where the page is.

    Raises:
        ConfigError: `out` holds something else. RunFailed: a stage failed.
    """
    layout = Layout(out=out.absolute())
    size = SIZES[size_name]
    todo = stages(layout, size)
    if layout.out.exists():
        foreign = not layout.out.is_dir() or (any(layout.out.iterdir()) and not (layout.out / "stages").is_dir())
        if foreign:
            raise ConfigError(f"{out} exists and is not a demo's folder; name another: make demo OUT=FOLDER")
        for stage in todo:
            read_record(layout, stage)  # refuses before anything is run
    total = sum(stage.seconds for stage in todo)
    records = []
    with tqdm(
        total=total,
        bar_format="{percentage:3.0f}% |{bar}| {elapsed}, about {remaining} left · {desc}",
        mininterval=0.5 if sys.stderr.isatty() else 30,
        smoothing=0,  # the average speed so far: stages differ in how evenly they go
        ncols=110,
    ) as bar:
        before = 0.0
        for number, stage in enumerate(todo):
            bar.set_description_str(f"{number + 1}/{len(todo)} {stage.title}", refresh=False)

            def advance(part: float, stage: Stage = stage, before: float = before) -> None:
                bar.update(max(0.0, before + part * stage.seconds - bar.n))
                if sys.stderr.isatty():
                    bar.refresh()  # the clock goes on while the bar stands still

            known = is_done(stage, read_record(layout, stage))
            records.append(run_stage(stage, layout, advance))
            before += stage.seconds
            if known:  # not done now, so no measure of this run's speed
                bar.initial += before - bar.n
            advance(0.0, before=before)
    build_page(layout, size, todo, records).write(layout.report)
    return layout.report


def main(argv: Sequence[str] | None = None) -> int:
    """`tools/demo.py`."""
    parser = argparse.ArgumentParser(
        description="The whole chain on scenes composed here: pretrain, convert, Mask R-CNN and UperNet from the "
        "pretrained encoder and from random weights, and one HTML page with all of it. Started again, it goes on."
    )
    parser.add_argument(
        "--size", choices=sorted(SIZES), default="full", help="full: fifteen to twenty minutes on two cores"
    )
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="folder to write (default: %(default)s)")
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # both ways of being stopped stop the running tool too
    try:
        report = run_demo(arguments.out, arguments.size)
    except KeyboardInterrupt:
        print(f"\nstopped; start the same command again to go on in {arguments.out}", file=sys.stderr)
        return 128 + signal.SIGINT
    print(f"report: {report}")
    return 0
