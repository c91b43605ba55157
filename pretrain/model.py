"""The masked autoencoder (He et al. 2022): an encoder of visible patches and a light decoder of all of them.

State-dict keys are those of the released checkpoints. ``forward`` is four steps: hide, encode, decode, compare.

Shapes: N batch, C channels, H W image, p patch, (h, w) grid, L = h·w patches, K visible, D encoder and E decoder width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mae_transfer.attention import Attention
from mae_transfer.errors import ConfigError, nearest
from mae_transfer.position import Grid, grid_of, resize_pos_embed, sincos_2d
from mae_transfer.sizes import get_size
from mae_transfer.vit import Block, VisionTransformer, init_linear, size_arguments
from pretrain.cross_decoder import CrossBlock, FeatureFusion, num_predicted
from pretrain.masking import num_visible

TARGET_EPS = 1e-6
POSITIONS = ("sincos", "learned")
DECODERS = ("self", "cross")


@dataclass(kw_only=True)
class MAEOutput:
    """What one forward pass gives.

    Attributes:
        loss: mean squared error over the predicted patches, a scalar in float32.
        mask: (N, L) float, 1 = masked.
        ids_visible: (N, K) patches that were encoded, in the order of the noise.
        ids_masked: (N, L − K) the rest.
        ids_predicted: (N, P) the patches of the loss: all masked ones, or CrossMAE's share of them while training.
    """

    loss: Tensor
    mask: Tensor
    ids_visible: Tensor
    ids_masked: Tensor
    ids_predicted: Tensor
    _predict: Callable[[], Tensor] = field(repr=False)

    @property
    def prediction(self) -> Tensor:
        """(N, L, p·p·C) for all patches, values ordered row, column, channel.

        Computed when asked for: training needs it for the patches of the loss only.
        """
        return self._predict()


class MaskedAutoencoder(VisionTransformer):
    """Masked autoencoder with the official keys.

    Args:
        decoder_width, decoder_depth, decoder_num_heads: of the decoder.
        mask_ratio: share of hidden patches where ``forward`` is not told otherwise.
        norm_pix_loss: predict each patch normalised by its own mean and (unbiased) variance (Section 3).
        mask_tokens_in_encoder: the paper's ablation (Table 1c): the encoder sees mask tokens instead of skipping
            hidden patches. Adds ``encoder_mask_token`` and drops the decoder's ``mask_token``.
        positions: "sincos", fixed tables as in the paper, or "learned": ``pos_embed`` and ``decoder_pos_embed`` train,
            from those tables on (learned tables: Dosovitskiy et al. 2021, arXiv 2010.11929).
        decoder: "self", the paper's, or "cross": CrossMAE's cross-attention decoder (arXiv 2401.14391), which has
            keys of its own (``decoder_blocks.i.cross_attn``) and no ``decoder_embed``.
        cross_prediction_ratio: CrossMAE's γ: the share of *all* patches that a training step predicts; the masked ones
            next in the order of the noise. In evaluation mode the loss is of all masked patches.
        cross_fuse_features: CrossMAE's inter-block attention: each decoder block reads a learned mixture of all encoder
            features (keys ``wfm`` and ``dec_norms``). The encoder's ``norm`` then is in no path of the loss and stays
            as initialised, as in the released models.
        encoder: arguments of ``VisionTransformer``.

    Images of other sizes than ``image_size`` get both position tables resized.

    Raises:
        ConfigError: values outside these, or that exclude one another.
    """

    def __init__(
        self,
        *,
        decoder_width: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        mask_ratio: float = 0.75,
        norm_pix_loss: bool = True,
        mask_tokens_in_encoder: bool = False,
        positions: str = "sincos",
        decoder: str = "self",
        cross_prediction_ratio: float = 0.25,
        cross_fuse_features: bool = True,
        **encoder: Any,
    ) -> None:
        check_variants(positions, decoder, cross_prediction_ratio, mask_tokens_in_encoder)
        if not encoder.get("cls_token", True) or encoder.get("window_size") or encoder.get("relative_position"):
            raise ConfigError(
                "masked pretraining encodes a set of visible patches with a cls token: cls_token=False, window_size "
                "and relative_position belong to the transfer models (build_vit)"
            )
        super().__init__(**encoder)
        self.mask_ratio = mask_ratio
        self.norm_pix_loss = norm_pix_loss
        self.mask_tokens_in_encoder = mask_tokens_in_encoder
        self.decoder_width = decoder_width
        self.decoder_depth = decoder_depth
        self.decoder_num_heads = decoder_num_heads
        self.positions = positions
        self.decoder = decoder
        self.cross_prediction_ratio = cross_prediction_ratio
        norm_eps = encoder.get("norm_eps", 1e-6)

        assert self.pos_embed is not None, "a masked autoencoder has absolute positions"
        self.pos_embed.requires_grad_(positions == "learned")
        self.decoder_embed = nn.Linear(self.width, decoder_width) if decoder == "self" else None
        # One mask token, where it is used: in the decoder, or in the encoder for the ablation.
        self.mask_token = None if mask_tokens_in_encoder else nn.Parameter(torch.zeros(1, 1, decoder_width))
        self.encoder_mask_token = nn.Parameter(torch.zeros(1, 1, self.width)) if mask_tokens_in_encoder else None
        self.decoder_pos_embed = nn.Parameter(sincos_2d(decoder_width, self.grid), requires_grad=positions == "learned")
        block_arguments = {
            "mlp_ratio": encoder.get("mlp_ratio", 4.0),
            "norm_eps": norm_eps,
            "checkpointing": self.checkpointing,
        }
        self.decoder_blocks = nn.ModuleList(
            Block(Attention(decoder_width, decoder_num_heads), decoder_width, **block_arguments)
            if decoder == "self"
            else CrossBlock(self.width, decoder_width, decoder_num_heads, **block_arguments)
            for _ in range(decoder_depth)
        )
        fused = decoder == "cross" and cross_fuse_features
        self.wfm = FeatureFusion(1 + self.depth, decoder_depth) if fused else None
        self.dec_norms = (
            nn.ModuleList(nn.LayerNorm(self.width, eps=norm_eps) for _ in range(decoder_depth)) if fused else None
        )
        if fused:
            self.norm.requires_grad_(False)
        self.decoder_norm = nn.LayerNorm(decoder_width, eps=norm_eps)
        self.decoder_pred = nn.Linear(decoder_width, self.patch_size[0] * self.patch_size[1] * self.num_channels)
        self._reset_decoder()

    @torch.no_grad()
    def _reset_decoder(self) -> None:
        for token in (self.mask_token, self.encoder_mask_token):
            if token is not None:
                nn.init.normal_(token, std=0.02)
        for module in (self.decoder_embed, self.decoder_blocks, self.decoder_norm, self.decoder_pred):
            if module is not None:
                module.apply(init_linear)

    def forward(  # type: ignore[override]  # a batch gives a loss here and features in VisionTransformer
        self,
        images: Tensor,
        noise: Tensor | None = None,
        *,
        mask_ratio: float | None = None,
        visible: int | None = None,
    ) -> MAEOutput:
        """Hide patches, encode the visible ones, decode all, compare the hidden ones.

        Args:
            images: (N, C, H, W), normalised.
            noise: (N, L) ranks the patches: the K smallest stay visible. Uniform random by default.
            mask_ratio: K = int(L·(1 − ratio)); the model's own by default.
            visible: K itself, for masks drawn by hand; instead of ``mask_ratio``.

        Raises:
            ConfigError: noise of another shape, no visible or no masked patch, both ``mask_ratio`` and ``visible``.
        """
        grid = grid_of((images.shape[2], images.shape[3]), self.patch_size)
        patches = self.patch_embed.cut(images)  # (N, L, C·p·p)
        ids_visible, ids_masked = self.hide(patches, noise, self._count(grid, mask_ratio, visible))
        latent = self.encode(patches, ids_visible, ids_masked, grid)  # (N, 1 + K, D)
        ids_predicted, decoded, predict = self.decode(latent, ids_visible, ids_masked, grid)
        prediction = self.decoder_pred(decoded)  # (N, P, p·p·C)
        loss = (prediction.float() - self.target(take(patches, ids_predicted))).square().mean()
        mask = torch.ones(patches.shape[:2], device=images.device).scatter_(1, ids_visible, 0.0)
        return MAEOutput(
            loss=loss,
            mask=mask,
            ids_visible=ids_visible,
            ids_masked=ids_masked,
            ids_predicted=ids_predicted,
            _predict=predict,
        )

    def _count(self, grid: Grid, mask_ratio: float | None, visible: int | None) -> int:
        num_patches = grid[0] * grid[1]
        if visible is None:
            return num_visible(num_patches, self.mask_ratio if mask_ratio is None else mask_ratio)
        if mask_ratio is not None:
            raise ConfigError("both mask_ratio and visible were given; give one")
        if not 1 <= visible < num_patches:
            raise ConfigError(f"visible={visible} of {num_patches} patches; expected 1 to {num_patches - 1}")
        return visible

    @staticmethod
    def hide(patches: Tensor, noise: Tensor | None, visible: int) -> tuple[Tensor, Tensor]:
        """Indices of the visible (N, K) and of the masked patches (N, L − K)."""
        shape = patches.shape[:2]
        if noise is None:
            noise = torch.rand(shape, device=patches.device)
        elif noise.shape != shape:
            raise ConfigError(f"noise has shape {tuple(noise.shape)}; these images need (N, L) = {tuple(shape)}")
        order = noise.argsort(dim=1, stable=True)
        return order[:, :visible], order[:, visible:]

    def encode(self, patches: Tensor, ids_visible: Tensor, ids_masked: Tensor, grid: Grid) -> Tensor:
        """Encoder output of the visible patches (N, 1 + K, D), cls first; of all (N, 1 + L, D) in the ablation.

        Only visible patches are embedded at all: hiding after the embedding would throw three quarters away.
        Where a cross decoder fuses features it is all of them: (1 + depth, N, 1 + K, D), without the final norm.
        """
        positions = self.position_rows(grid)[:, 1:]  # (1, L, D)
        positions = positions.expand(patches.shape[0], -1, -1)
        x = self.patch_embed.embed(take(patches, ids_visible))  # (N, K, D)
        if self.encoder_mask_token is None:
            x = x + take(positions, ids_visible)
        else:
            x = spread(x, ids_visible, self.encoder_mask_token, patches.shape[1]) + positions  # (N, L, D)
        x = self.prepend_cls(x)
        features = [x]
        for index in range(self.depth):
            x = self.blocks[index](x, grid)
            if self.wfm is not None:
                features.append(x)
        return self.norm(x) if self.wfm is None else torch.stack(features)

    def decode(
        self, latent: Tensor, ids_visible: Tensor, ids_masked: Tensor, grid: Grid
    ) -> tuple[Tensor, Tensor, Callable[[], Tensor]]:
        """Which patches the loss is of (N, P), those decoded (N, P, E), and how to predict all L.

        A cross decoder that trains decodes the share of the masked patches that it is asked for, and no other.
        """
        if self.decoder == "cross" and self.training:
            num_patches = grid[0] * grid[1]
            count = num_predicted(num_patches, ids_masked.shape[1], self.cross_prediction_ratio)
            ids_predicted = ids_masked[:, :count]
            everything = partial(self._predict_crosswise, latent, grid)
            return ids_predicted, self.decode_crosswise(latent, ids_predicted, grid), everything
        if self.decoder == "cross":
            decoded = self.decode_crosswise(latent, None, grid)
        else:
            decoded = self.decode_together(latent, ids_visible, grid)
        return ids_masked, take(decoded, ids_masked), partial(self.decoder_pred, decoded)

    def decode_together(self, latent: Tensor, ids_visible: Tensor, grid: Grid) -> Tensor:
        """(N, 1 + K, D) -> (N, L, E): mask tokens filled in, positions added, decoded, cls dropped."""
        assert self.decoder_embed is not None
        x = self.decoder_embed(latent)
        cls, patches = x[:, :1], x[:, 1:]
        if self.mask_token is not None:
            patches = spread(patches, ids_visible, self.mask_token, grid[0] * grid[1])  # (N, L, E)
        x = torch.cat([cls, patches], dim=1) + resize_pos_embed(self.decoder_pos_embed, self.grid, grid)
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_norm(x)[:, 1:]

    def decode_crosswise(self, latent: Tensor, ids: Tensor | None, grid: Grid) -> Tensor:
        """Mask tokens at the patches ``ids`` (N, P), at all L for None, decoded from ``latent``: (N, P, E)."""
        assert self.mask_token is not None
        queries = self.mask_token + resize_pos_embed(self.decoder_pos_embed, self.grid, grid)[:, 1:]  # (1, L, E)
        x = queries.expand(latent.shape[-3], -1, -1)
        if ids is not None:
            x = take(x, ids)
        memories = None if self.wfm is None else self.wfm(latent)  # (J, N, 1 + K, D)
        for index, block in enumerate(self.decoder_blocks):
            if memories is None or self.dec_norms is None:
                x = block(x, latent)
            else:
                x = block(x, self.dec_norms[index](memories[index]))
        return self.decoder_norm(x)

    def _predict_crosswise(self, latent: Tensor, grid: Grid) -> Tensor:
        return self.decoder_pred(self.decode_crosswise(latent, None, grid))

    def target(self, patches: Tensor) -> Tensor:
        """What the decoder should say of patches as cut for the encoder: (N, any, C·p·p) -> (N, any, p·p·C), float32.

        Values ordered row, column, channel. With ``norm_pix_loss`` each patch is normalised by its own statistics:
        (x − μ) / √(var + 1e-6), variance unbiased.
        """
        n, count, _ = patches.shape
        p_h, p_w = self.patch_size
        target = patches.float().reshape(n, count, self.num_channels, p_h * p_w).transpose(2, 3).reshape(n, count, -1)
        if self.norm_pix_loss:
            mean, std = patch_statistics(target)
            target = (target - mean).div_(std)
        return target

    def patchify(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, L, p·p·C), values ordered row, column, channel."""
        patches = self.patch_embed.cut(images)
        n, count, _ = patches.shape
        return patches.reshape(n, count, self.num_channels, -1).transpose(2, 3).reshape(n, count, -1)

    def unpatchify(self, patches: Tensor, grid: Grid | None = None) -> Tensor:
        """(N, L, p·p·C) -> (N, C, H, W); the inverse of ``patchify``. ``grid`` is the native one by default."""
        h, w = grid or self.grid
        p_h, p_w = self.patch_size
        x = patches.reshape(patches.shape[0], h, w, p_h, p_w, self.num_channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(patches.shape[0], self.num_channels, h * p_h, w * p_w)

    def predicted_pixels(self, images: Tensor, output: MAEOutput) -> Tensor:
        """The prediction as an image in the input's normalisation, (N, C, H, W).

        A model of normalised patches says nothing of a patch's mean and variance: they are taken from the true patch,
        which the model has not seen. Whoever shows such a picture says so on it.
        """
        prediction = output.prediction.float()
        if self.norm_pix_loss:
            mean, std = patch_statistics(self.patchify(images).float())
            prediction = prediction * std + mean
        return self.unpatchify(prediction, grid_of((images.shape[2], images.shape[3]), self.patch_size))


def check_variants(positions: str, decoder: str, prediction_ratio: float, mask_tokens_in_encoder: bool) -> None:
    """Raises ConfigError for variants that do not exist or exclude one another; names are the config's."""
    for key, value, valid in (("positions", positions, POSITIONS), ("decoder", decoder, DECODERS)):
        if value not in valid:
            raise ConfigError(f"model.{key}={value}; use {' or '.join(valid)}")
    if not 0 < prediction_ratio <= 1:
        raise ConfigError(
            f"model.cross_prediction_ratio={prediction_ratio} is the share of all patches that is predicted; expected "
            "more than 0 and at most the mask ratio (the paper's is 0.25)"
        )
    if decoder == "cross" and mask_tokens_in_encoder:
        raise ConfigError(
            "model.decoder=cross reads from visible patches only, and model.mask_tokens_in_encoder=true hands it "
            "hidden ones; give one of them"
        )


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and √(unbiased variance + 1e-6) over the values of each patch: (N, L, V) -> twice (N, L, 1)."""
    var, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return mean, (var + TARGET_EPS).sqrt()


def take(x: Tensor, ids: Tensor) -> Tensor:
    """Rows ``ids`` (N, K) of x (N, L, V) -> (N, K, V)."""
    return x.gather(1, ids[:, :, None].expand(-1, -1, x.shape[2]))


def spread(x: Tensor, ids: Tensor, filler: Tensor, length: int) -> Tensor:
    """Put rows x (N, K, V) at places ``ids`` of (N, length, V) and ``filler`` (1, 1, V) everywhere else."""
    n, _, width = x.shape
    full = filler.to(x.dtype).expand(n, length, width)
    return full.scatter(1, ids[:, :, None].expand(-1, -1, width), x)


OFFICIAL_NAMES = {
    f"mae_vit_{size}_patch{patch}": {"size": size, "patch_size": patch}
    for size, patch in (("tiny", 16), ("small", 16), ("base", 16), ("large", 16), ("huge", 14))
}


def build_mae(name: str | None = None, *, size: str | None = None, **overrides: Any) -> MaskedAutoencoder:
    """A MaskedAutoencoder by its official name ("mae_vit_base_patch16") or by size ("tiny" … "huge").

    Any argument of ``MaskedAutoencoder`` can be overridden.

    Raises:
        ConfigError: an unknown name or size, or both given.
    """
    if (name is None) == (size is None):
        raise ConfigError("give either an official name, such as mae_vit_base_patch16, or size=…")
    if name is not None:
        if name not in OFFICIAL_NAMES:
            guess = nearest(name, OFFICIAL_NAMES)
            hint = f"; did you mean {guess}?" if guess else ";"
            raise ConfigError(f"unknown model {name!r}{hint} Names are: {', '.join(OFFICIAL_NAMES)}")
        overrides = {**OFFICIAL_NAMES[name], **overrides}
        size = str(overrides.pop("size"))
    assert size is not None
    decoder = get_size(size)
    arguments = {
        **size_arguments(size),
        "decoder_width": decoder.decoder_width,
        "decoder_depth": decoder.decoder_depth,
        "decoder_num_heads": decoder.decoder_num_heads,
        **{_ALIASES.get(key, key): value for key, value in overrides.items()},
    }
    unknown = [key for key in arguments if key not in _ARGUMENTS]
    if unknown:
        guess = nearest(unknown[0], _ARGUMENTS)
        raise ConfigError(f"unknown argument {unknown[0]}" + (f"; did you mean {guess}?" if guess else ""))
    return MaskedAutoencoder(**arguments)


_ALIASES = {"channels": "in_channels", "decoder_dim": "decoder_width"}  # the command line's names
_ARGUMENTS = frozenset(
    (
        *("image_size", "patch_size", "in_channels", "width", "depth", "num_heads", "mlp_ratio", "qkv_bias"),
        *("norm_eps", "drop_path", "layer_scale", "checkpointing", "mask_ratio", "norm_pix_loss"),
        *("decoder_width", "decoder_depth", "decoder_num_heads", "mask_tokens_in_encoder"),
        *("positions", "decoder", "cross_prediction_ratio", "cross_fuse_features"),
    )
)
