"""CrossMAE's decoder (Fu et al. 2024, arXiv 2401.14391): mask tokens read from the encoder and never from one another.

Each decoder block lets the tokens of hidden patches attend to the encoder's output (cross-attention, then an MLP).
As no token depends on another, a share of the hidden patches can be predicted alone (the paper's prediction ratio γ),
and its predictions are those that decoding all of them would give. With inter-block attention (Section 3.4) every
decoder block reads its own learned mixture of all encoder blocks' outputs instead of the last one's.

State-dict keys are those of CrossMAE's own code.

Shapes: N batch, P predicted patches, T = 1 + K encoder tokens (cls first), D encoder and E decoder width, M heads,
d = E / M, F = 1 + depth encoder features (the embedded patches, then every block), J decoder blocks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mae_transfer.attention import attend
from mae_transfer.errors import ConfigError
from mae_transfer.vit import Mlp


class CrossAttention(nn.Module):
    """Queries from the decoder's tokens, keys and values from the encoder's, projected from D to E directly."""

    def __init__(self, encoder_width: int, width: int, num_heads: int) -> None:
        super().__init__()
        if width % num_heads:
            raise ConfigError(f"width {width} is not a multiple of {num_heads} heads")
        self.num_heads = num_heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(encoder_width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """(N, P, E) and memory (N, T, D) -> (N, P, E)."""
        n, p, width = x.shape
        q = self.q(x).reshape(n, p, self.num_heads, -1).transpose(1, 2)  # (N, M, P, d)
        kv = self.kv(memory).reshape(n, memory.shape[1], 2, self.num_heads, -1)
        k, v = kv.permute(2, 0, 3, 1, 4)  # 2 x (N, M, T, d)
        return self.proj(attend(q, k, v).transpose(1, 2).reshape(n, p, width))


class CrossBlock(nn.Module):
    """Pre-norm cross-attention and MLP; the memory comes normalised. No self-attention (Figure 4b of the paper)."""

    def __init__(
        self,
        encoder_width: int,
        width: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        norm_eps: float = 1e-6,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.cross_attn = CrossAttention(encoder_width, width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = Mlp(width, int(width * mlp_ratio))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """(N, P, E) and memory (N, T, D) -> (N, P, E)."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self.compute, x, memory, use_reentrant=False)
        return self.compute(x, memory)

    def compute(self, x: Tensor, memory: Tensor) -> Tensor:
        """As ``forward``, activations kept."""
        x = x + self.cross_attn(self.norm1(x), memory)
        return x + self.mlp(x, norm=self.norm2)


class FeatureFusion(nn.Module):
    """Inter-block attention: a learned weighted sum of all encoder features for each decoder block (Section 3.4)."""

    def __init__(self, num_features: int, num_decoder_blocks: int) -> None:
        super().__init__()
        self.linear = nn.Linear(num_features, num_decoder_blocks, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.normal_(self.linear.weight, std=1 / math.sqrt(self.linear.in_features))

    def forward(self, features: Tensor) -> Tensor:
        """(F, N, T, D) -> (J, N, T, D)."""
        return (self.linear.weight @ features.flatten(1)).unflatten(1, features.shape[1:])


def num_predicted(num_patches: int, num_masked: int, prediction_ratio: float) -> int:
    """P: γ·L patches, at least one and at most all hidden ones; 49 of 196 at the paper's γ = 0.25."""
    return max(1, min(num_masked, round(num_patches * prediction_ratio)))
