"""Logging to Weights & Biases: with a stand-in of the calls that are used, and with the real one where installed."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mae_transfer.engine.metrics import LogConfig, MetricsLog, read_metrics
from mae_transfer.errors import ConfigError


class Server(ModuleType):
    """Remembers runs by id as the service does; a step is taken once."""

    class Error(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("wandb")
        self.rows: dict[str, dict[int, dict[str, float]]] = {}
        self.calls: list[dict[str, Any]] = []
        self.finished = 0

    def init(self, **arguments: Any) -> Any:
        self.calls.append(arguments)
        rows, server = self.rows.setdefault(arguments["id"], {}), self

        class Run:
            step = max(rows, default=-1) + 1

            def log(self, numbers: dict[str, float], *, step: int) -> None:
                assert step not in rows, "W&B ignores a step that it has, with a warning"
                rows[step] = numbers

            def finish(self) -> None:
                server.finished += 1

        return Run()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    server = Server()
    monkeypatch.setitem(sys.modules, "wandb", server)
    return server


def write(folder: Path, steps: range, *, last_step: int = 0) -> None:
    log = MetricsLog(folder / "metrics.jsonl", last_step=last_step, wandb="mae", config={"train": {"batch_size": 8}})
    for step in steps:
        log.write({"step": step, "loss": 1 / step, "note": "text"})
    log.close()


def test_a_resumed_run_goes_on_in_the_same_wandb_run(server: Server, tmp_path: Path) -> None:
    write(tmp_path, range(1, 6))
    write(tmp_path, range(4, 9), last_step=3)  # steps 4 and 5 were lost and are done again
    assert len(server.rows) == 1 and server.finished == 2
    (run_id,) = server.rows
    assert (tmp_path / "wandb_id.txt").read_text() == f"{run_id}\n"
    assert server.rows[run_id] == {step: {"loss": 1 / step} for step in range(1, 9)}
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, 9))
    call = server.calls[0]
    assert call["project"] == "mae" and call["dir"] == str(tmp_path) and call["config"] == {"train": {"batch_size": 8}}


def test_another_folder_is_another_run(server: Server, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, range(1, 3))
    assert len(server.rows) == 2


def test_what_wandb_refuses_is_said(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**arguments: Any) -> None:
        raise Server.Error("No API key configured")

    monkeypatch.setattr(server, "init", refuse)
    with pytest.raises(ConfigError, match=r"No API key configured.*WANDB_MODE=offline"):
        MetricsLog(tmp_path / "metrics.jsonl", wandb="mae")


def test_not_installed_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="pip install wandb"):
        MetricsLog(tmp_path / "metrics.jsonl", wandb="mae")
    assert not list(tmp_path.iterdir())
    MetricsLog(tmp_path / "metrics.jsonl").close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_real_one_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="Weights & Biases is optional")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    write(tmp_path, range(1, 4))
    write(tmp_path, range(3, 6), last_step=2)
    run_id = (tmp_path / "wandb_id.txt").read_text().strip()
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))) >= 1


@pytest.mark.parametrize("bad", [{"wandb": ""}, {"peak_gflops": 0.0}])
def test_bad_values_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"log\."):
        LogConfig(**bad)
