"""Checkpoints by an address on the Hugging Face Hub or a name of timm's, by way of their caches.

"hf://owner/name", "hf://owner/name@revision", "hf://owner/name/folder/file.safetensors", and
"timm/vit_base_patch16_224.mae".
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from mae_transfer.errors import CheckpointError

# A Path of the address has one slash left.
_HUB = re.compile(r"^hf:/{1,2}(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/@]+))?(?:/(?P<file>.+))?$")
_TIMM = re.compile(r"^timm/(?P<name>[^/]+)$")
_ENDINGS = (".safetensors", ".pth", ".pt", ".bin", ".pkl")
# What Hugging Face calls the weights in a folder, the first that is there.
HUGGING_FACE_FILES = (
    *("model.safetensors", "pytorch_model.bin"),
    *("model.safetensors.index.json", "pytorch_model.bin.index.json"),  # of a model in several files
)
# What is read of a repository that names no file, the first that is there, and what is wanted beside it.
_WEIGHTS = ("encoder.safetensors", *HUGGING_FACE_FILES)
_ACTIVATIONS = ("GELU(approximate='none')", "SiLU()")  # the latter in a gated MLP, which the shapes show
_BESIDE = ("config.json", "preprocessor_config.json", "README.md")


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """A file in the cache, and what its place says of it: fields of ``EncoderInfo``."""

    path: Path
    fields: dict[str, Any]


def is_address(path: str | Path) -> bool:
    """Whether ``path`` names a checkpoint elsewhere; a file or folder of that name here is what is meant, if any."""
    text = str(path)
    if text.startswith("hf:/"):
        return True
    return _TIMM.match(text) is not None and not text.endswith(_ENDINGS) and not Path(path).exists()


def fetch(address: str | Path) -> Fetched:
    """The file at an address, fetched unless the cache has it.

    Raises:
        CheckpointError: no such address, repository, revision or file; no permission; no network and not in the cache.
    """
    text = str(address)
    if match := _TIMM.match(text):
        return _fetch_timm(match["name"])
    if match := _HUB.match(text):
        return _fetch_hub(match["repo"], match["revision"], match["file"])
    raise CheckpointError(f"{text} is no address on the Hub; expected hf://owner/name[@revision][/file]")


def _fetch_hub(repo: str, revision: str | None, file: str | None) -> Fetched:
    source = repo if revision is None else f"{repo}@{revision}"
    wanted = (file,) if file else _WEIGHTS
    path = next((path for name in wanted if (path := _download(repo, name, revision))), None)
    if path is None:
        raise CheckpointError(f"hf://{source} has no {' or '.join(wanted)}; give the file: hf://{source}/FILE")
    folder = f"{Path(file).parent}/" if file and "/" in file else ""
    for name in _named_in(path):
        if _download(repo, folder + name, revision) is None:
            raise CheckpointError(f"hf://{source}/{folder}{path.name} names {name}, which the repository does not have")
    fields: dict[str, Any] = {"source": source}
    for name in _BESIDE:
        beside = _download(repo, name if name == "README.md" else folder + name, revision, required=False)
        if beside is not None:
            fields |= _said_in(beside)
    return Fetched(path=path, fields=fields)


def _named_in(path: Path) -> list[str]:
    """The files in one folder that an index names; none of any other file, or of an index that its reader refuses."""
    if not path.name.endswith(".index.json"):
        return []
    try:
        names = {str(name) for name in json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()}
    except (ValueError, LookupError, TypeError, AttributeError):
        return []
    return sorted(name for name in names if Path(name).name == name)


def _download(repo: str, name: str, revision: str | None, *, required: bool = True) -> Path | None:
    """A file of a repository; None where it has no such file."""
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = f"hf://{repo}" + (f"@{revision}" if revision else "")
    try:
        return Path(hf_hub_download(repo, name, revision=revision))
    except GatedRepoError as error:
        raise CheckpointError(
            f"{where} is given only to those who accepted its terms: do so at https://huggingface.co/{repo}, then "
            "huggingface-cli login (or set HF_TOKEN)"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(f"{where} does not exist, or is private; check the name, or log in (HF_TOKEN)") from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{where}: no such revision") from error
    except HFValidationError as error:
        raise CheckpointError(f"{where} is no name of a repository ({error})") from error
    except LocalEntryNotFoundError as error:
        # Without a network a file that is not there looks like one that was never fetched.
        others = [try_to_load_from_cache(repo, other, revision=revision) for other in _WEIGHTS]
        if not required or (name in _WEIGHTS and any(isinstance(other, str) for other in others)):
            return None
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hub cannot be reached"
        raise CheckpointError(
            f"{where}: {reason}, and {name} is not in the cache ({constants.HF_HUB_CACHE}). Fetch it once where there "
            "is a network, or give the path of a file"
        ) from error
    except EntryNotFoundError:
        return None
    except Exception as error:  # what connections raise differs between huggingface_hub's versions
        if not required:
            return None
        raise CheckpointError(f"{where}/{name} could not be fetched ({type(error).__name__}: {error})") from error


def _said_in(path: Path) -> dict[str, Any]:
    """Licence of a model card, or mean, deviation and licence of timm's config.json; nothing where neither is there."""
    text = path.read_text(encoding="utf-8", errors="replace")
    if path.name == "README.md":
        front = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
        try:
            card = yaml.safe_load(front[1]) if front else None
        except yaml.YAMLError:
            return {}
        license = card.get("license") if isinstance(card, Mapping) else None
        return {"license": license} if isinstance(license, str) else {}
    try:
        content = json.loads(text)
    except json.JSONDecodeError:
        return {}  # the reader of the weights says what is wrong with it
    return said_by_timm(content.get("pretrained_cfg", {})) if isinstance(content, Mapping) else {}


