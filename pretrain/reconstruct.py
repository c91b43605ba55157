"""Reconstructions as pictures: what was given, what was hidden, what the model made of it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mae_transfer.data.batches import to_batch
from mae_transfer.data.decode import decode_image
from mae_transfer.data.draws import Draws, Purpose
from mae_transfer.data.transforms import centre_box, centre_crop, denormalise, normalise
from mae_transfer.engine.files import atomic_path
from mae_transfer.errors import ConfigError
from mae_transfer.visualize import GridRow, Picture, image_grid, to_picture
from pretrain.load import LoadedMAE, load_mae
from pretrain.masking import SAMPLERS, box_mask, build_sampler, noise_from_mask
from pretrain.model import MAEOutput, MaskedAutoencoder

COLUMNS = ("original", "masked", "reconstruction", "with visible patches")
NORM_PIX_CAPTION = (
    "This model predicts patches normalised by their own mean and deviation. To show its prediction as pixels, the "
    "TRUE patch's mean and deviation were put back: brightness and contrast of a hidden patch are given, not predicted."
)
_GRAY = 0.5

Box = tuple[float, float, float, float]


def picture_parts(
    model: MaskedAutoencoder, images: Tensor, output: MAEOutput, *, mean: Sequence[float], std: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Original, masked (hidden patches gray), reconstruction, and reconstruction with the visible patches pasted in.

    Args:
        images: (N, C, H, W), normalised.

    Returns:
        Four times (N, C, H, W) in 0..1.
    """
    num_values = model.patch_size[0] * model.patch_size[1] * model.num_channels
    grid = images.shape[2] // model.patch_size[0], images.shape[3] // model.patch_size[1]
    hidden = model.unpatchify(output.mask[:, :, None].expand(-1, -1, num_values), grid).bool()
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
    """What has to be said below pictures of this model."""
    return NORM_PIX_CAPTION if model.norm_pix_loss else ""


@torch.no_grad()
def save_training_reconstructions(
    model: MaskedAutoencoder,
    images: Tensor,
    noise: Tensor,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    path: Path | None,
) -> None:
    """A grid of ``images`` (N, C, H, W), normalised, under the masks of ``noise``, written to ``path`` (.png).

    With None it is computed and not written: what processes do that help with a sharded model.
    """
    parts = picture_parts(model, images, model(images, noise), mean=mean, std=std)
    if path is None:
        return
    picture = image_grid(grid_rows(parts, [""] * len(images)), columns=COLUMNS, caption=caption_of(model))
    with atomic_path(path) as temporary:
        picture.save(temporary, format="PNG")


@torch.inference_mode()
def reconstruct_masked(
    loaded: LoadedMAE, image: Image.Image, *, kind: str, ratio: float, seed: int, index: int = 0
) -> tuple[Tensor, ...]:
    """The four parts (1, C, H, W) of one image under a mask that is drawn from (seed, index).

    Raises:
        ConfigError: an unknown kind, or a ratio it cannot hold.
    """
    model = loaded.model
    sampler = build_sampler(kind, model.grid, ratio)
    draws = Draws(seed=seed, purpose=Purpose.EVALUATION_MASK, index=index)
    noise = torch.from_numpy(sampler.noise(draws.generator()))[None]
    images = model_input(loaded, image)
    output = model(images, noise, mask_ratio=ratio)
    return picture_parts(model, images, output, mean=loaded.info.mean, std=loaded.info.std)


