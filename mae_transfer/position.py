"""Position embeddings: the sin-cos tables of MAE and the one resize that every host uses.

Rows of an absolute table are the cls row, then the grid row by row. Resizing is bicubic with
``align_corners=False`` and no antialiasing, as in the official MAE code, Detectron2 and MMSegmentation; results agree
with theirs to rounding. The computation is done in float32 whatever the table's dtype.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mae_transfer.errors import CheckpointError, ConfigError

Grid = tuple[int, int]


def to_pair(value: int | tuple[int, int] | list[int], name: str) -> tuple[int, int]:
    """``value`` as (height, width): an int means square.

    Raises:
        ConfigError: not one or two positive whole numbers.
    """
    pair = tuple(value) if isinstance(value, (tuple, list)) or hasattr(value, "__iter__") else (value, value)
    if len(pair) != 2 or not all(isinstance(n, int) and n > 0 for n in pair):
        raise ConfigError(f"{name} is {value!r}; expected a positive whole number or (height, width)")
    return (int(pair[0]), int(pair[1]))


def grid_of(image_size: tuple[int, int], patch_size: tuple[int, int]) -> Grid:
    """(h, w) patches of an image of (H, W) pixels.

    Raises:
        ConfigError: the image is not a whole number of patches.
    """
    (height, width), (p_h, p_w) = image_size, patch_size
    if height % p_h or width % p_w:
        raise ConfigError(
            f"image size {height}x{width} is not a whole number of {p_h}x{p_w} patches; "
            f"nearest that is: {max(1, round(height / p_h)) * p_h}x{max(1, round(width / p_w)) * p_w}"
        )
    return height // p_h, width // p_w


def sincos_2d(width: int, grid: Grid, *, cls_token: bool = True) -> Tensor:
    """Fixed 2-D sin-cos table of MAE (Section 3 and the released code).

    The first half of the channels codes the column, the second half the row; each half is sines, then cosines,
    of frequencies 10000^(-2i/half). The cls row is zero. Computed in float64 and rounded once.

    Args:
        width: D, divisible by 4.
        grid: (h, w) patches.
        cls_token: put the zero row for the cls token first.

    Returns:
        (1, 1 + h·w, D), or (1, h·w, D) without cls row; float32.

    Raises:
        ConfigError: the width is not divisible by 4.
    """
    if width % 4:
        raise ConfigError(f"sin-cos positions need a width divisible by 4, got {width}")
    frequency = 1.0 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width / 4))  # (D/4,)
    h, w = grid

    def encode(positions: Tensor) -> Tensor:  # (n,) -> (n, D/2)
        angle = positions[:, None] * frequency
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    columns = encode(torch.arange(w, dtype=torch.float64))[None].expand(h, w, width // 2)
    rows = encode(torch.arange(h, dtype=torch.float64))[:, None].expand(h, w, width // 2)
    table = torch.cat([columns, rows], dim=2).reshape(1, h * w, width)  # (1, L, D)
    if cls_token:
        table = torch.cat([torch.zeros(1, 1, width, dtype=torch.float64), table], dim=1)
    return table.float()


def rotary_2d(grid: Grid, head_dim: int, *, base: float, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Cosines and sines by which DINOv3 rotates queries and keys (Siméoni et al. 2025; Su et al. 2021).

    A patch's place is its centre, rows and columns each from -1 to 1 over the image, whatever the grid. Channels pair
    up across the two halves of a head; in each half the first part turns with the row, the second with the column, by
    2π·base^(-4i/d) a unit.

    Args:
        grid: (h, w) patches.
        head_dim: d, divisible by 4.

    Returns:
        Two (h·w, d), float32.
    """
    frequency = 1 / base ** torch.arange(0, 1, 4 / head_dim, dtype=torch.float32, device=device)  # (d/4,)
    rows, columns = (2 * (torch.arange(0.5, length, device=device) / length) - 1 for length in grid)
    places = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).reshape(-1, 2)  # (L, 2)
    angles = (2 * math.pi * places[:, :, None] * frequency).flatten(1).tile(2)  # (L, 2, d/4) -> (L, d/2) -> (L, d)
    return angles.cos(), angles.sin()


