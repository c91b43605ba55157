"""Published data sets by name: where their files are, how masks are numbered, and how they are evaluated.

Classes and palettes are those of MMSegmentation's data set classes; folders, lists and endings are as its
documentation ("Prepare datasets") lays them out. Where its converters renumber masks (Cityscapes, COCO-Stuff 164k), the
masks as they are downloaded are read as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mmseg.datasets

from mae_transfer.segmentation.masks import IGNORE, Colour, Numbering


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the files are, below the root; ``{split}`` stands for the split's name.

    Attributes:
        images: folder and ending of image files.
        masks: folder and ending of mask files; of several for one image the first counts.
        names: file with a name a line; None: every file of the folders.
    """

    images: tuple[str, str]
    masks: tuple[tuple[str, str], ...]
    names: str | None = None


@dataclass(frozen=True, kw_only=True)
class Published:
    """A data set by its name.

    Attributes:
        known_as: MMSegmentation's class, which holds the classes and the palette.
        root: where its documentation puts the data set.
        splits: training and validation; several lists are joined by "+".
        reduce_zero_label: number 0 is unlabelled.
        layout: None is ADE20K's own, as of any folder (``folder``).
        numberings: of masks that do not hold the classes' own numbers.
    """

    known_as: str
    root: str
    splits: tuple[str, str]
    reduce_zero_label: bool = False
    layout: Layout | None = None
    numberings: tuple[Numbering, ...] = ()

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self._metainfo["classes"])

    @property
    def palette(self) -> tuple[Colour, ...]:
        return tuple((red, green, blue) for red, green, blue in self._metainfo["palette"])

    @property
    def _metainfo(self) -> Mapping[str, Any]:
        metainfo: Mapping[str, Any] = getattr(mmseg.datasets, self.known_as).METAINFO
        return metainfo


# Label ids of the 19 classes that are evaluated, in the order of their train ids (cityscapesScripts, labels.py).
_CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
_CITYSCAPES_LARGEST = 33
# Of the 182 numbers in COCO-Stuff's pixel maps, those that no pixel has (categories without an annotation).
_COCO_STUFF_UNUSED = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)
_COCO_STUFF_NUMBERS = 182


def _in_order(used: tuple[int, ...], largest: int) -> dict[int, int]:
    """Classes by stored number: ``used`` in order, every other one unlabelled."""
    ignored = dict.fromkeys((*range(largest + 1), IGNORE), IGNORE)
    return ignored | {number: label for label, number in enumerate(used)}


def _identity(num_classes: int) -> dict[int, int]:
    return {**{label: label for label in range(num_classes)}, IGNORE: IGNORE}


def _voc(suffix: str, masks: tuple[str, ...]) -> Layout:
    return Layout(
        images=("JPEGImages", ".jpg"),
        masks=tuple((folder, ".png") for folder in masks),
        names=f"ImageSets/Segmentation{suffix}/{{split}}.txt",
    )


_TRAIN_IDS = "_labelTrainIds.png"  # as MMSegmentation's converters name what they write

PUBLISHED: dict[str, Published] = {
    "ade20k": Published(
        known_as="ADE20KDataset",
        root="data/ade/ADEChallengeData2016",
        splits=("training", "validation"),
        reduce_zero_label=True,
    ),
    "cityscapes": Published(
        known_as="CityscapesDataset",
        root="data/cityscapes",
        splits=("train", "val"),
        layout=Layout(
            images=("leftImg8bit/{split}", "_leftImg8bit.png"),
            masks=(("gtFine/{split}", f"_gtFine{_TRAIN_IDS}"), ("gtFine/{split}", "_gtFine_labelIds.png")),
        ),
        numberings=(
            Numbering(ending=_TRAIN_IDS, classes=_identity(len(_CITYSCAPES_IDS))),
            Numbering(ending="_labelIds.png", classes=_in_order(_CITYSCAPES_IDS, _CITYSCAPES_LARGEST)),
        ),
    ),
    "voc2012": Published(
        known_as="PascalVOCDataset",
        root="data/VOCdevkit/VOC2012",
        splits=("train", "val"),
        layout=_voc("", ("SegmentationClass",)),
    ),
    "voc2012_aug": Published(  # with the masks of Hariharan et al. (SBD), 10 582 images to train on
        known_as="PascalVOCDataset",
        root="data/VOCdevkit/VOC2012",
        splits=("train+aug", "val"),
        layout=_voc("", ("SegmentationClass", "SegmentationClassAug")),
    ),
    "pascal_context": Published(
        known_as="PascalContextDataset",
        root="data/VOCdevkit/VOC2010",
        splits=("train", "val"),
        layout=_voc("Context", ("SegmentationClassContext",)),
    ),
    "pascal_context_59": Published(
        known_as="PascalContextDataset59",
        root="data/VOCdevkit/VOC2010",
        splits=("train", "val"),
        reduce_zero_label=True,
        layout=_voc("Context", ("SegmentationClassContext",)),
    ),
    "coco_stuff164k": Published(
        known_as="COCOStuffDataset",
        root="data/coco_stuff164k",
        splits=("train2017", "val2017"),
        layout=Layout(
            images=("images/{split}", ".jpg"),
            masks=(("annotations/{split}", _TRAIN_IDS), ("annotations/{split}", ".png")),
        ),
        numberings=(
            Numbering(ending=_TRAIN_IDS, classes=_identity(_COCO_STUFF_NUMBERS - len(_COCO_STUFF_UNUSED))),
            Numbering(
                ending=".png",
                classes=_in_order(
                    tuple(number for number in range(_COCO_STUFF_NUMBERS) if number not in _COCO_STUFF_UNUSED),
                    _COCO_STUFF_NUMBERS - 1,
                ),
            ),
        ),
    ),
    "coco_stuff10k": Published(
        known_as="COCOStuffDataset",
        root="data/coco_stuff10k",
        splits=("train2014", "test2014"),
        reduce_zero_label=True,
        layout=Layout(images=("images/{split}", ".jpg"), masks=(("annotations/{split}", _TRAIN_IDS),)),
    ),
}