@torch.inference_mode()
def reconstruct_box(loaded: LoadedMAE, image: Image.Image, box: Box) -> tuple[Tensor, ...]:
    """The four parts (1, C, H, W) of one image with every patch hidden that ``box`` touches, and no other.

    Args:
        box: x0, y0, x1, y1 in pixels of ``image``, x1 and y1 exclusive.

    Raises:
        ConfigError: an empty box, one that misses the part of the image that the model sees, or hides all of it.
    """
    model = loaded.model
    height, width = model.image_size
    seen = centre_box(image, size=model.image_size)
    x_scale, y_scale = width / seen.width, height / seen.height
    in_model = (
        (box[0] - seen.left) * x_scale,
        (box[1] - seen.top) * y_scale,
        (box[2] - seen.left) * x_scale,
        (box[3] - seen.top) * y_scale,
    )
    try:
        hidden = box_mask(model.grid, model.patch_size, in_model)
    except ConfigError as error:
        raise ConfigError(
            f"--mask-box {','.join(f'{v:g}' for v in box)} on an image of {image.width}x{image.height} pixels, of "
            f"which the model sees x {seen.left}-{seen.left + seen.width}, y {seen.top}-{seen.top + seen.height} as "
            f"{width}x{height}: {error}"
        ) from error
    noise = torch.from_numpy(noise_from_mask(hidden, np.random.default_rng(0)))[None]
    images = model_input(loaded, image)
    output = model(images, noise, visible=int(hidden.size - hidden.sum()))
    return picture_parts(model, images, output, mean=loaded.info.mean, std=loaded.info.std)


def model_input(loaded: LoadedMAE, image: Image.Image) -> Tensor:
    """(1, C, H, W), normalised: the largest centred box of the model's aspect ratio, resized to its image size."""
    pixels = centre_crop(image, size=loaded.model.image_size)
    return normalise(to_batch([pixels]), loaded.info.mean, loaded.info.std)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="tools/reconstruct.py",
        description="Hide parts of images and let a pretrained model fill them in; one picture with a row for each "
        "image and mask.",
        epilog="The model sees the largest centred box of its own aspect ratio, resized to the size it was trained at. "
        "Several ratios and kinds give every combination of them.",
        allow_abbrev=False,
    )
    result.add_argument("checkpoint", help="run folder, its model.safetensors, a training state, or an official file")
    result.add_argument("images", nargs="+", metavar="IMAGE")
    result.add_argument("--out", required=True, type=Path, help="picture to write (.png or .jpg)")
    result.add_argument("--mask-ratio", type=float, nargs="+", metavar="R", help="shares to hide (default 0.75)")
    result.add_argument("--mask-kind", nargs="+", metavar="K", help=f"{', '.join(SAMPLERS)} (default random)")
    result.add_argument(
        "--mask-box",
        type=_parse_box,
        action="append",
        metavar="x0,y0,x1,y1",
        help="hide by hand every patch that this box touches; in pixels of the image file, the right way up; "
        "can be given several times. Alone, no other mask is drawn",
    )
    result.add_argument("--seed", type=int, default=0, help="of the masks (default 0)")
    return result


def _parse_box(text: str) -> Box:
    try:
        x0, y0, x1, y1 = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not four numbers x0,y0,x1,y1") from None
    return x0, y0, x1, y1


def main(argv: Sequence[str] | None = None) -> int:
    """Write the picture and say where. Errors are raised."""
    arguments = parser().parse_args(argv)
    file_format = Image.registered_extensions().get(arguments.out.suffix.lower())
    if file_format not in ("PNG", "JPEG"):
        raise ConfigError(f"--out {arguments.out}: give a name that ends in .png or .jpg")
    loaded = load_mae(arguments.checkpoint)
    boxes = arguments.mask_box or []
    drawn = not boxes or arguments.mask_ratio or arguments.mask_kind
    ratios = (arguments.mask_ratio or [0.75]) if drawn else []
    kinds = arguments.mask_kind or ["random"]
    rows: list[GridRow] = []
    for index, path in enumerate(arguments.images):
        image = decode_image(path, channels=loaded.info.channels)
        name = Path(path).name
        for box in boxes:
            parts = reconstruct_box(loaded, image, box)
            rows += grid_rows(parts, [f"{name}\nby hand\n{','.join(f'{v:g}' for v in box)}"])
        for kind in kinds:
            for ratio in ratios:
                parts = reconstruct_masked(loaded, image, kind=kind, ratio=ratio, seed=arguments.seed, index=index)
                rows += grid_rows(parts, [f"{name}\n{kind}\n{ratio:.0%} hidden"])
    picture = image_grid(rows, columns=COLUMNS, caption=caption_of(loaded.model))
    with atomic_path(arguments.out) as temporary:
        picture.save(temporary, format=file_format)
    print(arguments.out)
    return 0
