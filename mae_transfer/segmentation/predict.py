"""Labels of any images with a trained model: the ``Predictor`` class, and what ``tools/predict.py`` writes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmseg.registry import MODELS, TRANSFORMS
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from mae_transfer.engine.files import write_text
from mae_transfer.engine.hardware import named_device
from mae_transfer.errors import CheckpointError, ConfigError, DataError
from mae_transfer.segmentation.colours import palette
from mae_transfer.segmentation.config import load_config, read_options
from mae_transfer.segmentation.runner import checkpoints_of, load_weights
from mae_transfer.segmentation.segmentor import MAESegmentor
from mae_transfer.segmentation.visualize import Colour, draw_legend, draw_segmentation, save_picture

_CLASSES_AT_A_TIME = 16  # whose logits are brought to an image's own size together


class Predictor:
    """A trained segmentation model for images of any size, one or several at a time.

    Images are resized and cut into windows as in validation; labels are of the image's own pixels.

    >>> predictor = Predictor("runs/segmentation")  # doctest: +SKIP
    >>> labels = predictor("image.jpg")  # doctest: +SKIP
    >>> [predictor.classes[label] for label in np.unique(labels)]  # doctest: +SKIP

    Args:
        run: the run's folder, or a ``.pth`` in it.
        checkpoint: a ``.pth`` of the run; by default the best by mIoU, or else the last.
        config: for a ``.pth`` that lies without its run, the config it was trained with.
        options: dotted keys over the config, such as ``{"dataset.classes": "names.txt"}``.
        device: "auto" (a GPU where there is one), "cpu" or "cuda".
        tta: average over ``test.scales`` and mirrored images; by default as ``test.tta`` says.

    Raises:
        CheckpointError: no checkpoint, or one that does not fit the config.
        ConfigError: no such config, option or device.
        DataError: the class names cannot be had.
    """

    def __init__(
        self,
        run: str | Path,
        checkpoint: str | Path | None = None,
        *,
        config: str | Path | None = None,
        options: Mapping[str, Any] | None = None,
        device: str | None = None,
        tta: bool | None = None,
    ) -> None:
        self.device = named_device(device or "auto", "device")
        loaded, weights = find_run(run, checkpoint, config=config, options=options)
        self.model: MAESegmentor = build_model(loaded, weights).to(self.device).eval()
        if self.model.out_channels == 1:
            raise ConfigError("the model has one logit for two classes; predict expects a logit for each class")
        self.config = loaded
        self.classes: tuple[str, ...] = tuple(loaded.facts.classes)
        colours = loaded.facts.get("palette") or palette(len(self.classes))
        self.palette: list[Colour] = [(red, green, blue) for red, green, blue in colours]
        test = loaded.settings.test
        self.scales: tuple[float, ...] | None = tuple(test.scales) if (test.tta if tta is None else tta) else None
        pipeline = loaded.test_dataloader.dataset.pipeline
        kinds = [step["type"] for step in pipeline]
        with DefaultScope.overwrite_default_scope("mmseg"):
            self._load = [TRANSFORMS.build(step) for step in pipeline[: kinds.index("Resize")]]
            self._resize = TRANSFORMS.build(pipeline[kinds.index("Resize")])

    @property
    def first_label(self) -> int:
        """What class 0 is called in mask files: 1 where 0 is the unlabelled, 0 otherwise."""
        return 1 if self.config.test_dataloader.dataset.reduce_zero_label else 0

    def __call__(self, image: np.ndarray | str | Path) -> np.ndarray:
        """The class of every pixel of an image: (H, W) uint8, an index into ``classes``.

        Args:
            image: (H, W, 3) uint8 in RGB, or a file.

        Raises:
            DataError: an array of another kind, or a file that cannot be read.
        """
        return self.batch([image])[0]

    def batch(self, images: Sequence[np.ndarray | str | Path]) -> list[np.ndarray]:
        """``__call__`` of several images, computed together where they are resized to the same size."""
        return [labels.cpu().numpy() for labels in self._predict(images, labels=True)]

    def probabilities(self, images: Sequence[np.ndarray | str | Path]) -> list[np.ndarray]:
        """The probability of every class at every pixel, for several images: (classes, H, W) float32 each."""
        return [found.cpu().numpy() for found in self._predict(images, labels=False)]

    def read(self, path: str | Path) -> np.ndarray:
        """An image file as validation reads it: (H, W, 3) uint8 in RGB, upright.

        Raises:
            DataError: no readable image.
        """
        results: dict[str, Any] = {"img_path": str(path)}
        for step in self._load:
            results = step(results)
        return np.ascontiguousarray(results["img"][..., ::-1])

    @torch.inference_mode()
    def _predict(self, images: Sequence[np.ndarray | str | Path], *, labels: bool) -> list[Tensor]:
        """Labels (H, W) or probabilities (classes, H, W) of every image."""
        pictures = [image if isinstance(image, np.ndarray) else self.read(image) for image in images]
        resized = [self._resized(picture) for picture in pictures]
        alike: dict[tuple[int, ...], list[int]] = {}
        for number, picture in enumerate(resized):
            alike.setdefault(picture.shape, []).append(number)
        found: dict[int, Tensor] = {}
        for numbers in alike.values():
            stack = [resized[number] for number in numbers]
            sizes = [(pictures[number].shape[0], pictures[number].shape[1]) for number in numbers]
            if self.scales is None:
                finish = self._labels if labels else self._softmax
                results = [finish(logits, size) for logits, size in zip(self._logits(stack), sizes, strict=True)]
            else:
                results = self._mean_of_views(stack, sizes)
                if labels:
                    results = [mean.argmax(dim=0).to(torch.uint8) for mean in results]
            found |= dict(zip(numbers, results, strict=True))
        return [found[number] for number in range(len(images))]

    def _mean_of_views(self, images: Sequence[np.ndarray], sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Probabilities (classes, H, W) averaged over scales and mirrored images, as MMSegmentation's SegTTAModel."""
        sums: list[Tensor] = []
        count = 0
        for view in self._views(images):
            found = [self._softmax(logits, size) for logits, size in zip(view, sizes, strict=True)]
            sums = [total.add_(new) for total, new in zip(sums, found, strict=True)] if sums else found
            count += 1
        return [total.div_(count) for total in sums]

    def _views(self, images: Sequence[np.ndarray]) -> Iterator[Tensor]:
        """Logits (N, classes, h, w) of the images at every scale, as they are and mirrored (and mirrored back)."""
        for scale in self.scales or ():
            with DefaultScope.overwrite_default_scope("mmseg"):
                rescale = TRANSFORMS.build({"type": "Resize", "scale_factor": scale, "keep_ratio": True})
            scaled = [rescale({"img": image})["img"] for image in images]
            yield self._logits(scaled)
            yield self._logits([image[:, ::-1] for image in scaled]).flip(dims=(3,))

    def _logits(self, images: Sequence[np.ndarray]) -> Tensor:
        """(h, w, 3) uint8 BGR, all of one size -> (N, classes, h, w)."""
        inputs = [torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))) for image in images]
        batch: dict[str, Any] = self.model.data_preprocessor({"inputs": inputs}, False)
        size = images[0].shape[:2]
        return self.model.inference(batch["inputs"], [{"ori_shape": size, "img_shape": size} for _ in images])

    def _resized(self, image: np.ndarray) -> np.ndarray:
        """(H, W, 3) RGB -> (h, w, 3) BGR at the size of validation."""
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise DataError(f"an image is {image.dtype} of shape {image.shape}; expected uint8 (height, width, 3), RGB")
        return self._resize({"img": np.ascontiguousarray(image[..., ::-1])})["img"]

    def _to_size(self, logits: Tensor, size: tuple[int, int]) -> Tensor:
        """(classes, h, w) -> (classes, H, W), as MMSegmentation brings predictions to an image's own size."""
        return interpolate(logits[None], size=size, mode="bilinear", align_corners=self.model.align_corners)[0]

    def _softmax(self, logits: Tensor, size: tuple[int, int]) -> Tensor:
        return self._to_size(logits, size).softmax(dim=0)

    def _labels(self, logits: Tensor, size: tuple[int, int]) -> Tensor:
        """The largest logit's class, (H, W). A large image's logits, of all classes at once, may not fit in memory."""
        best = logits.new_full(size, -torch.inf)
        labels = torch.zeros(size, dtype=torch.uint8, device=logits.device)
        for first in range(0, len(logits), _CLASSES_AT_A_TIME):
            values, indices = self._to_size(logits[first : first + _CLASSES_AT_A_TIME], size).max(dim=0)
            better = values > best  # of equals the first, as argmax
            best = torch.where(better, values, best)
            labels = torch.where(better, (indices + first).to(torch.uint8), labels)
        return labels


