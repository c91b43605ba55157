"""One reader for every supported checkpoint: recognise the family, return tensors in our key names."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from mae_transfer.checkpoint import families, formats, hub
from mae_transfer.checkpoint.build import empty_encoder
from mae_transfer.checkpoint.families.plain import is_moco_v3, is_released
from mae_transfer.checkpoint.files import read_safetensors, read_torch
from mae_transfer.checkpoint.hub import HUGGING_FACE_FILES
from mae_transfer.checkpoint.info import EncoderInfo, infer_info
from mae_transfer.checkpoint.names import summarise
from mae_transfer.checkpoint.pickles import read_pickle
from mae_transfer.checkpoint.sharded import is_sharded, read_facts, read_shards
from mae_transfer.errors import CheckpointError, ConfigError, UserError

# The state dict of a training checkpoint hides below one of these; an average of the weights is what timm reads too.
_NESTS = ("state_dict_ema", "model_ema", "model", "state_dict", "model_state", "module", "teacher", "student")

_HOSTS = ("detectron2", "mmseg")  # which have encoders without a cls token and norm
_OF_A_BLOCK = re.compile(r"(^|\.)(blocks|layers?)\.\d+\.")
# Where a tensor that the encoder here has no place for changes its features.
_OF_AN_ENCODER = re.compile(r"^(patch_embed|blocks|norm|norm_pre|rope|rel_pos_bias|pos_embed\w*|cls_token\w*)(\.|$)")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint in memory.

    Attributes:
        path: the file read.
        family: "mae-transfer" (ours), a name of ``families.FAMILIES``, or, by what stands around the encoder,
            "detectron2", "mmseg", "dino", "moco-v3".
        tensors: in our key names; decoder and heads included where the file has them.
        info: architecture and input convention.
        has_metadata: the input convention was read from the file, not assumed.
        certain: fields of ``info`` that the file or its family says, where others follow from the shapes.
        left_out: names in the file that have no place here; of other state dicts in it, with what they stand below.
    """

    path: Path
    family: str
    tensors: dict[str, Tensor]
    info: EncoderInfo
    has_metadata: bool
    certain: frozenset[str] = frozenset()
    left_out: list[str] = field(default_factory=list)


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read any supported checkpoint file, a run folder of ours, or a sharded training state in one.

    Args:
        path: or an address: "hf://owner/name[@revision][/file]", "timm/name".

    Raises:
        CheckpointError: missing, damaged, unsafe, or of an unknown family; an address that cannot be reached.
    """
    if not hub.is_address(path):
        return _read(resolve_path(path))
    fetched = hub.fetch(path)
    checkpoint = _read(fetched.path)
    # What the file says of itself stands; its place says where it is from, and the rest.
    ours = "license" in checkpoint.certain
    said = {"source": fetched.fields["source"]} if ours else fetched.fields
    if not checkpoint.info.license:
        said = {"license": fetched.fields.get("license", "")} | said
    return replace(checkpoint, info=replace(checkpoint.info, **said), certain=checkpoint.certain | said.keys())


def _read(path: Path) -> Checkpoint:
    tensors, metadata, passed_over = _read_file(path)
    checkpoint = _of_tensors(path, tensors, metadata)
    return replace(checkpoint, left_out=[*checkpoint.left_out, *passed_over])


def _of_tensors(path: Path, tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> Checkpoint:
    if {"family", "width", "num_heads"} <= metadata.keys():  # ours; others may have a "family" too
        info = EncoderInfo.from_metadata(metadata, str(path))
        if names := metadata.get("names"):
            tensors, left_out = formats.restore(tensors, info, names, path), list[str]()
        else:
            tensors, left_out = _below(tensors, _own_prefix(tensors))
        return Checkpoint(
            path=path,
            family=info.family,
            tensors=tensors,
            info=info,
            has_metadata=True,
            certain=frozenset(field.name for field in fields(info)),
            left_out=left_out,
        )
    return _read_family(path, tensors)


def _read_family(path: Path, tensors: dict[str, Tensor]) -> Checkpoint:
    """A file of somebody else's, or one of ours that a host has saved."""
    found = families.recognise(tensors)
    if found is None:
        return _read_hosted(path, tensors)
    family, prefix = found
    if family.name == "vit-gap" and (_by_surroundings(prefix, tensors) or ("", ""))[0] in _HOSTS:
        return _read_hosted(path, tensors)  # its table keeps the row of the cls token that the host does without
    own, outside = {}, {}
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            own[name[len(prefix) :]] = tensor
        else:
            outside[name] = tensor
    config = read_config(path)
    with _damage_told(path, family.title):
        converted = family.convert(families.Raw(path=path, tensors=own, prefix=prefix, outside=outside, config=config))
    _check_activation(config, converted, path)
    strange = [name for name in converted.left_out if name in own and _OF_A_BLOCK.search(name)]
    if strange:
        raise CheckpointError(
            f"{path} looks like {family.title}, but its blocks have {summarise(strange)}, of a variant that is not "
            "known here"
        )
    around = _by_surroundings(prefix, outside) if family.name == "vit" else None
    name, license = around or (family.name, family.license_beside(config))
    with _damage_told(path, family.title):
        said = hub.said_beside_timms(config, converted.tensors["patch_embed.proj.weight"].shape[0])
        facts = {"mean": family.mean, "std": family.std, "source": path.name, "license": license} | said
        info = infer_info(converted.tensors, family=name, source=str(path), fields=facts | converted.fields)
        check_complete(converted.tensors, info, path, family.title)
    if name == "vit" and info.positions == "sincos":
        # MAE's encoder alone has timm's names; of the families in these, it alone has this fixed table.
        info = replace(info, family="mae", license="cc-by-nc-4.0")
    elif name == "vit" and is_moco_v3(converted.tensors, prefix):
        info = replace(info, family="moco-v3", license="cc-by-nc-4.0")
    elif not is_released(info):
        info = replace(info, family="vit", license=said.get("license", ""))
    return Checkpoint(
        path=path,
        family=info.family,
        tensors=converted.tensors,
        info=info,
        has_metadata="image_mean" in config or "mean" in said,
        certain=frozenset({*converted.fields, *said}),
        left_out=converted.left_out,
    )


