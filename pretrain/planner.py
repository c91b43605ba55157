"""Work, memory and hours of a run by formula; ``tools/pretrain.py CONFIG --plan gpus=64 kind=h100`` prints them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from mae_transfer.engine.work import block_flops
from mae_transfer.errors import ConfigError, nearest
from pretrain.config import PretrainConfig
from pretrain.cross_decoder import num_predicted
from pretrain.masking import num_visible
from pretrain.model import MaskedAutoencoder, build_mae

IMAGENET_IMAGES = 1_281_167  # training images of ImageNet-1K


# Work.


@dataclass(frozen=True, kw_only=True)
class Work:
    """One image's forward pass in floating-point operations, a multiplication and an addition counting as two.

    Matrix products only, which are all but a few per cent: projections, attention, and the head, which training
    applies to the predicted patches alone.

    Attributes:
        encoder, decoder: operations; what leads from one width to the other belongs to the decoder.
        encoder_tokens, decoder_tokens: that they run on.
    """

    encoder: int
    decoder: int
    encoder_tokens: int
    decoder_tokens: int

    @property
    def total(self) -> int:
        return self.encoder + self.decoder

    @property
    def decoder_share(self) -> float:
        """Of all operations."""
        return self.decoder / self.total

    @property
    def decoder_per_token(self) -> float:
        """A token's operations in the decoder over those of one in the encoder (paper: below 0.1 for ViT-L)."""
        return (self.decoder / self.decoder_tokens) / (self.encoder / self.encoder_tokens)


def forward_work(model: MaskedAutoencoder, *, mask_ratio: float | None = None) -> Work:
    """Of one image in a training step."""
    num_patches = model.grid[0] * model.grid[1]
    visible = num_visible(num_patches, model.mask_ratio if mask_ratio is None else mask_ratio)
    width, decoder_width, depth = model.width, model.decoder_width, model.decoder_depth
    hidden = model.get_parameter("blocks.0.mlp.fc1.weight").shape[0]
    decoder_hidden = model.get_parameter("decoder_blocks.0.mlp.fc1.weight").shape[0]
    values = _patch_values(model)
    encoded = 1 + (num_patches if model.mask_tokens_in_encoder else visible)  # tokens, with cls
    encoder = 2 * visible * values * width + model.depth * block_flops(encoded, width, hidden)
    if model.decoder == "cross":
        predicted = num_predicted(num_patches, num_patches - visible, model.cross_prediction_ratio)
        decoded = predicted
        decoder = depth * cross_block_flops(predicted, encoded, width, decoder_width, decoder_hidden)
        if model.wfm is not None:
            decoder += 2 * (1 + model.depth) * depth * encoded * width
    else:
        predicted = num_patches - visible
        decoded = 1 + num_patches
        decoder = 2 * encoded * width * decoder_width + depth * block_flops(decoded, decoder_width, decoder_hidden)
    decoder += 2 * predicted * decoder_width * values
    return Work(encoder=encoder, decoder=decoder, encoder_tokens=encoded, decoder_tokens=decoded)


def forward_flops(model: MaskedAutoencoder, *, mask_ratio: float | None = None) -> int:
    """Floating-point operations of one image's forward pass in training (see ``Work``)."""
    return forward_work(model, mask_ratio=mask_ratio).total


def training_flops(model: MaskedAutoencoder, *, mask_ratio: float | None = None) -> int:
    """Of one image's forward and backward pass: the backward pass multiplies each matrix twice."""
    return 3 * forward_flops(model, mask_ratio=mask_ratio)


def cross_block_flops(queries: int, tokens: int, encoder_width: int, width: int, hidden: int) -> int:
    """One block of CrossMAE's decoder: query and output projection, keys and values, attention, MLP."""
    return (
        2 * queries * (2 * width * width + 2 * width * hidden)
        + 4 * tokens * encoder_width * width
        + 4 * queries * tokens * width
    )


def _patch_values(model: MaskedAutoencoder) -> int:
    return model.patch_size[0] * model.patch_size[1] * model.num_channels


