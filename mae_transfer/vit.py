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
        self.mlp = Mlp(width, int(width * mlp_ratio))
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
        drop_path: rate of the last block; earlier ones rise linearly from 0.
        layer_scale: initial value of the layer scale, or None for none.
        cls_token: carry a cls token. ``pos_embed`` keeps its cls row without one, so that files fit.
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
        qkv_bias: bool = True,
        norm_eps: float = 1e-6,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        cls_token: bool = True,
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
        if window_size and cls_token:
            raise ConfigError("windowed attention has no place for a cls token; build with cls_token=False")
        outside = [block for block in global_blocks if not 0 <= block < depth]
        if outside:
            raise ConfigError(f"global_blocks {outside} do not exist in a model of {depth} blocks (0 to {depth - 1})")

        self.patch_embed = PatchEmbed(self.patch_size, in_channels, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if cls_token else None
        self.pos_embed = nn.Parameter(sincos_2d(width, self.grid))
        self._resized = ResizeCache()

        table_size = self.image_size
        if attention_image_size is not None:
            table_size = to_pair(attention_image_size, "attention_image_size")
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
            )

        self.blocks = nn.ModuleList(
            Block(
                attention(block),
                width,
                mlp_ratio=mlp_ratio,
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
        self.apply(init_linear)

    # The four steps of the encoder.

    def add_positions(self, x: Tensor, grid: Grid) -> Tensor:
        """Add the patch rows of ``pos_embed`` to (N, L, D), resized where ``grid`` is not the native one."""
        return x + self.position_rows(grid)[:, 1:]

    def position_rows(self, grid: Grid) -> Tensor:
        """(1, 1 + h·w, D) for any grid."""
        if grid == self.grid:
            return self.pos_embed
        return self._resized(resize_pos_embed, self.pos_embed, self.grid, grid)

    def prepend_cls(self, x: Tensor) -> Tensor:
        """(N, T, D) -> (N, 1 + T, D) where the model has a cls token; as is otherwise."""
        if self.cls_token is None:
            return x
        cls = (self.cls_token + self.pos_embed[:, :1]).to(x.dtype)
        return torch.cat([cls.expand(x.shape[0], -1, -1), x], dim=1)

    def embed(self, images: Tensor) -> tuple[Tensor, Grid]:
        """(N, C, H, W) -> tokens (N, [1 +] L, D) ready for the blocks, and their grid."""
        grid = grid_of((images.shape[2], images.shape[3]), self.patch_size)
        x = self.patch_embed(images)  # (N, L, D)
        return self.prepend_cls(self.add_positions(x, grid)), grid

    # What hosts call.

    def forward_features(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, 1 + L, D), cls first, after the final norm. (N, L, D) without a cls token."""
        x, grid = self.embed(images)
        for index in range(self.depth):
            x = self.blocks[index](x, grid)
        return self.norm(x)

    def forward_taps(self, images: Tensor, indices: Sequence[int]) -> list[Tensor]:
        """Feature maps after the named blocks, before any norm, cls dropped.

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
        """(N, [1 +] L, D) -> (N, D, h, w)."""
        patches = x if self.cls_token is None else x[:, 1:]
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