def predict_images(
    run: str | Path,
    checkpoint: Path | None,
    images: Sequence[Path],
    out: Path,
    *,
    config: Path | None = None,
    options: Sequence[str] | None = None,
    device: str = "auto",
    batch_size: int = 1,
    tta: bool | None = None,
) -> list[Path]:
    """Segment images and write, for each, an overlay with a legend and the labels as a palette PNG.

    Beside them: ``legend.png`` with the colour of every class, and ``classes.json`` with its label, name and colour.

    Args:
        run, checkpoint, config, device, tta: as ``Predictor``'s.
        options: its options, as ``key=value`` texts.
        images: image files of any size.
        out: receives ``NAME.png`` and ``NAME_labels.png``, whose labels are the masks' own (from 1 where the run
            reduced its zero label). NAME is numbered where files share one.
        batch_size: images computed together.

    Returns:
        The overlays.

    Raises:
        CheckpointError, ConfigError: as ``Predictor``.
        DataError: at the end, with everything else written, images that could not be read.
    """
    if batch_size < 1:
        raise ConfigError(f"--batch-size {batch_size}: expected a whole number above 0")
    chosen = read_options(options or ())
    predictor = Predictor(run, checkpoint, config=config, options=chosen, device=device, tta=tta)
    write_classes(predictor, out)
    names = output_names(images)
    written: list[Path] = []
    unreadable: list[str] = []
    for group in _groups(_read(predictor, images, unreadable), batch_size):
        for (number, image), labels in zip(group, predictor.batch([image for _, image in group]), strict=True):
            picture = draw_segmentation(image, labels, predictor.classes, predictor.palette)
            written.append(out / f"{names[number]}.png")
            save_picture(picture, written[-1])
            save_picture(to_palette_image(labels, predictor), out / f"{names[number]}_labels.png")
    if unreadable:
        raise DataError(
            f"{len(unreadable)} of {len(images)} images could not be read, the others are in {out}: "
            + "; ".join(unreadable[:5])
            + (" …" if len(unreadable) > 5 else "")
        )
    return written


