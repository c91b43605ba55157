"""MMSegmentation's own checkpoints of MAE with UperNet, such as its ADE20K release, in the names of our model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

_MARK = "backbone.layers."  # what MMSegmentation's MAE calls its blocks
_NAMES = {
    "backbone.patch_embed.projection.": "backbone.patch_embed.proj.",
    _MARK: "backbone.blocks.",
    ".ln1.": ".norm1.",
    ".ln2.": ".norm2.",
    ".ffn.layers.0.0.": ".mlp.fc1.",
    ".ffn.layers.1.": ".mlp.fc2.",
    ".gamma_1": ".ls1.gamma",
    ".gamma_2": ".ls2.gamma",
    "neck.upsample_4x.": "neck.levels.0.",
    "neck.upsample_2x.": "neck.levels.1.",
}


def in_our_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A segmentor's state dict: one of MMSegmentation's MAE renamed, any other as it is.

    The index that MMSegmentation keeps beside every relative-position table follows from the sizes and is left out.
    """
    if not any(name.startswith(_MARK) for name in state):
        return dict(state)
    return {our_name(name): tensor for name, tensor in state.items() if not name.endswith(".relative_position_index")}


def our_name(name: str) -> str:
    """Our name of a parameter or buffer of MMSegmentation's MAE with Feature2Pyramid."""
    for theirs, ours in _NAMES.items():
        name = name.replace(theirs, ours)
    return name
