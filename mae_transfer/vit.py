"""The Vision Transformer: the one encoder that pretraining teaches and every host carries.

State-dict keys are those of the published MAE checkpoints (Dosovitskiy et al. 2021; He et al. 2022), so an official
file loads with ``strict=True``. Read from top to bottom: patch embedding, block, transformer.

Shapes: N batch, C channels, H W image, (p, p) patch, (h, w) grid, L = h·w patches, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mae_transfer.attention import Attention, WindowAttention
from mae_transfer.errors import ConfigError
from mae_transfer.position import Grid, ResizeCache, grid_of, resize_pos_embed, sincos_2d, to_pair
from mae_transfer.recompute import gelu_linear, norm_linear
from mae_transfer.sizes import get_size


class PatchEmbed(nn.Module):
    """Cut an image into patches and project each; the weight is a convolution's, (D, C, p, p)."""

    def __init__(self, patch_size: tuple[int, int], num_channels: int, width: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(num_channels, width, kernel_size=patch_size, stride=patch_size)

    def cut(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, L, C·p·p), values ordered channel, row, column as in the weight.

        Raises:
            ConfigError: other channels than the weight's, or H or W not a whole number of patches.
        """
        n, channels, height, width = images.shape
        if channels != self.proj.in_channels:
            raise ConfigError(f"images have {channels} channels; this model was built for {self.proj.in_channels}")
        h, w = grid_of((height, width), self.patch_size)
        p_h, p_w = self.patch_size
        patches = images.reshape(n, channels, h, p_h, w, p_w).permute(0, 2, 4, 1, 3, 5)  # (N, h, w, C, p, p)
        return patches.reshape(n, h * w, channels * p_h * p_w)

    def embed(self, patches: Tensor) -> Tensor:
        """Project patches as cut by ``cut``: (N, any, C·p·p) -> (N, any, D)."""
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, L, D)."""
        return self.embed(self.cut(images))


class Mlp(nn.Module):
    """D -> ratio·D -> D with GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor, norm: nn.Module | None = None) -> Tensor:
        """(N, T, D) -> (N, T, D) of x, or of norm(x) where the layer before is given (see ``recompute``)."""
        hidden = self.fc1(x) if norm is None else norm_linear(x, norm, self.fc1)  # (N, T, ratio·D)
        return gelu_linear(hidden, self.fc2)


class SwiGlu(nn.Module):
    """D -> H -> D, gated: SiLU of one half of the projection times the other (Shazeer 2020; DINOv2's giant).

    The two halves lie in one ``fc1`` of 2H outputs, the gate first.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 2 * hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor, norm: nn.Module | None = None) -> Tensor:
        """(N, T, D) -> (N, T, D) of x, or of norm(x)."""
        hidden = self.fc1(x) if norm is None else norm_linear(x, norm, self.fc1)  # (N, T, 2H)
        gate, value = hidden.chunk(2, dim=-1)
        return self.fc2(F.silu(gate) * value)


FEED_FORWARD: dict[str, type[Mlp] | type[SwiGlu]] = {"mlp": Mlp, "swiglu": SwiGlu}


class LayerScale(nn.Module):
    """Multiply each channel by a learned factor (Touvron et al. 2021)."""

    def __init__(self, width: int, value: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), float(value)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class DropPath(nn.Module):
    """Stochastic depth: drop a residual branch for whole samples, scaling the kept ones (Huang et al. 2016)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        keep = x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(1 - self.rate)
        return x * (keep / (1 - self.rate))

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


class Block(nn.Module):
    """Pre-norm transformer block; it is handed its attention and knows nothing of windows or relative position.

    With ``checkpointing`` the activations inside are recomputed in the backward pass. The block does that itself, so
    that whatever is put around it (compilation, sharding) goes around the recomputation too.
    """

    def __init__(
        self,
        attention: nn.Module,
        width: int,
        *,
        mlp_ratio: float = 4.0,
        ffn: str = "mlp",
        norm_eps: float = 1e-6,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.attn = attention
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = FEED_FORWARD[ffn](width, round(width * mlp_ratio))
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, grid: Grid | None = None) -> Tensor:
        """(N, T, D) -> (N, T, D)."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self.compute, x, grid, use_reentrant=False)
        return self.compute(x, grid)

    def compute(self, x: Tensor, grid: Grid | None) -> Tensor:
        """(N, T, D) -> (N, T, D)."""
        x = x + self.drop_path(self.ls1(self.attn(x, grid, norm=self.norm1)))
        return x + self.drop_path(self.ls2(self.mlp(x, norm=self.norm2)))


class VisionTransformer(nn.Module):
    """Vision Transformer with the keys of the published MAE checkpoints.

    Args:
        image_size: (H, W) or side in pixels for which ``pos_embed`` is made; other sizes resize it on the fly.
        patch_size: (p, p) or side in pixels.
        in_channels: C.
        width, depth, num_heads, mlp_ratio, qkv_bias, norm_eps: of the transformer.
        ffn: "mlp" or "swiglu".
        drop_path: rate of the last block; earlier ones rise linearly from 0.
        layer_scale: initial value of the layer scale, or None for none.
        cls_token: carry a cls token. ``pos_embed`` keeps its cls row without one, so that files fit.
        num_registers: tokens between cls token and patches that stand for no place (Darcet et al. 2024).
        absolute_positions: add ``pos_embed``; models of relative or rotary positions go without.
        rope_base: rotary positions (DINOv3), with this base of their frequencies; None for none.
        final_norm: LayerNorm after the last block (``forward_features``); hosts that tap before it build without.
        window_size: side of the attention windows in patches; 0 for global attention everywhere.
        global_blocks: with windows, the blocks that stay global.
        relative_position: None, "decomposed" (ViTDet) or "bias" (BEiT, Li et al.).
        attention_image_size: size whose grid the global blocks' relative tables span; ``image_size`` by default.
        checkpointing: recompute each block's activations in the backward pass (memory for time).

    Raises:
        ConfigError: numbers that do not fit together.
    """

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_channels: int = 3,
        width: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        ffn: str = "mlp",
        qkv_bias: bool = True,
        norm_eps: float = 1e-6,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        cls_token: bool = True,
        num_registers: int = 0,
        absolute_positions: bool = True,
        rope_base: float | None = None,
        final_norm: bool = True,
        window_size: int = 0,
        global_blocks: Sequence[int] = (),
        relative_position: str | None = None,
        attention_image_size: int | tuple[int, int] | None = None,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.image_size = to_pair(image_size, "image_size")
        self.patch_size = to_pair(patch_size, "patch_size")
        self.grid = grid_of(self.image_size, self.patch_size)
        self.num_channels = in_channels
        self.width, self.depth, self.num_heads = width, depth, num_heads
        self.checkpointing = checkpointing
        self.mlp_ratio, self.ffn, self.norm_eps = mlp_ratio, ffn, norm_eps
        self.window_size, self.global_blocks = window_size, tuple(global_blocks)
        self.relative_position, self.rope_base = relative_position, rope_base
        if ffn not in FEED_FORWARD:
            raise ConfigError(f"ffn is {ffn!r}; expected one of {', '.join(FEED_FORWARD)}")
        if num_registers and (relative_position is not None or window_size or not cls_token):
            raise ConfigError("register tokens go with a cls token and global attention without relative position")
        if window_size and rope_base is not None:
            raise ConfigError("rotary positions and windowed attention exclude one another")
        if window_size and cls_token:
            raise ConfigError("windowed attention has no place for a cls token; build with cls_token=False")
        outside = [block for block in global_blocks if not 0 <= block < depth]
        if outside:
            raise ConfigError(f"global_blocks {outside} do not exist in a model of {depth} blocks (0 to {depth - 1})")

        self.patch_embed = PatchEmbed(self.patch_size, in_channels, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if cls_token else None
        self.register_tokens = nn.Parameter(torch.zeros(1, num_registers, width)) if num_registers else None
        self.num_prefix_tokens = int(cls_token) + num_registers  # tokens before the patches
        self.pos_embed = nn.Parameter(sincos_2d(width, self.grid)) if absolute_positions else None
        self._resized = ResizeCache()

        table_size = self.image_size
        if attention_image_size is not None:
            table_size = to_pair(attention_image_size, "attention_image_size")
        self.attention_image_size = table_size
        table_grid = grid_of(table_size, self.patch_size)

        def attention(block: int) -> Attention:
            if window_size and block not in global_blocks:
                return WindowAttention(
                    width, num_heads, window_size=window_size, qkv_bias=qkv_bias, relative=relative_position
                )
            return Attention(
                width,
                num_heads,
                qkv_bias=qkv_bias,
                relative=relative_position,
                table_grid=table_grid,
                cls_token=cls_token,
                rope_base=rope_base,
            )

        self.blocks = nn.ModuleList(
            Block(
                attention(block),
                width,
                mlp_ratio=mlp_ratio,
                ffn=ffn,
                norm_eps=norm_eps,
                drop_path=drop_path * block / max(depth - 1, 1),
                layer_scale=layer_scale,
                checkpointing=checkpointing,
            )
            for block in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=norm_eps) if final_norm else nn.Identity()
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The paper's initialisation (Appendix A.1): Xavier uniform on every linear layer and on the flattened patch
        projection, whose bias keeps the convolution's default as in the released code; cls token N(0, 0.02)."""
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(self.width, -1))
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=0.02)
        if self.register_tokens is not None:
            nn.init.normal_(self.register_tokens, std=0.02)
        self.apply(init_linear)

    # The steps of the encoder.

    def add_positions(self, x: Tensor, grid: Grid) -> Tensor:
        """Add the patch rows of ``pos_embed`` to (N, L, D), resized where ``grid`` is not the native one."""
        if self.pos_embed is None:
            return x
        return x + self.position_rows(grid)[:, 1:]

    def position_rows(self, grid: Grid) -> Tensor:
        """(1, 1 + h·w, D) for any grid, of a model that has such a table."""
        assert self.pos_embed is not None
        if grid == self.grid:
            return self.pos_embed
        return self._resized(resize_pos_embed, self.pos_embed, self.grid, grid)

    def prepend_cls(self, x: Tensor) -> Tensor:
        """(N, T, D) -> (N, 1 + R + T, D): cls token and registers, which are of no place; as is where there is none."""
        if self.cls_token is None:
            return x
        cls = self.cls_token if self.pos_embed is None else self.cls_token + self.pos_embed[:, :1]
        prefix = [cls] if self.register_tokens is None else [cls, self.register_tokens]
        return torch.cat([*(tokens.to(x.dtype).expand(x.shape[0], -1, -1) for tokens in prefix), x], dim=1)

    def embed(self, images: Tensor) -> tuple[Tensor, Grid]:
        """(N, C, H, W) -> tokens (N, [1 + R +] L, D) ready for the blocks, and their grid."""
        grid = grid_of((images.shape[2], images.shape[3]), self.patch_size)
        x = self.patch_embed(images)  # (N, L, D)
        return self.prepend_cls(self.add_positions(x, grid)), grid

    def run_blocks(self, x: Tensor, grid: Grid, *, start: int = 0, stop: int | None = None) -> Tensor:
        """Blocks ``start`` to ``stop`` (not itself; None for all that follow): (N, T, D) -> (N, T, D)."""
        for index in range(start, self.depth if stop is None else stop):
            x = self.blocks[index](x, grid)
        return x

    # What hosts call.

    def forward_features(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, 1 + R + L, D), cls first, then registers, after the final norm. (N, L, D) without a cls
        token."""
        x, grid = self.embed(images)
        return self.norm(self.run_blocks(x, grid))

    def forward_taps(self, images: Tensor, indices: Sequence[int]) -> list[Tensor]:
        """Feature maps after the named blocks, before any norm, cls and registers dropped.

        Args:
            images: (N, C, H, W), H and W multiples of the patch (hosts pad).
            indices: 0-based blocks, in the order wanted; blocks behind the last are not run.

        Returns:
            One (N, D, h, w) for each index.

        Raises:
            ConfigError: an index outside the model, or H or W not a whole number of patches.
        """
        outside = [index for index in indices if not 0 <= index < self.depth]
        if outside or not indices:
            raise ConfigError(f"taps {list(indices)}: expected blocks between 0 and {self.depth - 1}")
        x, grid = self.embed(images)
        maps: dict[int, Tensor] = {}
        for index in range(max(indices) + 1):
            x = self.blocks[index](x, grid)
            if index in indices:
                maps[index] = self.tokens_to_map(x, grid)
        return [maps[index] for index in indices]

    def tokens_to_map(self, x: Tensor, grid: Grid) -> Tensor:
        """(N, [1 + R +] L, D) -> (N, D, h, w)."""
        patches = x[:, self.num_prefix_tokens :] if self.num_prefix_tokens else x
        return patches.transpose(1, 2).reshape(x.shape[0], self.width, *grid)

    def forward(self, images: Tensor) -> Tensor:
        """As ``forward_features``."""
        return self.forward_features(images)


def init_linear(module: nn.Module) -> None:
    """Xavier uniform weight and zero bias on linear layers; 1 and 0 on LayerNorm."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


def size_arguments(size: str) -> dict[str, Any]:
    """Encoder arguments that follow from a size's name."""
    numbers = get_size(size)
    return {
        "width": numbers.width,
        "depth": numbers.depth,
        "num_heads": numbers.num_heads,
        "patch_size": numbers.patch_size,
    }


def build_vit(size: str = "base", **overrides: Any) -> VisionTransformer:
    """A VisionTransformer of a named size ("tiny" … "huge"); any argument can be overridden."""
    return VisionTransformer(**{**size_arguments(size), **overrides})
