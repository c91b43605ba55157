"""What the settings of a data set come to: where a split's files are, how masks are read, classes and colours."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mae_transfer.data.problems import Problem, refuse
from mae_transfer.errors import ConfigError, DataError
from mae_transfer.segmentation.colours import palette, read_colours
from mae_transfer.segmentation.folder import Pair, pair_folder, pair_layout
from mae_transfer.segmentation.masks import IGNORE, Colour, MaskReader
from mae_transfer.segmentation.names import PUBLISHED, Published
from mae_transfer.segmentation.settings import DatasetSettings

DEFAULT = "ade20k"  # where nothing at all is said of a data set
DEFAULT_SPLITS = ("training", "validation")
BINARY_CLASSES = ("background", "foreground")


@dataclass(frozen=True, kw_only=True)
class Split:
    """The images and masks of a split.

    Attributes:
        root, split: the data set's folder, and the part of it.
        reduce_zero_label: number 0 in masks is unlabelled, and the classes are numbered from 1.
        name: of a published data set, whose layout it has; None for ADE20K's layout.
        masks: how masks are stored, one of ``masks.KINDS``.
        colours: the table of the classes' colours, for masks of kind "colours".
        mask_size: "refuse" or "resize" masks of another size than their image.
    """

    root: str
    split: str
    reduce_zero_label: bool
    name: str | None = None
    masks: str = "auto"
    colours: str | None = None
    mask_size: str = "refuse"

    @property
    def published(self) -> Published | None:
        return None if self.name is None else PUBLISHED[self.name]

    def scan(self) -> tuple[list[Pair], list[Problem]]:
        """The pairs, by name, and what is wrong with how files are paired.

        Raises:
            DataError: a folder or list is missing or empty.
        """
        root = Path(self.root)
        if not self.root:
            raise DataError("dataset.root is not given; give the folder that holds images and masks, or dataset.name")
        if not root.is_dir():
            raise DataError(f"dataset.root {root} is not a folder; give the folder that holds images and masks")
        layout = self.published.layout if self.published is not None else None
        return pair_folder(root, self.split) if layout is None else pair_layout(root, self.split, layout)

    def pairs(self) -> list[Pair]:
        """The pairs, by name.

        Raises:
            DataError: a folder is missing or empty, or an image or a mask has no partner.
        """
        pairs, problems = self.scan()
        refuse(problems, f"{self.root} ({self.split})")
        return pairs

    def reader(self, classes: Sequence[str]) -> MaskReader:
        """How its masks are read as numbers of these classes.

        Raises:
            DataError: the colours cannot be read, or lack a class.
        """
        return MaskReader(
            kind=self.masks,
            num_classes=len(classes),
            reduce_zero_label=self.reduce_zero_label,
            colours=self._class_colours(classes),
            numberings=self.published.numberings if self.published is not None else (),
            resize=self.mask_size == "resize",
        )

    def _class_colours(self, classes: Sequence[str]) -> dict[Colour, int]:
        if self.masks != "colours" or self.colours is None:
            return {}
        table = read_colours(self.colours)
        without = [name for name in classes if name not in table]
        if without:
            raise DataError(f"dataset.colours {self.colours} has no colour for {', '.join(without)}")
        number = {name: label for label, name in enumerate(classes)}
        return {colour: number.get(name, IGNORE) for name, colour in table.items()}


def splits_of(dataset: DatasetSettings) -> tuple[Split, Split]:
    """Training and validation, with everything that the settings leave open derived.

    Raises:
        ConfigError: settings that contradict one another.
    """
    said = (dataset.name, dataset.root, dataset.classes, dataset.colours)
    name = DEFAULT if said == (None,) * len(said) and dataset.masks == "auto" else dataset.name
    published = None if name is None else PUBLISHED[name]
    masks = dataset.masks
    if published is not None:
        own = "leave it out" if dataset.name is not None else "give dataset.root, the folder of your own data"
        for key in ("classes", "colours"):
            if getattr(dataset, key) is not None:
                raise ConfigError(f"dataset.{key} is given, but {name} brings its own; {own}")
        if masks != "auto":
            raise ConfigError(f"dataset.masks={masks} is given, but how masks of {name} are stored is known; {own}")
        if dataset.reduce_zero_label not in (None, published.reduce_zero_label):
            raise ConfigError(
                f"dataset.reduce_zero_label={dataset.reduce_zero_label} is not how {name} is evaluated; {own}"
            )
    if masks == "auto" and dataset.colours is not None:
        masks = "colours"
    if masks == "colours" and dataset.colours is None:
        raise ConfigError("dataset.masks=colours needs dataset.colours, a table of the classes' colours")
    if masks != "colours" and dataset.colours is not None:
        raise ConfigError(f"dataset.colours has no meaning under dataset.masks={masks}")
    counted = masks in ("auto", "index")
    if dataset.reduce_zero_label and not counted:
        unlabelled = "leave the unlabelled colour out of dataset.classes" if masks == "colours" else "black is a class"
        raise ConfigError(f"dataset.reduce_zero_label has no meaning under dataset.masks={masks}; {unlabelled}")
    reduce = dataset.reduce_zero_label
    if reduce is None:
        reduce = counted if published is None else published.reduce_zero_label
    names = DEFAULT_SPLITS if published is None else published.splits
    root = dataset.root or (published.root if published is not None else "")

    def split(part: str) -> Split:
        return Split(
            root=root,
            split=part,
            reduce_zero_label=reduce,
            name=name,
            masks=masks,
            colours=dataset.colours,
            mask_size=dataset.mask_size,
        )

    return split(dataset.train_split or names[0]), split(dataset.val_split or names[1])


def class_names(splits: Sequence[Split], classes: str | None) -> tuple[str, ...]:
    """Class names, in the order of their labels.

    A published data set has its own. Otherwise ``classes`` is a .txt with a name a line, or a .json with a list of
    names; None means ROOT/classes.txt where it exists, and then: the colour table's, or background and foreground, or
    "class 0", "class 1" … up to the highest label in the masks of ``splits``.

    Raises:
        DataError: the list is missing, empty or of another form.
        ConfigError: no class is left.
    """
    first = splits[0]
    if first.published is not None:
        return first.published.classes
    path = Path(classes) if classes is not None else Path(first.root) / "classes.txt"
    if classes is not None or path.is_file():
        names = read_names(path)
    elif first.masks == "colours" and first.colours is not None:
        names = tuple(read_colours(first.colours))
    elif first.masks == "binary":
        names = BINARY_CLASSES
    else:
        names = _from_masks(splits)
    if first.masks == "binary" and len(names) != 2:
        raise DataError(f"{path} names {len(names)} classes; masks in black and white have two, black first")
    room = IGNORE - first.reduce_zero_label
    if len(names) > room:
        raise DataError(f"{path} names {len(names)} classes; masks have room for {room}")
    return names


def class_palette(split: Split, classes: Sequence[str]) -> tuple[Colour, ...]:
    """A colour for every class in pictures: as published, or of the colour table, or made."""
    if split.published is not None and len(classes) == len(split.published.palette):
        return split.published.palette
    if split.masks == "colours" and split.colours is not None:
        table = read_colours(split.colours)
        if all(name in table for name in classes):
            return tuple(table[name] for name in classes)
    return tuple(palette(len(classes)))


def read_names(path: str | Path) -> tuple[str, ...]:
    """Names from a .txt, one a line, or from a .json list of them, or of what ``tools/predict.py`` writes.

    Raises:
        DataError: the list is missing, empty or of another form, or names a class twice.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"dataset.classes {path} does not exist; give a .txt with a class name a line, or a .json list")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"dataset.classes {path} is no text in UTF-8") from error
    if path.suffix.lower() == ".json":
        try:
            entries = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"{path} is not JSON: {error}") from error
        if isinstance(entries, list):
            entries = [entry.get("name") if isinstance(entry, dict) else entry for entry in entries]
        if not isinstance(entries, list) or not all(isinstance(name, str) and name.strip() for name in entries):
            raise DataError(f'{path} holds no list of names; expected ["building", "car", …]')
        names = tuple(entries)
    else:
        names = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not names:
        raise DataError(f"{path} names no class")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise DataError(f"{path} names a class twice: {', '.join(repeated)}")
    return names


def _from_masks(splits: Sequence[Split]) -> tuple[str, ...]:
    reader = MaskReader(kind=splits[0].masks, num_classes=IGNORE)
    masks = [pair.mask for split in splits for pair in split.scan()[0]]
    with ThreadPoolExecutor(max_workers=4) as pool:
        stored = [looked.stored for looked in pool.map(reader.look, masks)]
    counts = sum((count for count in stored if count is not None), np.zeros(256, np.int64))
    labels = [int(label) for label in np.flatnonzero(counts)]
    first = int(splits[0].reduce_zero_label)
    highest = max((label for label in labels if label != IGNORE), default=-1)
    if highest < first:
        hint = _DARK_HINT if set(labels) == {0, IGNORE} else ""
        raise ConfigError(
            f"the masks in {splits[0].root} hold no label but {', '.join(map(str, labels)) or 'none at all'}; with "
            f"dataset.reduce_zero_label={splits[0].reduce_zero_label} that leaves no class{hint}"
        )
    return tuple(f"class {label}" for label in range(first, highest + 1))


_DARK_HINT = ". Where they are black and white, give dataset.masks=binary"