def write_classes(predictor: Predictor, out: Path) -> None:
    """``classes.json`` and ``legend.png``: what the labels and colours of written predictions mean."""
    entries = [
        {"label": predictor.first_label + index, "name": name, "colour": list(colour)}
        for index, (name, colour) in enumerate(zip(predictor.classes, predictor.palette, strict=True))
    ]
    write_text(out / "classes.json", json.dumps(entries, indent=1, ensure_ascii=False) + "\n")
    save_picture(draw_legend(predictor.classes, predictor.palette, predictor.first_label), out / "legend.png")


def to_palette_image(labels: np.ndarray, predictor: Predictor) -> Image.Image:
    """Labels (H, W) as a PNG's picture: the masks' own label as its index, shown in the class's colour."""
    first = predictor.first_label
    indexed = Image.fromarray((labels + first).astype(np.uint8), mode="P")
    indexed.putpalette([0] * 3 * first + [channel for colour in predictor.palette for channel in colour])
    return indexed


def output_names(images: Sequence[Path]) -> list[str]:
    """A file name without its ending for each image: the image's own, numbered where two outputs would share one."""
    stems = [path.stem for path in images]
    outputs = [name.lower() for stem in stems for name in (stem, f"{stem}_labels")]
    if len(set(outputs)) == len(outputs) and "legend" not in outputs:
        return stems
    digits = max(4, len(str(len(images))))
    return [f"{number:0{digits}d}_{stem}" for number, stem in enumerate(stems)]


def _read(predictor: Predictor, paths: Sequence[Path], unreadable: list[str]) -> Iterator[tuple[int, np.ndarray]]:
    """Number and pixels of each image; what is wrong with one that cannot be read is added to ``unreadable``."""
    for number, path in enumerate(paths):
        try:
            yield number, predictor.read(path)
        except DataError as error:
            unreadable.append(str(error))


def _groups(numbered: Iterator[tuple[int, np.ndarray]], size: int) -> Iterator[list[tuple[int, np.ndarray]]]:
    while group := list(islice(numbered, size)):
        yield group


def find_run(
    run: str | Path,
    checkpoint: str | Path | None = None,
    *,
    config: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
) -> tuple[Config, Path]:
    """The config of a run, or the one given for it, and its weights.

    Raises:
        CheckpointError: there are no weights, or no config, or several, beside them.
        ConfigError: the given config is none.
    """
    run = Path(run)
    if run.is_file():
        folder, checkpoint = run.parent, checkpoint or run
    elif run.is_dir():
        folder = run
    else:
        raise CheckpointError(f"{run} does not exist; name a run folder or a checkpoint in one")
    loaded = load_run(folder, config=config, options=options)
    return loaded, Path(checkpoint) if checkpoint else find_checkpoint(folder)


def load_run(folder: Path, *, config: str | Path | None = None, options: Mapping[str, Any] | None = None) -> Config:
    """The config that a run dumped into its work dir; or ``config``, for weights that lie without it.

    Raises:
        CheckpointError: there is none, or more than one.
    """
    if config is None:
        found = sorted(folder.glob("*.py"))
        if len(found) != 1:
            raise CheckpointError(
                f"{folder} holds {len(found)} config files; expected the one that train_seg left there, or give the "
                "config that the checkpoint was trained with (--config)"
            )
        config = found[0]
    return load_config(config, options, work_dir=str(folder), for_training=False)


def find_checkpoint(folder: Path) -> Path:
    """The best checkpoint of a run by mIoU where there is one, or the last.

    Raises:
        CheckpointError: there is none.
    """
    best = sorted(folder.glob("best_mIoU_iter_*.pth"), key=lambda path: int(path.stem.rpartition("_")[2]))
    found = best or checkpoints_of(folder)
    if not found:
        raise CheckpointError(f"{folder} holds no checkpoint; expected iter_N.pth or best_mIoU_iter_N.pth")
    return found[-1]


def build_model(config: Config, checkpoint: Path | None) -> MAESegmentor:
    """The config's model, with a checkpoint's weights where one is given."""
    config.model.backbone.init_checkpoint = None
    with DefaultScope.overwrite_default_scope("mmseg"):
        model = MODELS.build(config.model)
    if checkpoint is not None:
        load_weights(model, checkpoint)
    return model
