"""ADE20K-layout folders as an MMSegmentation data set, with draws that a restart repeats."""

from __future__ import annotations

import colorsys
import contextlib
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmengine.dist import get_dist_info
from mmseg.datasets import BaseSegDataset
from mmseg.registry import DATA_SAMPLERS, DATASETS, TRANSFORMS
from torch.utils.data import Sampler

from mae_transfer.data.draws import Draws, Purpose, permutation
from mae_transfer.data.share import choose_share
from mae_transfer.errors import DataError
from mae_transfer.segmentation.folder import check_labels, find_pairs, read_mask, reduce_labels


class Draw(int):
    """An index into the data set that knows the seed of its augmentation."""

    seed: int

    def __new__(cls, index: int, seed: int) -> Draw:
        draw = super().__new__(cls, index)
        draw.seed = seed
        return draw

    def __getnewargs__(self) -> tuple[int, int]:  # type: ignore[override]
        return int(self), self.seed  # pickled on the way to a worker


@DATASETS.register_module()
class ADEFolder(BaseSegDataset):
    """A split of a folder in ADE20K's layout (see ``folder.find_pairs``).

    Args:
        root: the folder that holds images/ and annotations/.
        split: "training", "validation" …
        classes: names in the order of their labels.
        reduce_zero_label: label 0 is unlabelled.
        fraction, fraction_seed: share of the images that is used, and what draws it (``choose_share``).
        **kwargs: BaseSegDataset's (``pipeline``, ``test_mode``, ``indices`` …).
    """

    def __init__(
        self,
        *,
        root: str,
        split: str,
        classes: Sequence[str],
        reduce_zero_label: bool,
        fraction: float = 1.0,
        fraction_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        self.root, self.split = root, split
        self.fraction, self.fraction_seed = fraction, fraction_seed
        super().__init__(
            metainfo={"classes": tuple(classes), "palette": palette(len(classes))},
            reduce_zero_label=reduce_zero_label,
            data_prefix={"img_path": None, "seg_map_path": None},
            **kwargs,
        )

    def load_data_list(self) -> list[dict[str, Any]]:
        """One entry for each pair of the split, by name; of the chosen ones where a fraction is asked for."""
        pairs = find_pairs(self.root, self.split)
        names = [pair.image.stem for pair in pairs]
        chosen = set(choose_share(names, self.fraction, seed=self.fraction_seed, key="dataset.fraction"))
        return [
            {
                "img_path": str(pair.image),
                "seg_map_path": str(pair.mask),
                "label_map": None,
                "reduce_zero_label": self.reduce_zero_label,
                "num_classes": len(self.metainfo["classes"]),
                "seg_fields": [],
            }
            for pair in pairs
            if pair.image.stem in chosen
        ]

    def __getitem__(self, index: int) -> Any:
        if not isinstance(index, Draw):
            return super().__getitem__(index)
        with seeded(index.seed):
            return super().__getitem__(int(index))


@TRANSFORMS.register_module()
class LoadIndexMask(BaseTransform):
    """Read a mask, check it against its image and the classes, and reduce its labels where the data set says so.

    Raises:
        DataError: another size than the image's, colours, or a label that no class has.
    """

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        path = results["seg_map_path"]
        labels = read_mask(path)
        if labels.shape != tuple(results["ori_shape"][:2]):
            raise DataError(f"mask {path} is {labels.shape[::-1]}, its image {tuple(results['ori_shape'][1::-1])}")
        reduce = results["reduce_zero_label"]
        check_labels(labels, path, num_classes=results["num_classes"], reduce_zero_label=reduce)
        results["gt_seg_map"] = reduce_labels(labels) if reduce else labels
        results["seg_fields"].append("gt_seg_map")
        return results


@DATA_SAMPLERS.register_module()
class ReplaySampler(Sampler[int]):
    """Endless shuffled epochs in which draw t is a function of (seed, t) alone.

    The order and every augmentation depend neither on the number of processes (for one global batch) nor of workers,
    nor on restarts. ``skip`` is what MMEngine's loop calls to continue; where a version of it does not, it reads the
    skipped draws, with the same result.
    """

    def __init__(self, dataset: Any, seed: int | None = None, shuffle: bool = True) -> None:
        self.size, self.seed, self.shuffle = len(dataset), seed or 0, shuffle
        self.rank, self.world_size = get_dist_info()
        self.first = 0

    def skip(self, num_samples: int) -> None:
        """Start behind the first ``num_samples`` draws of this process, counted from the beginning of the run."""
        self.first = num_samples

    def __iter__(self) -> Iterator[int]:
        position = self.first * self.world_size + self.rank
        epoch, order = -1, np.arange(self.size)
        while True:
            if position // self.size != epoch:
                epoch = position // self.size
                if self.shuffle:
                    order = permutation(seed=self.seed, epoch=epoch, length=self.size)
            seed = draw_seed(Purpose.CROP, seed=self.seed, index=position)
            yield Draw(int(order[position % self.size]), seed)
            position += self.world_size

    def __len__(self) -> int:
        return self.size


def draw_seed(purpose: Purpose, *, seed: int, index: int, epoch: int = 0) -> int:
    """A 32-bit seed for libraries that draw from global random numbers."""
    return int(Draws(seed=seed, purpose=purpose, epoch=epoch, index=index).words(1)[0] & np.uint64(0xFFFFFFFF))


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Python's, NumPy's and torch's global random numbers start at ``seed`` inside, and are as before after."""
    python, numpy, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - mmcv's transforms draw from the global state
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(torch_state)


def palette(num_classes: int) -> list[tuple[int, int, int]]:
    """Distinct RGB colours, the same at every call: hues by the golden ratio, three brightnesses in turn."""
    colours = []
    for index in range(num_classes):
        hue = (0.05 + index * 0.618033988749895) % 1.0
        red, green, blue = colorsys.hsv_to_rgb(hue, (0.85, 0.6, 0.95)[index % 3], (0.95, 0.75, 0.6)[(index // 3) % 3])
        colours.append((round(255 * red), round(255 * green), round(255 * blue)))
    return colours
