"""A masked autoencoder from any file that holds one, decoder included."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mae_transfer.checkpoint import EncoderInfo, encoder_state, read_checkpoint
from mae_transfer.engine.run_folder import weights_file
from mae_transfer.errors import CheckpointError
from mae_transfer.position import resize_pos_embed
from mae_transfer.sizes import SIZES
from pretrain.model import MaskedAutoencoder


@dataclass(frozen=True, kw_only=True)
class LoadedMAE:
    """A model in evaluation mode and what its file says of its input."""

    model: MaskedAutoencoder
    info: EncoderInfo
    path: Path


def load_mae(path: str | Path) -> LoadedMAE:
    """The masked autoencoder of a run folder (its ``model.safetensors``, or the newest training state while it still
    runs), of a training state, or of an official pretraining file that kept its decoder.

    Raises:
        CheckpointError: unreadable, of another family, or without a decoder.
    """
    path = weights_file(Path(path))
    checkpoint = read_checkpoint(path)
    tensors, info = checkpoint.tensors, checkpoint.info
    if "decoder_pred.weight" not in tensors:
        raise CheckpointError(
            f"{path} has no decoder, so it cannot reconstruct; give the run's model.safetensors or a file of "
            "checkpoints/, not encoder.safetensors"
        )
    decoder_width = tensors["decoder_pred.weight"].shape[1]
    model = MaskedAutoencoder(
        image_size=info.image_size,
        patch_size=info.patch_size,
        in_channels=info.channels,
        width=info.width,
        depth=info.depth,
        num_heads=info.num_heads,
        mlp_ratio=tensors["blocks.0.mlp.fc1.weight"].shape[0] / info.width,
        decoder_width=decoder_width,
        decoder_depth=1 + max(int(key.split(".")[1]) for key in tensors if key.startswith("decoder_blocks.")),
        decoder_num_heads=info.decoder_num_heads or _decoder_heads(decoder_width, path),
        # Unknown for official files: most released ones were trained on normalised pixels (paper, Table 1d).
        norm_pix_loss=info.normalised_target is not False,
        mask_tokens_in_encoder="encoder_mask_token" in tensors,
        positions=info.positions,
        decoder="cross" if "decoder_blocks.0.cross_attn.q.weight" in tensors else "self",
        cross_prediction_ratio=info.cross_prediction_ratio or 0.25,
        cross_fuse_features="wfm.linear.weight" in tensors,
    )
    if model.wfm is not None:
        # CrossMAE's own files lack the encoder's last norm: where features are mixed no loss reaches it.
        tensors = {**model.norm.state_dict(prefix="norm."), **tensors}
    wanted, given = set(model.state_dict()), set(tensors)
    if wanted != given:
        raise CheckpointError(
            f"{path} is not a masked autoencoder known here: it lacks {sorted(wanted - given)[:4]} and has "
            f"{sorted(given - wanted)[:4]} besides"
        )
    model.load_state_dict(tensors)
    return LoadedMAE(model=model.eval(), info=info, path=path)


def load_initial_weights(model: MaskedAutoencoder, path: str | Path) -> str:
    """Start pretraining from weights that exist: another run's, or published ones.

    The encoder is loaded strictly, the decoder too where the file has one that fits; without one it stays as drawn.
    Tables of positions that are a fixed function of the grid are the model's own. Learned ones of another grid are
    resized.

    Returns:
        What was done, for the log.

    Raises:
        CheckpointError: unreadable, or an encoder or a decoder of another architecture. The model is left untouched.
    """
    path = weights_file(Path(path))
    checkpoint = read_checkpoint(path)
    if checkpoint.info.positions != model.positions:
        raise CheckpointError(
            f"{path} was trained with {checkpoint.info.positions} positions, this model has {model.positions} ones; "
            f"set model.positions={checkpoint.info.positions}"
        )
    own, given = model.state_dict(), dict(checkpoint.tensors)
    tables = {"pos_embed": checkpoint.info.grid, "decoder_pos_embed": checkpoint.info.grid}
    for name, grid in tables.items():
        if model.positions == "sincos":
            given[name] = own[name]
        elif name in given:
            given[name] = resize_pos_embed(given[name], grid, model.grid)
    decoder = {name for name in own if name not in encoder_state(own)}
    if not any(name in checkpoint.tensors for name in decoder):
        given = {**encoder_state(given), **{name: own[name] for name in decoder}}
        what = "encoder loaded; the file has no decoder, which starts from random weights"
    else:
        what = "encoder and decoder loaded"
    wrong = sorted(own.keys() ^ given.keys())
    wrong += [name for name in own if name in given and given[name].shape != own[name].shape]
    if wrong:
        shown = ", ".join(wrong[:4]) + (f" and {len(wrong) - 4} more" if len(wrong) > 4 else "")
        raise CheckpointError(
            f"{path} does not fit this model: {shown} lacking, besides, or of another shape; set model.size, "
            "model.patch_size and the decoder's numbers to the file's, or give its encoder alone"
        )
    model.load_state_dict(given)
    return f"{path}: {what}"


def _decoder_heads(decoder_width: int, path: Path) -> int:
    heads = {size.decoder_width: size.decoder_num_heads for size in SIZES.values()}.get(decoder_width)
    if heads is None:
        raise CheckpointError(f"{path} does not say how many heads its {decoder_width}-wide decoder has")
    return heads
