"""The model card beside an export: README.md, with the metadata block by which the Hub sorts models."""

from __future__ import annotations

import hashlib
from pathlib import Path

import yaml

from mae_transfer.checkpoint.files import atomic_write
from mae_transfer.checkpoint.formats import Exported, Format
from mae_transfer.checkpoint.formats.base import parts, traits
from mae_transfer.checkpoint.formats.timm import timm_arguments
from mae_transfer.checkpoint.read import Checkpoint

# A card of ours says which export it is of; any other README.md is somebody's own.
_MARK = "<!-- model card of {}, written by mae-transfer -->"
# What a licence is called where the Hub has no name of its own for it.
_OTHER = {
    "dinov3": ("dinov3-license", "https://ai.meta.com/resources/models-and-libraries/dinov3-license"),
    "hf-dinov3": ("dinov3-license", "https://ai.meta.com/resources/models-and-libraries/dinov3-license"),
}
_ABOUT_LICENSES = {
    "": "The source names no licence, and none is known for its family: ask its authors before you use or share it.",
    "cc-by-nc-4.0": "CC-BY-NC 4.0, as the weights that it was made from were released: no commercial use, and name "
    "their authors. That holds for what is fine-tuned from it too.",
    "other": "A licence of its own, which goes on with the weights: see the link above, or the source.",
}


def write_card(destination: Path, checkpoint: Checkpoint, exported: Exported, format: Format) -> Path:
    """Write the card of what was exported to ``destination`` (a file, or a folder), beside it.

    It is README.md, or ``<name>.README.md`` where a README.md stands that is not this export's own card.

    Returns:
        Where it is.
    """
    folder = destination if format.name == "hf" else destination.parent
    name = "README.md" if _may_write(folder / "README.md", destination) else f"{destination.name}.README.md"
    with atomic_write(folder / name) as temporary:
        temporary.write_text(card(destination, checkpoint, exported, format), encoding="utf-8")
    return folder / name


def _may_write(path: Path, destination: Path) -> bool:
    return not path.exists() or _MARK.format(destination.name) in path.read_text(encoding="utf-8", errors="replace")


def card(destination: Path, checkpoint: Checkpoint, exported: Exported, format: Format) -> str:
    """The card's text."""
    info = checkpoint.info
    height, width = info.image_size
    weights = destination / "model.safetensors" if format.name == "hf" else destination
    rows = {
        "weights": f"`{weights.name}`, {format.title}; sha256 `{sha256(weights)}`",
        "from": f"{info.source or '/'.join(checkpoint.path.parts[-2:])} ({info.family})",
        "encoder": f"{info.size}: width {info.width}, depth {info.depth}, {info.num_heads} heads",
        "patch, image": f"{info.patch_size[0]}x{info.patch_size[1]} px, {height}x{width} px, {info.channels} channels",
        "mean, std": f"{_numbers(info.mean)}, {_numbers(info.std)}, of values from 0 to 1"
        + ("" if checkpoint.has_metadata else " (the family's: the source does not say)"),
    }
    if besides := traits(checkpoint.tensors, info):
        rows["besides"] = ", ".join(besides.values())
    if info.git_commit:
        rows["made by"] = f"commit {info.git_commit} of mae-transfer"
    if exported.left_out:
        rows["left out"] = f"{parts(exported.left_out)}, which the format does not hold"
    table = "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
    sections = [
        f"---\n{yaml.safe_dump(hub_metadata(checkpoint, format), sort_keys=False, allow_unicode=True)}---",
        _MARK.format(destination.name),
        f"# {destination.stem if format.endings else destination.name}\n\n"
        f"A Vision Transformer's encoder{', with its MAE decoder' if _has_decoder(exported) else ''}, "
        f"for {format.title}.",
        table,
        f"## Licence\n\n{_ABOUT_LICENSES.get(info.license, f'`{info.license}`, as the source has it.')}",
        f"## Use\n\n```python\n{_usage(destination, checkpoint, exported, format)}\n```",
    ]
    if recipe := _recipe(checkpoint.path):
        sections.append(f"## Recipe\n\nThe run that it comes from, `config.yaml`:\n\n```yaml\n{recipe}\n```")
    return "\n\n".join(sections) + "\n"


