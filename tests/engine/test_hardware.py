"""The measured ceiling and peak memory."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch

from mae_transfer.engine import hardware
from mae_transfer.engine.hardware import measured_gflops, memory_in_use

CPU = torch.device("cpu")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_ceiling_is_what_a_product_reaches_and_is_measured_once(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "_measured", {})  # runs of other tests have measured in this process
    state = torch.get_rng_state()
    before = time.perf_counter()
    ceiling = measured_gflops(CPU, precision)
    first = time.perf_counter() - before
    assert torch.equal(torch.get_rng_state(), state), "the run's random state must not move"
    before = time.perf_counter()
    assert measured_gflops(CPU, precision) == ceiling
    assert time.perf_counter() - before < first / 10
    # An independent timing of the same kind of product, on a machine that is not quiet: no more than the magnitude.
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    a, b = torch.ones(2048, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    rates = []
    for _ in range(10):
        before = time.perf_counter()
        a @ b
        rates.append(2 * 2048 * 1024 * 1024 / (time.perf_counter() - before) / 1e9)
    assert max(rates) / 4 < ceiling < max(rates) * 4


def test_another_number_of_threads_is_measured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(hardware, "_measured", {})
    monkeypatch.setattr(hardware, "_product_gflops", lambda *arguments: calls.append(arguments) or 1.0)
    measured_gflops(CPU, "fp32")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    measured_gflops(CPU, "fp32")
    assert len(calls) == 4  # two shapes, twice


def test_peak_memory_sees_what_was_held_and_not_what_the_parent_held() -> None:
    before = memory_in_use(CPU)
    block = torch.ones(before // 4 + 64 * 2**20)  # four bytes each: more than everything so far
    assert memory_in_use(CPU) >= before + 64 * 2**20
    assert block.numel()
    code = "import torch; from mae_transfer.engine.hardware import memory_in_use as m; print(m(torch.device('cpu')))"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    if sys.platform == "linux":
        assert int(child.stdout) < memory_in_use(CPU) - 32 * 2**20