def resize_pos_embed(pos_embed: Tensor, grid_from: Grid, grid_to: Grid) -> Tensor:
    """Resize an absolute table to another grid; identity (the same tensor) at its own grid.

    Args:
        pos_embed: (1, 1 + h·w, D) with the cls row first.
        grid_from: (h, w) of the table.
        grid_to: (h', w') wanted.

    Returns:
        (1, 1 + h'·w', D); the cls row untouched.

    Raises:
        CheckpointError: the table's length does not fit ``grid_from``.
    """
    h, w = grid_from
    if pos_embed.shape[1] != 1 + h * w:
        raise CheckpointError(
            f"position embedding has {pos_embed.shape[1]} rows; a grid of {h}x{w} needs {1 + h * w} (cls row first)"
        )
    if grid_from == grid_to:
        return pos_embed
    cls_row, rows = pos_embed[:, :1], pos_embed[:, 1:]
    width = pos_embed.shape[2]
    image = rows.reshape(1, h, w, width).permute(0, 3, 1, 2)  # (1, D, h, w)
    image = F.interpolate(image.float(), size=grid_to, mode="bicubic", align_corners=False, antialias=False)
    rows = image.to(rows.dtype).permute(0, 2, 3, 1).reshape(1, -1, width)  # (1, h'·w', D)
    return torch.cat([cls_row, rows], dim=1)


def resize_decomposed(table: Tensor, length: int) -> Tensor:
    """Resize a decomposed relative table (2s-1, d) of ViTDet to (``length``, d), linearly as Detectron2 does."""
    if table.shape[0] == length:
        return table
    line = table.float().T[None]  # (1, d, 2s-1)
    return F.interpolate(line, size=length, mode="linear", align_corners=False)[0].T.to(table.dtype)


def resize_bias_table(table: Tensor, grid_from: Grid, grid_to: Grid) -> Tensor:
    """Resize a relative-position bias table ((2h-1)(2w-1) [+ 3], heads) to another grid, bicubically.

    The three rows of BEiT's cls token (cls→patch, patch→cls, cls→cls), where present, are kept.
    """
    (h, w), (new_h, new_w) = grid_from, grid_to
    num_rows = (2 * h - 1) * (2 * w - 1)
    extra = table.shape[0] - num_rows
    if extra not in (0, 3):
        raise CheckpointError(
            f"relative-position table has {table.shape[0]} rows; a grid of {h}x{w} needs {num_rows} or {num_rows + 3}"
        )
    if grid_from == grid_to:
        return table
    heads = table.shape[1]
    image = table[:num_rows].float().T.reshape(1, heads, 2 * h - 1, 2 * w - 1)
    image = F.interpolate(image, size=(2 * new_h - 1, 2 * new_w - 1), mode="bicubic", align_corners=False)
    rows = image.reshape(heads, -1).T.to(table.dtype)
    return torch.cat([rows, table[num_rows:]]) if extra else rows


class ResizeCache:
    """A table resized once for each size that is asked for, as long as nobody trains it.

    Wherever a gradient could reach the table, and while a compiler or an exporter reads the operators, the resize is
    computed as it is written. What is kept belongs to one tensor in one version (torch counts changes in place, such
    as an optimizer's), so a table that was trained, loaded or moved since is resized anew.
    """

    _MOST = 8  # sizes, for evaluation at several

    def __init__(self) -> None:
        self._kept: dict[tuple[Any, ...], tuple[weakref.ref[Tensor], tuple[Any, ...], Tensor]] = {}

    def __call__(self, resize: Callable[..., Tensor], table: Tensor, *sizes: Grid | int) -> Tensor:
        """``resize(table, *sizes)``, which must be a function of these alone."""
        if not self._may_keep(table):
            return resize(table, *sizes)
        stamp = (table._version, table.data_ptr(), table.dtype)
        if sizes in self._kept:
            owner, stamp_then, resized = self._kept[sizes]
            if owner() is table and stamp_then == stamp:
                return resized
        # Not a tensor of inference mode: it may be wanted outside of it next.
        with torch.inference_mode(False), torch.no_grad():
            resized = resize(table, *sizes)
        if resized is table:  # of that size already
            return table
        self._kept.pop(sizes, None)
        while len(self._kept) >= self._MOST:
            del self._kept[next(iter(self._kept))]
        self._kept[sizes] = (weakref.ref(table), stamp, resized)
        return resized

    @staticmethod
    def _may_keep(table: Tensor) -> bool:
        trained = torch.is_grad_enabled() and table.requires_grad
        read = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
        return not (trained or read or table.is_inference()) and type(table) in (Tensor, torch.nn.Parameter)

    def __reduce__(self) -> tuple[type[ResizeCache], tuple[()]]:
        return ResizeCache, ()  # a copy of a model begins with nothing kept
