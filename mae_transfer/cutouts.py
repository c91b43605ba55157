"""Photographed objects and surfaces that demo scenes are composed of.

The photographs are those inside the scikit-image and scikit-learn wheels, so nothing is downloaded. Objects are cut out
along outlines stored beside this file (``assets/outlines.json``); surfaces are windows of marked regions.
"""

from __future__ import annotations

import functools
import importlib.util
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

from mae_transfer.errors import MissingDependencyError

OBJECTS = ("astronaut", "coin", "cup", "flower", "motorcycle", "temple")
SURFACES = ("brick", "foliage", "grass", "gravel", "sky", "wood")

# Longest side of an object at the front of a scene, in parts of the scene's shorter side, and its largest tilt.
LONGEST_SIDE = {"astronaut": 0.46, "coin": 0.15, "cup": 0.34, "flower": 0.28, "motorcycle": 0.52, "temple": 0.60}
TILT = {"astronaut": 10, "coin": 180, "cup": 20, "flower": 180, "motorcycle": 8, "temple": 4}
COIN_METALS = ((1.0, 0.98, 0.94), (1.0, 0.83, 0.45), (0.93, 0.60, 0.40))  # silver, gold, bronze

# Where each surface is seen: photograph, then left, top, right, bottom in its pixels.
REGIONS: dict[str, tuple[tuple[str, tuple[int, int, int, int]], ...]] = {
    "brick": (("brick.png", (0, 0, 512, 512)),),
    "foliage": (
        ("flower.jpg", (0, 0, 150, 427)),
        ("flower.jpg", (480, 0, 640, 427)),
        ("china.jpg", (400, 330, 640, 427)),
    ),
    "grass": (("grass.png", (0, 0, 512, 512)),),
    "gravel": (("gravel.png", (0, 0, 512, 512)),),
    "sky": (("china.jpg", (300, 0, 640, 150)), ("rocket.jpg", (100, 0, 530, 115))),
    "wood": (("coffee.png", (495, 0, 600, 400)), ("coffee.png", (0, 290, 90, 400))),
}
# The textures are gray photographs: they are given the colour of what they show, (dark, bright) in RGB.
TINTS = {
    "brick": (((40, 18, 12), (235, 150, 110)), ((45, 30, 20), (230, 190, 150))),
    "grass": (((15, 30, 5), (170, 205, 95)), ((35, 35, 10), (205, 200, 110))),
    "gravel": (((20, 20, 22), (225, 220, 215)), ((40, 30, 20), (235, 215, 180))),
}


@functools.cache
def photograph(name: str) -> Image.Image:
    """A photograph of the installed wheels, as RGB.

    Raises:
        MissingDependencyError: scikit-image or scikit-learn is not installed, or was packed without its pictures.
    """
    for package, folder in (("skimage", "data"), ("sklearn", "datasets/images")):
        specification = importlib.util.find_spec(package)
        if specification is not None and specification.origin is not None:
            path = Path(specification.origin).parent / folder / name
            if path.is_file():
                with Image.open(path) as image:
                    return image.convert("RGB")
    raise MissingDependencyError(
        f"the photograph {name} of scikit-image or scikit-learn is needed to compose scenes and was not found. "
        "Install both with: pip install -e '.[demo]'"
    )


@functools.cache
def cutouts(category: str) -> list[Image.Image]:
    """The objects of a category, cut out of their photographs along the stored outlines: RGBA, trimmed."""
    outlines = json.loads((Path(__file__).parent / "assets" / "outlines.json").read_text(encoding="utf-8"))[category]
    picture = photograph(outlines["photograph"])
    found = []
    for outline in outlines["outlines"]:
        alpha = Image.new("L", picture.size, 0)
        ImageDraw.Draw(alpha).polygon([(x, y) for x, y in zip(outline[::2], outline[1::2])], fill=255)
        alpha = alpha.filter(ImageFilter.MinFilter(3)).filter(
            ImageFilter.GaussianBlur(0.8)
        )  # no rim of the old background
        cut = picture.copy()
        cut.putalpha(alpha)
        cut = cut.crop(alpha.getbbox())
        cut.thumbnail((320, 320), Image.Resampling.LANCZOS)  # as large as a scene ever needs one
        found.append(cut)
    return found