@contextmanager
def _damage_told(path: Path, title: str) -> Iterator[None]:
    """Tensors of shapes that no code expects fail wherever they are first used: said of the file, as an error of ours.

    Raises:
        CheckpointError: in place of what arithmetic raises.
    """
    try:
        yield
    except UserError:
        raise
    except (ArithmeticError, LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} looks like {title}, but its tensors or its config.json do not go together "
            f"({type(error).__name__}: {error}); the file is damaged, or of a variant that is not known here"
        ) from error


def _check_activation(config: Mapping[str, Any], converted: families.Converted, path: Path) -> None:
    """Raises CheckpointError where ``config.json`` names another activation than the encoder has: GELU, and SiLU in
    a gated MLP."""
    said = config.get("hidden_act", "gelu")
    if said != "gelu" and not (said == "silu" and converted.fields.get("ffn") == "swiglu"):
        raise CheckpointError(
            f"{path}: the config.json beside it says hidden_act {said!r}; the encoder here has 'gelu' in a plain MLP, "
            "'silu' in a gated one"
        )


def _by_surroundings(prefix: str, outside: Iterable[str]) -> tuple[str, str] | None:
    """Family and licence by what stands around an encoder whose own names many share."""
    if "base_encoder." in prefix or "momentum_encoder." in prefix:
        return "moco-v3", "cc-by-nc-4.0"
    if prefix.endswith("backbone.net."):
        return "detectron2", ""
    if prefix.endswith("backbone."):
        dino = any("head.mlp." in name or "head.last_layer." in name for name in outside)
        return ("dino", "apache-2.0") if dino else ("mmseg", "")
    return None


