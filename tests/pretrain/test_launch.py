"""The launch scripts, started as a user or a cluster does, with processes on this machine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mae_transfer.engine.checkpoints import all_checkpoints
from tests.pictures import write_pictures
from tests.pretrain.small import ARGUMENTS, children, timeless, wait_for

LAUNCH = Path(__file__).parents[2] / "tools" / "launch"
STEPS = 400


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"), 12)


def start(script: str, pictures: Path, run: Path, **environment: str) -> subprocess.Popen[str]:
    more = (f"data.path={pictures}", f"run.dir={run}", f"train.steps={STEPS}", "checkpoint.every_steps=50")
    return subprocess.Popen(
        [str(LAUNCH / script), "configs/pretrain/tiny.yaml", *ARGUMENTS, *more, "train.distributed=fsdp2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, **environment},
        start_new_session=True,
    )


def assert_complete(run: Path) -> None:
    assert [record["step"] for record in timeless(run / "metrics.jsonl")] == list(range(1, STEPS + 1))
    assert (run / "encoder.safetensors").is_file()


def test_one_node_stops_at_sigterm_and_goes_on(pictures: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = start("one_node.sh", pictures, run, PROCESSES="2")
    wait_for(lambda: (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size > 0, first)
    first.terminate()
    output, _ = first.communicate(timeout=60)
    assert first.returncode != 0 and "stopped by SIGTERM, state saved" in output, output
    done = len(timeless(run / "metrics.jsonl"))
    assert 0 < done < STEPS
    assert all_checkpoints(run / "checkpoints")[-1].name == f"step-{done:08d}"
    second = start("one_node.sh", pictures, run, PROCESSES="2")
    output, _ = second.communicate(timeout=120)
    assert second.returncode == 0 and f"continuing from step {done} of {STEPS}" in output, output
    assert_complete(run)


def test_two_machines_find_each_other_and_survive_a_death(pictures: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        head = f"127.0.0.1:{free.getsockname()[1]}"
    machines = [
        start("several_nodes.sh", pictures, run, PROCESSES="1", NODES="2", HEAD=head, JOB="test") for _ in range(2)
    ]
    wait_for(lambda: all_checkpoints(run / "checkpoints"), *machines)
    os.kill(children(machines[1].pid)[0], signal.SIGKILL)
    outputs = [machine.communicate(timeout=180)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], "\n".join(outputs)
    assert "continuing from step" in "".join(outputs)
    assert_complete(run)


def test_slurm_requeues_after_saving(pictures: Path, tmp_path: Path) -> None:
    """With stand-ins for SLURM's commands: what the script asks of them, and that the run is saved before."""
    run, log, commands = tmp_path / "run", tmp_path / "log", tmp_path / "commands"
    commands.mkdir()
    stand_ins = {
        "srun": f'shift; echo $$ > {tmp_path}/step; exec "$@"',
        "scancel": f'echo "scancel $@" >> {log}; kill -TERM "$(cat {tmp_path}/step)"',
        "scontrol": f'case "$1" in show) echo 127.0.0.1;; *) echo "scontrol $@" >> {log};; esac',
    }
    for name, body in stand_ins.items():
        (commands / name).write_text(f"#!/bin/bash\n{body}\n")
        (commands / name).chmod(0o755)
    job = start(
        "slurm.sbatch",
        pictures,
        run,
        PATH=f"{commands}:{os.environ['PATH']}",
        SLURM_JOB_ID="7",
        SLURM_JOB_NODELIST="here",
        PROCESSES="1",
    )
    wait_for(lambda: (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size > 0, job)
    job.send_signal(signal.SIGUSR1)
    output, _ = job.communicate(timeout=90)
    assert job.returncode == 0 and "requeued" in output, output
    assert log.read_text().splitlines() == ["scancel --signal=TERM 7", "scontrol requeue 7"]
    assert len(all_checkpoints(run / "checkpoints")) == 1
