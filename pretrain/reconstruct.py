"""Reconstructions as pictures: what was given, what was hidden, what the model made of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mae_transfer.data.transforms import denormalise
from mae_transfer.engine.files import atomic_path
from mae_transfer.visualize import GridRow, Picture, image_grid, to_picture
from pretrain.model import MAEOutput, MaskedAutoencoder

COLUMNS = ("original", "masked", "reconstruction", "with visible patches")
NORM_PIX_CAPTION = (
    "This model predicts patches normalised by their own mean and deviation. To show its prediction as pixels, the "
    "TRUE patch's mean and deviation were put back: brightness and contrast of a hidden patch are given, not predicted."
)
_GRAY = 0.5


def picture_parts(
    model: MaskedAutoencoder, images: Tensor, output: MAEOutput, *, mean: Sequence[float], std: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Original, masked (hidden patches gray), reconstruction, and reconstruction with the visible patches pasted in.

    Args:
        images: (N, C, H, W), normalised.

    Returns:
        Four times (N, C, H, W) in 0..1.
    """
    hidden = output.mask[:, :, None].expand(-1, -1, model.patchify(images).shape[2])
    grid = images.shape[2] // model.patch_size[0], images.shape[3] // model.patch_size[1]
    hidden = model.unpatchify(hidden, grid).bool()
    original = denormalise(images, mean, std)
    predicted = denormalise(model.predicted_pixels(images, output), mean, std)
    masked = original.masked_fill(hidden, _GRAY)
    return original, masked, predicted, torch.where(hidden, predicted, original)


def grid_rows(parts: Sequence[Tensor], labels: Sequence[str]) -> list[GridRow]:
    """A row for each image from the four parts."""
    rows = []
    for i, label in enumerate(labels):
        pictures: list[Picture] = [to_picture(part[i]) for part in parts]
        rows.append(GridRow(pictures=pictures, label=label))
    return rows


def caption_of(model: MaskedAutoencoder) -> str:
    return NORM_PIX_CAPTION if model.norm_pix_loss else ""


@torch.inference_mode()
def save_training_reconstructions(
    model: MaskedAutoencoder, images: Tensor, noise: Tensor, *, mean: Sequence[float], std: Sequence[float], path: Path
) -> None:
    """A grid of ``images`` (N, C, H, W), normalised, under the masks of ``noise``, written to ``path`` (.png)."""
    parts = picture_parts(model, images, model(images, noise), mean=mean, std=std)
    picture = image_grid(grid_rows(parts, [""] * len(images)), columns=COLUMNS, caption=caption_of(model))
    with atomic_path(path) as temporary:
        picture.save(temporary, format="PNG")
