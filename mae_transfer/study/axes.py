"""The axes of the paper's ablations (He et al. 2022, Figure 5, Table 1, Figure 9), as trainings of a small model.

What is pretrained in each is the small config of ``configs/pretrain/study.yaml`` with what the row says changed, so
that rows of different axes that say the same thing are one pretraining. The paper's numbers stand beside: ViT-L, 800
epochs of ImageNet, top-1 of 1000 classes. They are there for their order; their height cannot be compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

SCRATCH = "random weights"
FINETUNE, LINEAR, PARTIAL = "fine-tune", "linear", "partial"


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """A pretraining by its name and what it changes of the study's config."""

    name: str
    settings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A training on labels by its name, its file in ``configs/classification``, and what it changes of that."""

    name: str
    config: str
    settings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of a table: a pretraining (none: random weights), how it is judged, and what the paper has for it.

    Attributes:
        evaluations, paper: by the column's name; per cent of the images in the latter.
        position: where it stands on the axis of a figure, where that is a number.
    """

    label: str
    pretraining: Pretraining | None
    evaluations: Mapping[str, Evaluation]
    paper: Mapping[str, float] = field(default_factory=dict)
    position: float | None = None


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Rows that differ in one thing.

    Attributes:
        baseline: label of the row that the others are compared with.
        seeds: how many are run unless told otherwise.
        source: where the paper has it.
    """

    name: str
    title: str
    x_label: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    baseline: str
    seeds: int
    source: str


_FINETUNE = Evaluation(name="finetune", config="study_finetune.yaml")
_LINEAR = Evaluation(name="linear", config="study_linear.yaml")
EVALUATIONS = (_FINETUNE, _LINEAR)
_BOTH = {FINETUNE: _FINETUNE, LINEAR: _LINEAR}

BASELINE = Pretraining(name="random-75")
DEPTH = 6  # blocks of the study's encoder


def _row(
    label: str,
    pretraining: Pretraining | None,
    finetune: float | None = None,
    linear: float | None = None,
    position: float | None = None,
) -> Row:
    paper = {column: value for column, value in ((FINETUNE, finetune), (LINEAR, linear)) if value is not None}
    return Row(label=label, pretraining=pretraining, evaluations=_BOTH, paper=paper, position=position)


def _masked(ratio: int, kind: str = "random") -> Pretraining:
    """Per cent of the patches hidden, and how."""
    settings = [] if kind == "random" else [f"mask.kind={kind}"]
    settings += [] if ratio == 75 else [f"mask.ratio={ratio / 100:g}"]
    return Pretraining(name=f"{kind}-{ratio}", settings=tuple(settings))


def _decoder(what: str, value: int) -> Pretraining:
    key = {"depth": "decoder_depth", "width": "decoder_dim"}[what]
    return Pretraining(name=f"decoder-{what}-{value}", settings=(f"model.{key}={value}",))


def _tuned(blocks: float) -> Row:
    """The baseline's encoder with its last blocks trained on labels: none is a linear probe, all is fine-tuning."""
    paper: float | None
    if blocks == 0:
        label, evaluation, paper = "0 (linear probe)", _LINEAR, 73.5
    elif blocks == DEPTH:
        label, evaluation, paper = f"{DEPTH} (all)", _FINETUNE, 84.9
    else:
        label, paper = f"{blocks:g}", 81.0 if blocks == 1 else None
        settings = ("protocol=partial", f"partial.blocks={blocks:g}")
        evaluation = Evaluation(name=f"partial-{blocks:g}", config=_FINETUNE.config, settings=settings)
    return Row(
        label=label,
        pretraining=BASELINE,
        evaluations={PARTIAL: evaluation},
        paper={} if paper is None else {PARTIAL: paper},
        position=blocks,
    )


AXES: dict[str, Axis] = {
    axis.name: axis
    for axis in (
        Axis(
            name="ratio",
            title="Masking ratio",
            x_label="masked patches, %",
            columns=(FINETUNE, LINEAR),
            # Figure 5 is a drawing; its text gives the two ends of the linear probe's curve.
            rows=(
                _row("10 %", _masked(10), None, 54.6, 10),
                _row("25 %", _masked(25), position=25),
                _row("50 %", _masked(50), position=50),
                _row("75 %", BASELINE, 84.9, 73.5, 75),
                _row("90 %", _masked(90), position=90),
            ),
            baseline="75 %",
            seeds=3,
            source="Figure 5",
        ),
        Axis(
            name="masking",
            title="Kind of mask",
            x_label="mask",
            columns=(FINETUNE, LINEAR),
            rows=(
                _row("random 75 %", BASELINE, 84.9, 73.5),
                _row("block 50 %", _masked(50, "block"), 83.9, 72.3),
                _row("block 75 %", _masked(75, "block"), 82.8, 63.9),
                _row("grid 75 %", _masked(75, "grid"), 84.0, 66.0),
            ),
            baseline="random 75 %",
            seeds=3,
            source="Table 1f",
        ),
        Axis(
            name="target",
            title="Target of the reconstruction",
            x_label="target",
            columns=(FINETUNE, LINEAR),
            rows=(
                _row("pixels", BASELINE, 84.9, 73.5),
                _row(
                    "normalised pixels",
                    Pretraining(name="normalised", settings=("model.norm_pix_loss=true",)),
                    *(85.4, 73.9),
                ),
            ),
            baseline="pixels",
            seeds=1,
            source="Table 1d",
        ),
        Axis(
            name="decoder",
            title="Decoder, and mask tokens in the encoder",
            x_label="decoder",
            columns=(FINETUNE, LINEAR),
            # The study's decoder has a quarter of the paper's blocks and an eighth of its width; a row stands beside
            # the paper's of the same place in the order: smallest, default, larger.
            rows=(
                _row("2 blocks, 64 wide", BASELINE, 84.9, 73.5),
                _row("1 block", _decoder("depth", 1), 84.8, 65.5),
                _row("4 blocks", _decoder("depth", 4), 84.4, 73.3),
                _row("32 wide", _decoder("width", 32), 84.9, 69.1),
                _row("128 wide", _decoder("width", 128), 84.3, 73.1),
                _row(
                    "mask tokens in the encoder",
                    Pretraining(name="mask-tokens", settings=("model.mask_tokens_in_encoder=true",)),
                    *(84.2, 59.6),
                ),
            ),
            baseline="2 blocks, 64 wide",
            seeds=1,
            source="Table 1a-c",
        ),
        Axis(
            name="partial",
            title="Partial fine-tuning",
            x_label="blocks fine-tuned",
            columns=(PARTIAL,),
            rows=tuple(_tuned(blocks) for blocks in (0, 0.5, 1, 2, 4, DEPTH)),
            baseline="0 (linear probe)",
            seeds=1,
            source="Figure 9",
        ),
    )
}


def rows_of(axis: Axis) -> Iterator[Row]:
    """The rows of an axis, and random weights last."""
    yield from axis.rows
    # Judged as the row that changes most: where columns differ in how much is trained, all of it.
    yield Row(label=SCRATCH, pretraining=None, evaluations=axis.rows[-1].evaluations)