def _read_hosted(path: Path, tensors: dict[str, Tensor]) -> Checkpoint:
    """An encoder in our names inside a detector or segmenter, which may lack a cls token and norm."""
    prefix = _own_prefix(tensors)
    below, left_out = _below(tensors, prefix)
    around = _by_surroundings(prefix, left_out)
    if around is None or around[0] not in _HOSTS:
        raise _unknown(path, tensors)
    family = around[0]
    with _damage_told(path, title := f"an encoder inside {family}"):
        info = infer_info(below, family=family, source=str(path), fields={"source": path.name})
        check_complete(below, info, path, title)
    return Checkpoint(path=path, family=family, tensors=below, info=info, has_metadata=False, left_out=left_out)


def _own_prefix(tensors: Mapping[str, Tensor]) -> str:
    """What stands before an encoder in our names; nothing where there is none."""
    return next((prefix for prefix in families.prefixes(tensors) if f"{prefix}patch_embed.proj.weight" in tensors), "")


def _below(tensors: Mapping[str, Tensor], prefix: str) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors below a prefix, and the names of the others, which are a host's."""
    below = {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return below, [name for name in tensors if not name.startswith(prefix)]


def _unknown(path: Path, tensors: Mapping[str, Tensor]) -> CheckpointError:
    names = list(tensors)
    family, share = families.nearest(names)
    shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
    known = ", ".join(dict.fromkeys(family.title for family in families.FAMILIES))
    if share == 0:
        hint = f"expected a Vision Transformer of a family known here: {known}"
    else:
        absent = family.absent(below for prefix in ["", *families.prefixes(names)] for below in [_names(names, prefix)])
        hint = f"nearest is {family.title}, of which it lacks {', '.join(absent)}. Families known here: {known}"
    return CheckpointError(f"{path} holds {len(names)} tensors of no known family ({shown}); {hint}")


def _names(names: list[str], prefix: str) -> list[str]:
    return [name[len(prefix) :] for name in names if name.startswith(prefix)]


def check_complete(tensors: Mapping[str, Tensor], info: EncoderInfo, path: Path, title: str) -> None:
    """Raises CheckpointError where an encoder lacks tensors, has others of a block besides, or has them in shapes that
    do not go together."""
    try:
        wanted: dict[str, tuple[int, ...]] = {
            name: tuple(tensor.shape) for name, tensor in empty_encoder(info).state_dict().items()
        }
    except ConfigError as error:
        raise CheckpointError(f"{path} looks like {title}, but its numbers do not go together: {error}") from error
    if any(name.startswith("fc_norm.") for name in tensors):  # half of a norm is none: see ``pooled_norm``
        wanted |= {f"fc_norm.{part}": (info.width,) for part in ("weight", "bias")}
    missing = [name for name in wanted if name not in tensors]
    besides = [name for name in tensors if _OF_AN_ENCODER.match(name) and name not in wanted]
    shapes = [
        f"{name} is {tuple(tensors[name].shape)}, expected {shape}"
        for name, shape in wanted.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    problems = [f"missing {_few(missing)}"] if missing else []
    problems += [f"not of such a model {_few(besides)}"] if besides else []
    problems += [_few(shapes)] if shapes else []
    if problems:
        raise CheckpointError(
            f"{path} looks like {title}, but is no whole encoder of {info.width} wide, {info.depth} blocks: "
            f"{'; '.join(problems)}. The file is damaged or incomplete, or of a variant that is not known here"
        )


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def read_config(path: Path) -> dict[str, Any]:
    """``config.json`` and ``preprocessor_config.json`` beside a file of Hugging Face's; empty where there are none.

    Raises:
        CheckpointError: they are no JSON objects.
    """
    result: dict[str, Any] = {}
    if path.name not in HUGGING_FACE_FILES:
        return result
    for name in ("preprocessor_config.json", "config.json"):
        beside = path.with_name(name)
        if beside.is_file():
            try:
                content = json.loads(beside.read_text(encoding="utf-8"))
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise CheckpointError(f"{beside} is not valid JSON ({error}); fetch it again") from error
            if not isinstance(content, dict):
                raise CheckpointError(f"{beside} should hold a JSON object, found a {type(content).__name__}")
            vision = content.get("vision_config")
            said = vision if isinstance(vision, dict) else content
            families.check_config(said, beside)
            result |= said
    return result


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by the names they have in the file, and metadata, of any file that ``read_checkpoint`` takes.

    Raises:
        CheckpointError: missing, damaged, unsafe, or without tensors.
    """
    tensors, metadata, _ = _read_file(resolve_path(path))
    return tensors, metadata


def _read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str], list[str]]:
    """``read_tensors``, and the names of tensors in other state dicts of the file."""
    metadata: dict[str, str] = {}
    passed_over: list[str] = []
    if path.is_dir():
        tensors = {name.removeprefix("model."): tensor for name, tensor in read_shards(path, "model.").items()}
        metadata = {str(key): str(value) for key, value in read_facts(path).get("metadata", {}).items()}
    elif path.name.endswith(".index.json"):
        tensors = _read_indexed(path)
    elif path.suffix == ".safetensors":
        tensors, metadata = read_safetensors(path)
    else:
        content = read_pickle(path) if path.suffix == ".pkl" else read_torch(path)
        tensors, passed_over = find_state_dict(content, path)
        if isinstance(content, Mapping) and isinstance(content.get("metadata"), Mapping):
            metadata = {str(key): str(value) for key, value in content["metadata"].items()}
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors; expected the weights of a Vision Transformer")
    return tensors, metadata, passed_over


def _read_indexed(index: Path) -> dict[str, Tensor]:
    """A Hugging Face model in several files, of which ``index`` says where each tensor is.

    Raises:
        CheckpointError: no index, or one that names files elsewhere, or files that are missing or lack tensors.
    """
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(places.values()))
    except (json.JSONDecodeError, UnicodeDecodeError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is no index of a model in several files ({error}); fetch it again") from error
    tensors: dict[str, Tensor] = {}
    for name in names:
        file = index.with_name(Path(str(name)).name)
        if not isinstance(name, str) or Path(name).name != name or not file.is_file():
            raise CheckpointError(f"{index} names {name}, which is not beside it; fetch the whole folder again")
        safe = file.suffix == ".safetensors"
        tensors |= read_safetensors(file)[0] if safe else find_state_dict(read_torch(file), file)[0]
    if absent := [name for name in places if name not in tensors]:
        raise CheckpointError(f"{index} names {summarise(absent)}, which its files lack; fetch the whole folder again")
    return tensors


def resolve_path(path: str | Path) -> Path:
    """What to read: ``path`` itself, or ``encoder.safetensors`` of a run folder, or the weights of a Hugging Face one;
    of an address, the file in the cache.

    Raises:
        CheckpointError: nothing there.
    """
    if hub.is_address(path):
        return hub.fetch(path).path
    path = Path(path)
    if path.is_dir() and not is_sharded(path):
        names = ("encoder.safetensors", *HUGGING_FACE_FILES)
        inside = next((path / name for name in names if (path / name).is_file()), None)
        if inside is None:
            raise CheckpointError(
                f"{path} is a folder without encoder.safetensors (a finished run) and without "
                f"{' or '.join(HUGGING_FACE_FILES)} (Hugging Face); expected one of them, or a checkpoint file"
            )
        return inside
    if not path.exists():
        raise CheckpointError(f"checkpoint {path} does not exist; give the path of a .safetensors, .pth or .pkl file")
    return path


def find_state_dict(content: Any, path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The mapping of names to tensors in what ``torch.load`` gave, wherever it is nested, and the names in others
    beside it, such as the weights that an average was taken of."""
    visited: list[Any] = []
    passed_over: list[str] = []
    while isinstance(content, Mapping) and not any(content is outer for outer in visited):
        visited.append(content)
        nests = [key for key in _NESTS if isinstance(content.get(key), Mapping)]
        if not nests:  # tensors beside a nest, such as the state of a random generator, are no weights
            tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
            if tensors:
                return tensors, passed_over
            break
        for key in nests[1:]:
            passed_over += [f"{key}.{name}" for name, value in content[key].items() if isinstance(value, Tensor)]
        content = content[nests[0]]
    found = list(content)[:5] if isinstance(content, Mapping) else type(content).__name__
    raise CheckpointError(f"{path} holds no state dict: found {found}, expected tensors, or one of {', '.join(_NESTS)}")