def between(rng: np.random.Generator, low: float, high: float) -> float:
    return float(rng.uniform(low, high))


def scaled_channels(image: Image.Image, factors: NDArray[np.float64] | tuple[float, ...]) -> Image.Image:
    """An RGB image with each channel multiplied."""
    return Image.fromarray(np.clip(np.asarray(image, dtype=np.float32) * np.asarray(factors), 0, 255).astype(np.uint8))


def paint_surface(name: str, size: tuple[int, int], rng: np.random.Generator, *, receding: bool) -> Image.Image:
    """A piece of a photographed surface.

    Args:
        name: one of SURFACES.
        size: width and height in pixels.
        rng: decides the piece, its scale, colour and light.
        receding: a ground, squeezed towards its far (upper) edge as perspective does.
    """
    width, height = size
    source, box = REGIONS[name][rng.integers(len(REGIONS[name]))]
    region = photograph(source).crop(box)
    if name in TINTS:
        dark, bright = TINTS[name][rng.integers(len(TINTS[name]))]
        ramp = np.linspace(dark, bright, 256).astype(np.uint8)  # (256, 3): gray value -> colour
        region = Image.fromarray(ramp[np.asarray(region.getchannel(0))])
    elif name != "sky" and rng.random() < 0.5:
        region = region.transpose(Image.Transpose.ROTATE_90)
    if rng.random() < 0.5:
        region = region.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    # A window of the surface's shape: as large as the region allows, or smaller (closer).
    w, h = region.size
    fit = min(w / width, h / height) * between(rng, 0.6, 1.0)
    window_w, window_h = width * fit, height * fit
    x, y = between(rng, 0, w - window_w), between(rng, 0, h - window_h)
    squeeze = 0.22 * window_w if receding else 0.0  # the far edge shows all of the window, the near edge its middle
    corners = (x, y, x + squeeze, y + window_h, x + window_w - squeeze, y + window_h, x + window_w, y)
    piece = region.transform(size, Image.Transform.QUAD, corners, Image.Resampling.BICUBIC)
    return scaled_channels(piece, between(rng, 0.8, 1.15) * rng.uniform(0.94, 1.06, size=3))


def _dress(category: str, cut: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Another colour and light for a cut-out (RGBA), as far as the object may have it and still be what it is."""
    alpha, colour = cut.getchannel("A"), cut.convert("RGB")
    if category == "coin":
        colour = scaled_channels(colour, np.asarray(COIN_METALS[rng.integers(3)]) * between(rng, 0.9, 1.25))
    elif category in ("flower", "motorcycle"):  # petals and paint come in other colours: turn the hue
        hue, saturation, value = colour.convert("HSV").split()
        turn = int(rng.choice([0, 0, 225, 200, 20] if category == "flower" else [0, 0, 150, 90, 25]))
        hue = hue.point(lambda old: (old + turn) % 256)
        colour = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    colour = scaled_channels(colour, between(rng, 0.8, 1.2) * rng.uniform(0.95, 1.05, size=3))
    colour = ImageEnhance.Contrast(colour).enhance(between(rng, 0.85, 1.15))
    colour.putalpha(alpha)
    return colour


def pose(category: str, rng: np.random.Generator, longest: float) -> Image.Image:
    """A cut-out of a category, dressed, mirrored or not, resized and tilted (RGBA, trimmed)."""
    cuts = cutouts(category)
    cut = cuts[rng.integers(len(cuts))]
    factor, stretch = longest / max(cut.size), between(rng, 0.92, 1.08)
    shape = max(4, round(cut.width * factor * stretch)), max(4, round(cut.height * factor / stretch))
    cut = _dress(category, cut.resize(shape, Image.Resampling.LANCZOS), rng)
    if rng.random() < 0.5:
        cut = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    cut = cut.rotate(between(rng, -TILT[category], TILT[category]), Image.Resampling.BICUBIC, expand=True)
    return cut.crop(cut.getchannel("A").getbbox())
