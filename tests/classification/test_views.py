"""The evaluation view against torchvision's and timm's pipelines, to the last bit."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.transforms_factory import transforms_imagenet_eval
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from mae_transfer.classification.views import covering_size, evaluation_view
from mae_transfer.data.decode import Pixels, open_picture
from mae_transfer.errors import DataError
from tests.pictures import picture


def official(size: int) -> Compose:
    """The evaluation transform as the published fine-tuning code composes it, up to the tensor."""
    crop = 224 / 256 if size <= 224 else 1.0
    return Compose([Resize(int(size / crop), InterpolationMode.BICUBIC), CenterCrop(size)])


@pytest.mark.parametrize("image_size", [(375, 500), (500, 333), (64, 64), (97, 180), (20, 45)])
@pytest.mark.parametrize("size", [64, 224, 320])
def test_equals_torchvisions_resize_and_centre_crop(image_size: tuple[int, int], size: int) -> None:
    image = picture(3, image_size)
    ours = evaluation_view(Pixels(np.asarray(image)), size=(size, size), crop=224 / 256 if size <= 224 else 1.0)
    assert torch.equal(ours, torch.from_numpy(np.array(official(size)(image))))


@pytest.mark.parametrize(("size", "crop"), [((32, 48), 0.8), ((48, 32), 1.0), ((40, 40), 0.9)])
def test_equals_timms_evaluation_of_any_shape(size: tuple[int, int], crop: float) -> None:
    image = picture(4, (70, 90))
    pipeline = transforms_imagenet_eval(size, crop_pct=crop, interpolation="bicubic", use_prefetcher=True)
    theirs = pipeline(image)  # (C, H, W) uint8
    ours = evaluation_view(Pixels(np.asarray(image)), size=size, crop=crop).permute(2, 0, 1).numpy()
    # They round the resized sides instead of cutting them off, so that a pixel of context may be more or less.
    assert theirs.shape == ours.shape
    assert np.abs(np.array(theirs).astype(int) - ours).mean() < (0.01 if size[0] == size[1] else 6)


def test_gray_and_jpeg_pictures() -> None:
    gray = picture(1, (80, 60)).convert("L")
    theirs = np.array(official(32)(gray))
    ours = evaluation_view(Pixels(np.asarray(gray)[:, :, None]), size=(32, 32), crop=224 / 256)
    assert ours.shape == (32, 32, 1) and np.array_equal(ours[:, :, 0].numpy(), theirs)
    buffer = io.BytesIO()
    picture(2, (300, 400)).save(buffer, "JPEG", quality=90)
    ours = evaluation_view(open_picture(buffer.getvalue(), name="jpeg"), size=(96, 96), crop=224 / 256)
    theirs = np.array(official(96)(Image.open(buffer).convert("RGB")))
    assert np.abs(ours.numpy().astype(int) - theirs).max() <= 1  # decoders may differ in a last bit


@pytest.mark.parametrize("kind", [np.float32, np.uint16, np.uint8])
def test_measured_data_keep_their_type_and_equal_torchvisions_tensors(kind: type) -> None:
    values = np.random.default_rng(0).random((50, 70, 5)) * (1 if kind is np.float32 else 200)
    ours = evaluation_view(Pixels(values.astype(kind)), size=(24, 24), crop=224 / 256)
    tensor = torch.from_numpy(values.astype(kind).astype(np.float32)).permute(2, 0, 1)
    theirs = official(24)(tensor).permute(1, 2, 0)
    assert ours.shape == (24, 24, 5) and ours.numpy().dtype == kind
    torch.testing.assert_close(ours.float(), theirs, rtol=0, atol=0.51 if kind is not np.float32 else 1e-6)
    with pytest.raises(DataError, match="not finite"):
        evaluation_view(Pixels(np.full((50, 70, 5), np.nan, np.float32)), size=(24, 24), crop=1.0)


def test_the_resized_image_covers_what_is_cut() -> None:
    for height in range(1, 40, 3):
        for width in range(1, 40, 7):
            for size in ((16, 16), (13, 29), (29, 13)):
                h, w = covering_size((height, width), size=size, crop=1.0)
                assert h >= size[0] and w >= size[1] and (h == size[0] or w == size[1])