# Memory.


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one process at the peak of a step, the beginning of the backward pass.

    Attributes:
        parameters: float32; under FSDP2 a share of the blocks, and the two blocks that are gathered at a time.
        gradients, moments: float32; AdamW keeps two moments.
        copies: the weights as autocast hands them to matrix products, kept for the backward pass.
        activations: what the backward pass needs of a micro-batch, and the images.
    """

    parameters: int
    gradients: int
    moments: int
    copies: int
    activations: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.moments + self.copies + self.activations


def memory(
    model: MaskedAutoencoder,
    *,
    micro_batch: int,
    num_processes: int = 1,
    sharded: bool = False,
    recompute: bool = False,
    precision: str = "bf16",
    mask_ratio: float | None = None,
) -> Memory:
    """Peak memory of one GPU by formula. (A CPU keeps less: see ``mae_transfer.recompute``.)

    Args:
        micro_batch: images of a process in one accumulation round.
        num_processes: that FSDP2 shards over; DDP keeps everything everywhere.
        sharded: FSDP2 instead of DDP.
        recompute: activation checkpointing of every block.
    """
    blocks = [*model.blocks, *model.decoder_blocks]
    largest = max(_count(block) for block in blocks)
    total, trained = _count(model), _count(model, trained=True)
    rest = total - sum(map(_count, blocks))
    matrices = sum(p.numel() for p in model.parameters() if p.requires_grad and p.ndim >= 2)
    arithmetic = 4 if precision == "fp32" else 2
    copies = 0 if precision == "fp32" else arithmetic * matrices
    activations, one_block = _activation_bytes(model, arithmetic, recompute=recompute, mask_ratio=mask_ratio)
    activations, one_block = micro_batch * activations, micro_batch * one_block
    if recompute:
        # The casts live to the end of the forward pass; then one block at a time is computed again, its casts too.
        block_copies = 0 if precision == "fp32" else arithmetic * largest
        copies, activations = max(copies - one_block, block_copies), activations + one_block
    if not sharded:
        return Memory(
            parameters=4 * total, gradients=4 * trained, moments=8 * trained, copies=copies, activations=activations
        )
    share = -(-total // num_processes), -(-trained // num_processes)
    return Memory(
        parameters=4 * (share[0] + 2 * largest + rest),
        gradients=4 * (share[1] + largest + rest),
        moments=8 * share[1],
        copies=copies,
        activations=activations,
    )


def activation_bytes(model: MaskedAutoencoder, *, precision: str = "bf16", mask_ratio: float | None = None) -> int:
    """What autograd keeps of one image's forward pass under autocast, with attention fused (flash)."""
    return _activation_bytes(model, 4 if precision == "fp32" else 2, recompute=False, mask_ratio=mask_ratio)[0]


def _activation_bytes(
    model: MaskedAutoencoder, arithmetic: int, *, recompute: bool, mask_ratio: float | None
) -> tuple[int, int]:
    """(bytes kept of an image, bytes of the largest single block).

    The residual stream and the norms are float32 under autocast; what matrix products read is of ``arithmetic`` bytes.
    """
    work = forward_work(model, mask_ratio=mask_ratio)
    num_patches = model.grid[0] * model.grid[1]
    visible = num_visible(num_patches, model.mask_ratio if mask_ratio is None else mask_ratio)
    values, encoded, decoded = _patch_values(model), work.encoder_tokens, work.decoder_tokens
    width, decoder_width = model.width, model.decoder_width
    hidden = model.get_parameter("blocks.0.mlp.fc1.weight").shape[0]
    decoder_hidden = model.get_parameter("decoder_blocks.0.mlp.fc1.weight").shape[0]
    encoder_block = _block_bytes(encoded, width, hidden, model.num_heads, arithmetic)
    predicted = decoded if model.decoder == "cross" else num_patches - visible
    if model.decoder == "cross":
        # Keys and values come from the encoder's tokens, normalised and cast anew for each block where they are mixed.
        mixed = (4 + 8 / width) * width if model.wfm is not None else 0
        decoder_block = _block_bytes(decoded, decoder_width, decoder_hidden, model.decoder_num_heads, arithmetic)
        decoder_block += -2 * arithmetic * decoded * decoder_width
        decoder_block += int(encoded * (2 * arithmetic * decoder_width + arithmetic * width + mixed))
        between = 0
        if model.wfm is not None:  # the features side by side, and as the product reads them
            between = (1 + model.depth) * encoded * width * (4 + (arithmetic if arithmetic < 4 else 0))
    else:
        decoder_block = _block_bytes(decoded, decoder_width, decoder_hidden, model.decoder_num_heads, arithmetic)
        between = arithmetic * encoded * width
    once = (
        arithmetic * visible * values  # what the patch projection reads
        + (4 * width + 8) * encoded  # the last norm of the encoder …
        + between
        + (4 * decoder_width + 8) * decoded  # … and of the decoder
        + arithmetic * predicted * decoder_width
        + 4 * predicted * values  # prediction − target
        + 2 * 4 * num_patches * values  # the images and their patches
    )
    if recompute:
        kept = model.depth * 4 * encoded * width + model.decoder_depth * 4 * decoded * decoder_width
    else:
        kept = model.depth * encoder_block + model.decoder_depth * decoder_block
    return once + kept, max(encoder_block, decoder_block)


