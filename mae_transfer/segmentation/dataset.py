"""Folders of images and masks as an MMSegmentation data set, with draws that a restart repeats."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmengine.dist import get_dist_info
from mmseg.datasets import BaseSegDataset
from mmseg.registry import DATA_SAMPLERS, DATASETS, TRANSFORMS
from torch.utils.data import Sampler

from mae_transfer.data.decode import open_picture
from mae_transfer.data.draws import Draws, Purpose, permutation
from mae_transfer.data.scan import Progress
from mae_transfer.data.share import choose_share
from mae_transfer.errors import DataError
from mae_transfer.segmentation.masks import Colour
from mae_transfer.segmentation.source import Split, class_palette

_OPEN_FILES = 4


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
class LabelledImages(BaseSegDataset):
    """A split of a folder of images and masks, in ADE20K's layout or that of a published data set.

    Args:
        classes: names in the order of their labels.
        palette: RGB of each class in pictures; by default made.
        fraction, fraction_seed: share of the images that is used, and what draws it (``choose_share``).
        root, split, reduce_zero_label, name, masks, colours, mask_size: ``Split``'s.
        **kwargs: BaseSegDataset's (``pipeline``, ``test_mode``, ``indices`` …).
    """

    def __init__(
        self,
        *,
        root: str,
        split: str,
        classes: Sequence[str],
        reduce_zero_label: bool,
        name: str | None = None,
        masks: str = "auto",
        colours: str | None = None,
        mask_size: str = "refuse",
        palette: Sequence[Colour] | None = None,
        fraction: float = 1.0,
        fraction_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        self.source = Split(
            root=root,
            split=split,
            reduce_zero_label=reduce_zero_label,
            name=name,
            masks=masks,
            colours=colours,
            mask_size=mask_size,
        )
        self.reader = self.source.reader(classes)
        self.fraction, self.fraction_seed = fraction, fraction_seed
        colour_list = class_palette(self.source, classes) if palette is None else tuple(map(tuple, palette))
        super().__init__(
            metainfo={"classes": tuple(classes), "palette": list(colour_list)},
            reduce_zero_label=reduce_zero_label,
            data_prefix={"img_path": None, "seg_map_path": None},
            **kwargs,
        )

    def load_data_list(self) -> list[dict[str, Any]]:
        """One entry for each pair of the split, by name; of the chosen ones where a fraction is asked for."""
        pairs = self.source.pairs()
        names = [pair.name for pair in pairs]
        chosen = set(choose_share(names, self.fraction, seed=self.fraction_seed, key="dataset.fraction"))
        return [
            {
                "img_path": str(pair.image),
                "seg_map_path": str(pair.mask),
                "label_map": None,
                "reduce_zero_label": self.reduce_zero_label,
                "seg_fields": [],
            }
            for pair in pairs
            if pair.name in chosen
        ]

    def get_data_info(self, idx: int) -> dict[str, Any]:
        """The entry, with what reads its mask."""
        return {**super().get_data_info(idx), "mask_reader": self.reader}

    def __getitem__(self, index: int) -> Any:
        try:
            if not isinstance(index, Draw):
                return super().__getitem__(index)
            with seeded(index.seed):
                return super().__getitem__(int(index))
        except DataError as error:
            raise UnusableSample(f"{error}; tools/check_dataset.py finds every such file before a run") from None

    def label_counts(self) -> np.ndarray:
        """Pixels of each class in all masks, (classes,) int64.

        Raises:
            DataError: a mask cannot be read.
        """
        masks = [self.get_data_info(index)["seg_map_path"] for index in range(len(self))]

        def count(path: str) -> np.ndarray:
            return np.bincount(self.reader.read(path).ravel(), minlength=256)

        total = np.zeros(256, np.int64)
        with ThreadPoolExecutor(_OPEN_FILES) as pool, Progress("counting labels") as progress:
            for counts in pool.map(count, masks):
                total += counts
                progress.add(1)
        return total[: self.reader.num_classes]


class UnusableSample(DataError):
    """An image or mask that is found to be unusable while it is read.

    Raised in a worker process, torch raises it again here from a text that holds the worker's traceback; what is kept
    of it is the message.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text.rpartition(f"{type(self).__name__}: ")[2].strip())


@TRANSFORMS.register_module()
class LoadPicture(BaseTransform):
    """Read an image of any kind (gray, palette, with transparency, 16 bits, CMYK …), upright, as (H, W, 3) uint8 BGR.

    Raises:
        DataError: it cannot be read.
    """

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        path = results["img_path"]
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise DataError(f"cannot read image {path}: {error}") from error
        pixels = open_picture(data, name=str(path), floats=False).decode()  # (H, W, 3), or (H, W, 1) of gray files
        image = np.ascontiguousarray(np.broadcast_to(pixels[..., ::-1], (*pixels.shape[:2], 3)))
        results["img"] = image
        results["img_shape"] = results["ori_shape"] = image.shape[:2]
        return results


@TRANSFORMS.register_module()
class LoadLabels(BaseTransform):
    """Read a mask, as class numbers of its image's size, by the data set's ``MaskReader``.

    Raises:
        DataError: another size than the image's, another kind of file, or what no class has.
    """

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        size = results["ori_shape"][:2]
        results["gt_seg_map"] = results["mask_reader"].read(results["seg_map_path"], (int(size[0]), int(size[1])))
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
