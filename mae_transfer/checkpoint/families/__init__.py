"""Families of checkpoints, one module for those whose names are alike: told apart by the names in the file alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from mae_transfer.checkpoint.families import beit, dinov3, huggingface, plain, sam
from mae_transfer.checkpoint.families.base import Converted, Family, Raw, check_config

# The more particular first: what fits several is the first of them.
FAMILIES: tuple[Family, ...] = (
    *dinov3.FAMILIES,
    *sam.FAMILIES,
    *beit.FAMILIES,
    *plain.FAMILIES,
    *huggingface.FAMILIES,
)
# Ends of what may stand before an encoder's names, besides nothing: wrappers, hosts, training codes.
_PREFIXES = (
    *("module.", "_orig_mod.", "backbone.", "encoder.", "net.", "model.", "vit.", "deit.", "beit.", "dinov2."),
    *("dinov2_with_registers.", "base_encoder.", "momentum_encoder.", "image_encoder.", "vision_encoder.", "teacher."),
)


def recognise(tensors: Mapping[str, Tensor]) -> tuple[Family, str] | None:
    """The family of a file's tensors and the prefix that its encoder stands below, or None."""
    for prefix in prefixes(tensors):
        below = [name[len(prefix) :] if name.startswith(prefix) else name for name in tensors]
        for family in FAMILIES:
            if family.fits(below):
                return family, prefix
    return None


def prefixes(names: Iterable[str]) -> list[str]:
    """What may stand before an encoder's names, shortest first: of a file with two encoders the one that trains, whose
    wrapper has the shorter name in the codes known here; but a teacher, which is what is released, before its student.
    """
    names = list(names)
    anchors = sorted({family.anchor for family in FAMILIES}, key=len, reverse=True)
    found = set()
    for name in names:
        for anchor in anchors:
            if name == anchor or name.endswith(f".{anchor}"):
                prefix = name[: len(name) - len(anchor)]
                if not prefix or prefix.endswith(_PREFIXES):
                    found.add(prefix)
                break
    # Where the one is damaged, the other would be another model.
    for one, other in (("base_encoder.", "momentum_encoder."), ("teacher.", "student.")):
        if any(one in name for name in names):
            found = {prefix for prefix in found if other not in prefix}
    return sorted(found, key=lambda prefix: (len(prefix), prefix))


def nearest(names: Iterable[str]) -> tuple[Family, float]:
    """The family that most of what it is known by is there of, and how much, from 0 to 1."""
    names = list(names)
    candidates = [[name[len(prefix) :] for name in names if name.startswith(prefix)] for prefix in prefixes(names)]
    shares = [(family, max(family.share(below) for below in (names, *candidates))) for family in FAMILIES]
    return max(shares, key=lambda pair: pair[1])


__all__ = ["FAMILIES", "Converted", "Family", "Raw", "check_config", "nearest", "prefixes", "recognise"]