def hub_metadata(checkpoint: Checkpoint, format: Format) -> dict[str, object]:
    """The block at a card's head, as the Hub reads it."""
    info = checkpoint.info
    values: dict[str, object] = {"license": info.license or "unknown"}
    if info.license == "other" and info.family in _OTHER:
        values["license_name"], values["license_link"] = _OTHER[info.family]
    values |= {
        "library_name": format.library,
        "pipeline_tag": "image-feature-extraction",
        "tags": list(dict.fromkeys(["vision-transformer", "mae-transfer", info.family])),
    }
    if "/" in info.source and not info.source.startswith("/"):
        values["base_model"] = info.source.split("@")[0]
    return values


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _has_decoder(exported: Exported) -> bool:
    return any("decoder_pred" in name for name in exported.tensors)


def _numbers(values: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"


def _recipe(path: Path) -> str:
    """Config of the run that a checkpoint lies in, without the places of its files, which are nobody's business; ""
    where it lies in none."""
    for folder in (path.parent, path.parent.parent):  # the run's folder, or its checkpoints/
        config = folder / "config.yaml"
        if config.is_file() and (folder / "metrics.jsonl").is_file():
            sections = yaml.safe_load(config.read_text(encoding="utf-8"))
            return yaml.safe_dump(_without_places(sections), sort_keys=False).strip()
    return ""


def _without_places(node: object) -> object:
    if isinstance(node, dict):
        kept = {key: value if str(value).startswith("hf:") else _without_places(value) for key, value in node.items()}
        return {key: value for key, value in kept.items() if value is not None}
    return None if isinstance(node, str) and ("/" in node or "\\" in node) else node


def _usage(destination: Path, checkpoint: Checkpoint, exported: Exported, format: Format) -> str:
    name = destination.name
    if format.name == "hf":
        model = "ViTMAEForPreTraining" if _has_decoder(exported) else "ViTMAEModel"
        note = "  # shuffles the patches, unless given noise that rises" if model == "ViTMAEModel" else ""
        return f'from transformers import {model}\n\nmodel = {model}.from_pretrained("{name}"){note}'
    if format.name == "timm":
        return _timm_usage(destination, checkpoint, exported)
    if format.name == "mmseg":
        return f'model = dict(backbone=dict(type="MAEViT", init_checkpoint="{name}"))  # mae_transfer.segmentation'
    if format.name == "detectron2":
        return f'train.init_checkpoint = "{name}"  # tools/train_det.py; names are backbone.net.*, as in Detectron2'
    return f'from mae_transfer import build_backbone\n\nvit = build_backbone("{name}")'


def _timm_usage(destination: Path, checkpoint: Checkpoint, exported: Exported) -> str:
    info, name = checkpoint.info, destination.name
    gated = info.ffn == "swiglu"
    arguments = [f"{key}={value!r}," for key, value in timm_arguments(exported.tensors, info).items()]
    arguments.append(f"norm_layer=partial(torch.nn.LayerNorm, eps={info.norm_eps:g}),")
    if gated:
        arguments += ["mlp_layer=SwiGLUPacked,", "act_layer=torch.nn.SiLU,"]
    single = destination.suffix == ".safetensors"
    lines = ["from functools import partial", "", "import timm", "import torch"]
    lines += ["from safetensors.torch import load_file"] if single else []
    lines += ["from timm.layers import SwiGLUPacked"] if gated else []
    weights = f'load_file("{name}")' if single else f'torch.load("{name}", weights_only=True)["model"]'
    lines += ["", "model = timm.create_model(", '    "vit_base_patch16_224",']
    return "\n".join([*lines, *(f"    {argument}" for argument in arguments), ")", f"model.load_state_dict({weights})"])