def said_by_timm(cfg: object) -> dict[str, Any]:
    """``EncoderInfo`` fields of timm's ``pretrained_cfg``."""
    if not isinstance(cfg, Mapping):
        return {}
    fields: dict[str, Any] = {
        name: tuple(cfg[name]) for name in ("mean", "std") if cfg.get(name) and isinstance(cfg[name], list | tuple)
    }
    return fields | ({"license": cfg["license"]} if cfg.get("license") else {})


def _fetch_timm(name: str) -> Fetched:
    import timm
    from timm.models import get_pretrained_cfg
    from timm.models._hub import download_cached_file

    architecture = name.split(".")[0]
    known = timm.list_models("*vit*", pretrained=True)
    try:
        cfg = get_pretrained_cfg(name, allow_unregistered=True)
    except RuntimeError:  # the model is known, with other weights
        cfg = None
    if cfg is None or not (cfg.hf_hub_id or cfg.url):
        close = difflib.get_close_matches(name, known, n=3)
        hint = f"; did you mean {', '.join(f'timm/{other}' for other in close)}?" if close else ""
        raise CheckpointError(f"timm/{name} is neither a file here nor a model that timm has weights of{hint}")
    said = said_by_timm(cfg.to_dict()) | _measured(architecture)
    said.pop("width", None)
    if cfg.hf_hub_id:
        fetched = _fetch_hub(cfg.hf_hub_id, None, cfg.hf_hub_filename)
        return Fetched(path=fetched.path, fields=fetched.fields | said)
    try:
        path = Path(download_cached_file(cfg.url, check_hash=False))
    except OSError as error:
        raise CheckpointError(f"timm/{name} could not be fetched from {cfg.url} ({error})") from error
    return Fetched(path=path, fields={"source": f"timm/{name}"} | said)


def said_beside_timms(config: Mapping[str, Any], width: int) -> dict[str, Any]:
    """``EncoderInfo`` fields of the ``config.json`` that timm writes beside weights ``width`` wide; of any other, none.

    Raises:
        CheckpointError: it names a model that computes something else.
    """
    import timm

    given, architecture = config.get("pretrained_cfg"), config.get("architecture")
    if not isinstance(given, Mapping):
        return {}
    said = said_by_timm(given)
    if isinstance(architecture, str) and timm.is_model(architecture):
        arguments = config.get("model_args")
        numbers = _measured(architecture, **(arguments if isinstance(arguments, Mapping) else {}))
        said |= numbers if numbers.pop("width", width) == width else {}  # one that was built otherwise says nothing
    return said


def _measured(architecture: str, **arguments: Any) -> dict[str, Any]:
    """What of a model's numbers no file says: heads, and the eps of norms; and its width.

    Raises:
        CheckpointError: what the weights do not show and this encoder does not have: rotary positions in a model other
            than DINOv3, another activation.
    """
    import timm

    with torch.device("meta"):
        model = timm.create_model(architecture, **arguments)
    if getattr(model, "rope", None) is not None and "dinov3" not in architecture:
        raise CheckpointError(
            f"timm's {architecture} has rotary positions, which this encoder has as DINOv3 does alone"
        )
    activation = getattr(getattr(next(iter(getattr(model, "blocks", ())), None), "mlp", None), "act", None)
    if activation is not None and repr(activation) not in _ACTIVATIONS:
        raise CheckpointError(
            f"timm's {architecture} has the activation {activation!r}; this encoder has {' or '.join(_ACTIVATIONS)}"
        )
    found: dict[str, Any] = {}
    try:
        found["num_heads"] = model.blocks[0].attn.num_heads
        found["norm_eps"] = model.blocks[0].norm1.eps
        found["width"] = model.embed_dim
    except (AttributeError, TypeError, IndexError):
        pass  # no Vision Transformer: its reader says so
    return found
