from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mae_transfer.checkpoint import describe, encoder_state, write_safetensors
from mae_transfer.data.batches import to_batch
from mae_transfer.data.transforms import normalise
from mae_transfer.errors import CheckpointError, run_tool
from pretrain import MaskedAutoencoder
from pretrain.load import LoadedMAE, load_mae
from pretrain.reconstruct import main, picture_parts, reconstruct_box, reconstruct_masked
from tests.pictures import picture

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


def save(folder: Path, *, norm_pix_loss: bool = True) -> Path:
    torch.manual_seed(0)
    model = MaskedAutoencoder(
        image_size=(32, 48), patch_size=8, width=32, depth=2, num_heads=2, decoder_width=24, decoder_depth=1,
        decoder_num_heads=3, norm_pix_loss=norm_pix_loss,
    )  # fmt: skip
    info = describe(model, mean=MEAN, std=STD, normalised_target=norm_pix_loss, decoder_num_heads=3, git_commit="test")
    write_safetensors(folder / "model.safetensors", model.state_dict(), info.to_metadata())
    write_safetensors(folder / "encoder.safetensors", encoder_state(model.state_dict()), info.to_metadata())
    return folder


@pytest.fixture
def loaded(tmp_path: Path) -> LoadedMAE:
    return load_mae(save(tmp_path))


def test_the_model_comes_back_as_it_was(loaded: LoadedMAE, tmp_path: Path) -> None:
    model = loaded.model
    assert (model.grid, model.decoder_num_heads, model.norm_pix_loss, model.training) == ((4, 6), 3, True, False)
    assert not load_mae(save(tmp_path / "pixels", norm_pix_loss=False)).model.norm_pix_loss


def test_no_decoder_no_reconstruction(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no decoder"):
        load_mae(save(tmp_path) / "encoder.safetensors")
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        load_mae(Path(__file__).parent)


def test_parts(loaded: LoadedMAE) -> None:
    pixels = np.asarray(picture(0, (32, 48)))
    images = normalise(to_batch([pixels]), MEAN, STD)
    with torch.no_grad():
        output = loaded.model(images, torch.rand(1, 24))
        original, masked, predicted, pasted = picture_parts(loaded.model, images, output, mean=MEAN, std=STD)
    np.testing.assert_allclose(original[0].permute(1, 2, 0) * 255, pixels, atol=1e-3)
    for i, hidden in enumerate(output.mask[0].bool().tolist()):
        rows, columns = slice(i // 6 * 8, i // 6 * 8 + 8), slice(i % 6 * 8, i % 6 * 8 + 8)
        patch = (0, slice(None), rows, columns)
        if hidden:
            assert (masked[patch] == 0.5).all() and torch.equal(pasted[patch], predicted[patch])
        else:
            assert torch.equal(masked[patch], original[patch]) and torch.equal(pasted[patch], original[patch])


def hidden_patches(parts: tuple[torch.Tensor, ...]) -> np.ndarray:
    """(4, 6) bool: which patches are gray in the masked picture."""
    masked = parts[1][0]  # (C, H, W)
    return (masked == 0.5).all(dim=0).reshape(4, 8, 6, 8).permute(0, 2, 1, 3).flatten(2).all(dim=2).numpy()


def test_a_box_hides_every_patch_it_touches_and_no_other(loaded: LoadedMAE) -> None:
    # The picture is 64 x 192 pixels: the model sees x 48 to 144, halved.
    image = picture(1, (64, 192))
    hidden = hidden_patches(reconstruct_box(loaded, image, (48 + 15, 17, 48 + 33, 32)))
    expected = np.zeros((4, 6), bool)
    expected[1, 0:3] = True  # x 7.5 to 16.5, y 8.5 to 16 of 32 x 48
    np.testing.assert_array_equal(hidden, expected)


def test_the_number_hidden_follows_the_box_and_the_ratio(loaded: LoadedMAE) -> None:
    image = picture(1, (64, 96))
    for box, count in (((0, 0, 1, 1), 1), ((0, 0, 96, 33), 18), ((16, 0, 96, 64), 20)):
        assert hidden_patches(reconstruct_box(loaded, image, box)).sum() == count
    for ratio in (0.25, 0.5, 0.75):
        assert hidden_patches(reconstruct_masked(loaded, image, kind="block", ratio=ratio, seed=0)).sum() == 24 * ratio


def test_the_tool_draws_a_row_for_each_combination(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save(tmp_path)
    names = [str(tmp_path / f"{i}.png") for i in range(2)]
    for i, name in enumerate(names):
        picture(i, (64, 96)).save(name)
    out = tmp_path / "grid.png"
    command = [str(model), *names, "--out", str(out)]
    heights = []
    for more in (
        ["--mask-box", "10,10,40,40"],
        ["--mask-ratio", "0.5", "0.75", "--mask-kind", "random", "grid", "block"],
        [],
    ):
        status = run_tool(main, [*command, *more])
        if "grid" in more:
            assert status == 2 and "nearest possible" in capsys.readouterr().err  # no lattice hides one half
            status = run_tool(main, [*command, "--mask-ratio", "0.75", "--mask-kind", "random", "grid", "block"])
        assert status == 0
        with Image.open(out) as image:
            heights.append(image.height)
    tile = 160
    assert heights[1] - heights[0] == 4 * (tile + 6), "six rows where there were two"
    assert heights[2] == heights[0]
    first = out.read_bytes()
    assert run_tool(main, command) == 0 and out.read_bytes() == first, "a seed gives one picture"
    assert run_tool(main, [*command, "--seed", "1"]) == 0 and out.read_bytes() != first


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(save(tmp_path))
    picture(0, (64, 96)).save(tmp_path / "image.png")
    image, out = str(tmp_path / "image.png"), str(tmp_path / "grid.png")
    for command, message in (
        ([model, "absent.png", "--out", out], "cannot read image absent.png"),
        ([str(tmp_path / "absent"), image, "--out", out], "does not exist"),
        ([model, image, "--out", str(tmp_path / "grid.xyz")], "ends in .png or .jpg"),
        ([model, image, "--out", out, "--mask-kind", "blok"], "did you mean block"),
        ([model, image, "--out", out, "--mask-box", "500,500,600,600"], "touches no patch"),
        ([model, image, "--out", out, "--mask-box", "0,0,96,64"], "touches every patch"),
    ):
        assert run_tool(main, command) == 2
        errors = capsys.readouterr().err
        assert message in errors and "Traceback" not in errors
    with pytest.raises(SystemExit) as error:
        main([model, image, "--out", out, "--mask-box", "1,2,3"])
    assert error.value.code == 2