def _block_bytes(tokens: int, width: int, hidden: int, heads: int, arithmetic: int) -> int:
    """One block: inputs of two norms with their statistics, of four linear layers and of GELU; q, k, v; the
    log-sum-exp of fused attention (whose output is what the projection reads)."""
    return tokens * (2 * (4 * width + 8) + arithmetic * (6 * width + 2 * hidden) + 4 * heads)


def _count(module: nn.Module, *, trained: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


# Hours.


@dataclass(frozen=True, kw_only=True)
class Device:
    """One accelerator: dense bf16 (fp16 for V100) peak with float32 accumulation in TFLOP/s, memory in GiB, and the
    share of that peak that a plan assumes to be reached."""

    tflops: float
    memory_gib: float
    mfu: float = 0.4


# Of the manufacturers' data sheets, dense rates (no sparsity), SXM where there are several.
DEVICES: dict[str, Device] = {
    "v100": Device(tflops=125, memory_gib=32, mfu=0.35),  # NVIDIA V100 datasheet: tensor, fp16; 32 GB version
    "a100": Device(tflops=312, memory_gib=80),  # NVIDIA A100 80GB datasheet
    "a100-40gb": Device(tflops=312, memory_gib=40),
    "l40s": Device(tflops=362, memory_gib=48),  # NVIDIA L40S datasheet: 733 TFLOP/s with sparsity, half without
    "rtx4090": Device(tflops=165, memory_gib=24),  # NVIDIA Ada whitepaper: fp16 with fp32 accumulate, dense
    "h100": Device(tflops=989, memory_gib=80),  # NVIDIA H100 SXM datasheet
    "h200": Device(tflops=989, memory_gib=141),  # NVIDIA H200 datasheet: as H100, 141 GB
    # Google Cloud's TPU v3 page: 123 TFLOP/s and 32 GiB a chip of two cores. The MFU is fitted, once, to the MAE
    # paper's six wall clocks on 128 cores (Table 2 and appendix), whose single values it then meets within 11 %.
    "tpu-v3": Device(tflops=61.5, memory_gib=16, mfu=0.31),
}


def hours(flops_per_image: float, *, num_images: float, device: Device, count: int, mfu: float | None = None) -> float:
    """Wall clock of training on ``num_images`` images (all epochs together)."""
    rate = count * device.tflops * 1e12 * (device.mfu if mfu is None else mfu)
    return flops_per_image * num_images / rate / 3600


# The report.


def parse_plan(given: Sequence[str]) -> dict[str, Any]:
    """``["gpus=64", "kind=h100"]`` as arguments of ``plan``; ``mfu=0.5`` and ``images=…`` replace its assumptions.

    Raises:
        ConfigError: something else, or one of the two missing.
    """
    readers = {"gpus": int, "kind": str, "mfu": float, "images": int}
    values: dict[str, Any] = {}
    for part in given:
        key, equals, text = part.partition("=")
        if not equals or key not in readers:
            raise ConfigError(f"--plan {part}: expected gpus=N kind=K, and if wanted mfu=0.4 images=N")
        try:
            values[key] = readers[key](text)
        except ValueError:
            raise ConfigError(f"--plan {part}: {text!r} is no number") from None
    missing = [key for key in ("gpus", "kind") if key not in values]
    if missing:
        raise ConfigError(f"--plan lacks {' and '.join(missing)}; for example: --plan gpus=64 kind=h100")
    return values


def plan(
    config: PretrainConfig, *, gpus: int, kind: str, mfu: float | None = None, images: int = IMAGENET_IMAGES
) -> str:
    """What ``--plan`` prints: memory of each GPU and hours of this run, and of the same with ViT-B, L and H.

    Nothing is started, no data read, no weight allocated.

    Raises:
        ConfigError: an unknown kind, no length, a batch that does not divide among the GPUs.
    """
    if kind not in DEVICES:
        guess = nearest(kind, DEVICES)
        raise ConfigError(
            f"--plan kind={kind} is not known{f'; did you mean {guess}?' if guess else ''} Kinds: {', '.join(DEVICES)}"
        )
    if gpus < 1 or images < 1 or (mfu is not None and not 0 < mfu <= 1):
        raise ConfigError(f"--plan gpus={gpus} mfu={mfu} images={images}: expected gpus, images >= 1 and 0 < mfu <= 1")
    device, train = DEVICES[kind], config.train
    share, left = divmod(train.batch_size, gpus * train.accumulate)
    if left or not share:
        step = gpus * train.accumulate
        near = sorted({max(1, share) * step, (share + 1) * step})
        raise ConfigError(
            f"train.batch_size={train.batch_size} does not divide among {gpus} GPUs and {train.accumulate} rounds; "
            f"nearest that does: {' or '.join(map(str, near))}"
        )
    if train.steps is None and train.epochs is None:
        raise ConfigError("the length of the run is not set; give train.epochs=… or train.steps=…")
    seen = train.steps * train.batch_size if train.steps is not None else (train.epochs or 0) * images
    reached = device.mfu if mfu is None else mfu
    length = f"{train.steps} steps" if train.steps is not None else f"{train.epochs:g} epochs of {images:,} images"
    lines = [
        f"plan: {gpus} x {kind}, {length}, global batch {train.batch_size} = {gpus} x {share} images"
        + (f" x {train.accumulate} rounds" if train.accumulate > 1 else ""),
        "",
        f"{'':<24}{'GFLOP':>10}{'hours':>17}{'images/s':>10}   GiB on each GPU (+ recomputing activations)",
        f"{'model':<14}{'M param.':>10}{'an image':>10}{'(+ recomputing)':>17}{'a GPU':>10}   {'DDP':>8}{'FSDP2':>20}",
    ]
    notes: list[str] = []
    for name, variant in _rows(config, notes):
        lines.append(_row(name, variant, device=device, gpus=gpus, share=share, seen=seen, mfu=reached))
    lines += [
        "",
        "assumed:",
        f"  MFU {reached:.0%} of {device.tflops:g} TFLOP/s (dense bf16 peak of one {kind}), which narrow models and "
        "small images do not reach; mfu=… replaces it, and --dry-run on one such GPU measures it",
        "  operations: matrix products of the forward pass, x 3 for both passes, x 4 where blocks are recomputed",
        "  memory: parameters, gradients and AdamW's two moments in float32, autocast copies of the weights, "
        f"activations of {share} images with fused attention; about 2 GiB for context, libraries and fragmentation "
        f"come on top; ! marks what is then more than the {device.memory_gib:g} GiB of a {kind}",
        "  exchange between GPUs hidden behind the backward pass; the loader keeps up (images/s a GPU above); "
        "evaluation and pictures not counted",
    ]
    if train.steps is None and images == IMAGENET_IMAGES:
        lines.append("  ImageNet-1K's number of images, whatever data.path holds; images=… replaces it")
    return "\n".join(lines + [f"  {note}" for note in notes])


def _rows(config: PretrainConfig, notes: list[str]) -> list[tuple[str, PretrainConfig]]:
    """This config, and the same with the other sizes of the paper, decoders as each has them."""
    rows = [(f"this ({config.model.size})", config)]
    for size in ("base", "large", "huge"):
        if size == config.model.size:
            continue
        keys = ("patch_size", "width", "depth", "num_heads", "decoder_dim", "decoder_depth", "decoder_num_heads")
        own: dict[str, Any] = dict.fromkeys(keys)
        model = replace(config.model, size=size, **own)
        try:
            rows.append((f"ViT-{size[0].upper()}", replace(config, model=model)))
        except ConfigError as error:
            notes.append(f"no row for {size}: {error}")
    return rows


def _row(name: str, config: PretrainConfig, *, device: Device, gpus: int, share: int, seen: float, mfu: float) -> str:
    model = meta_model(config)
    ratio = config.mask.ratio
    flops = training_flops(model, mask_ratio=ratio)
    blocks = flops * 4 / 3
    times = [hours(work, num_images=seen, device=device, count=gpus, mfu=mfu) for work in (flops, blocks)]
    cells = []
    for sharded in (False, True):
        totals = [
            memory(
                model,
                micro_batch=share,
                num_processes=gpus,
                sharded=sharded,
                recompute=recompute,
                precision="bf16",
                mask_ratio=ratio,
            ).total
            / 2**30
            for recompute in (False, True)
        ]
        cells.append("".join(f"{gib:>8.1f}{'!' if gib + 2 > device.memory_gib else ' '}" for gib in totals))
    rate = seen / gpus / (times[0] * 3600)
    return (
        f"{name:<14}{_count(model) / 1e6:>10.2f}{flops / 1e9:>10.1f}{times[0]:>9.1f} {f'({times[1]:.1f})':>7}"
        f"{rate:>10.0f}   {cells[0]}  {cells[1]}"
    )


def meta_model(config: PretrainConfig) -> MaskedAutoencoder:
    """The model of a config without its weights."""
    with torch.device("meta"):
        return build_mae(**config.model_arguments)
