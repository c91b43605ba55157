"""What the machine has and can do: devices by name, the measured ceiling of matrix products, peak memory of a run."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from mae_transfer.errors import ConfigError

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# (tokens, width, hidden): the two halves of an MLP, where most of a Vision Transformer's operations are. Long enough
# that starting a product does not count, short enough that the whole measurement takes about a second.
_CPU_SHAPES = ((3136, 768, 3072), (3136, 3072, 768))  # 64 images of 49 visible patches through ViT-B
_GPU_SHAPES = ((32768, 1024, 4096), (32768, 4096, 1024))
_SECONDS = 0.4  # for each shape

_measured: dict[tuple[str, str, int, str], float] = {}


def named_device(name: str, key: str) -> torch.device:
    """The device called ``name``; "auto" is a GPU where there is one.

    Args:
        key: what the name was given as, for the error.

    Raises:
        ConfigError: neither auto, cpu nor cuda, or cuda where torch sees no GPU.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"{key}={name}: expected auto, cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"{key}={name}: expected auto, cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"{key}={name}, and torch sees no GPU; use {key}=cpu")
    return device


def measured_gflops(device: torch.device, precision: str) -> float:
    """The fastest matrix product seen on ``device`` at shapes of a Vision Transformer, in GFLOP/s.

    What model FLOP/s utilisation is relative to: of all threads of this process, in the state that the machine is in.
    Measured once a process (about a second) and remembered for the number of threads and torch's float32 setting.

    Args:
        precision: "fp32" (TF32 where torch is set to it), "bf16" or "fp16".
    """
    key = (str(device), precision, torch.get_num_threads(), torch.get_float32_matmul_precision())
    if key not in _measured:
        shapes = _GPU_SHAPES if device.type == "cuda" else _CPU_SHAPES
        _measured[key] = max(_product_gflops(device, _DTYPES[precision], *shape) for shape in shapes)
    return _measured[key]


@torch.no_grad()
def _product_gflops(device: torch.device, dtype: torch.dtype, tokens: int, width: int, hidden: int) -> float:
    # A generator of its own: measuring must not move the random state of the run.
    generator = torch.Generator(device=device).manual_seed(0)
    x = torch.randn(tokens, width, device=device, generator=generator).to(dtype)
    weight = torch.randn(hidden, width, device=device, generator=generator).to(dtype)
    repeat = 8 if device.type == "cuda" else 1  # launches overlap on a GPU
    best, spent = float("inf"), 0.0
    F.linear(x, weight)  # warms up
    _synchronise(device)
    while spent < _SECONDS:
        before = time.perf_counter()
        for _ in range(repeat):
            F.linear(x, weight)
        _synchronise(device)
        seconds = time.perf_counter() - before
        best, spent = min(best, seconds / repeat), spent + seconds
    return 2 * tokens * width * hidden / best / 1e9


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory_in_use(device: torch.device) -> int:
    """Peak so far in bytes: the most that torch held on a GPU, or that this process had resident (data included)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resident_bytes("VmHWM")


def resident_bytes(entry: str) -> int:
    """Resident memory of this process, now (VmRSS) or at its peak (VmHWM); where neither is told, an upper bound."""
    try:
        # Not getrusage: on Linux a process started by a large one inherits that one's peak.
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(entry + ":"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # bytes there, KiB elsewhere
