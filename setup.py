"""Packaging: `pip install -e .[detection,segmentation,demo]` into an environment of one's own.

Detectron2 is not on the package index under its own name, so no extra can bring it:
`python tools/install.py detectron2` puts it beside the packages of the `detection` extra and leaves a Detectron2 that
is already there alone.
"""

from pathlib import Path

from setuptools import find_packages, setup

DETECTION = [
    "black",  # LazyConfig formats the configs that it saves with it
    "cloudpickle",
    "faster-coco-eval>=1.6",
    "fvcore>=0.1.5.post20221221",
    "hydra-core>=1.1",
    "iopath>=0.1.9",
    "pycocotools>=2.0.8",
    "setuptools<81",  # Detectron2's model zoo imports pkg_resources
    "shapely",
    "tabulate",
    "termcolor",
    "yacs>=0.1.8",
]
SEGMENTATION = [
    "ftfy",  # mmseg imports its text encoders with everything else
    "onedl-mmcv>=2.3.6,<2.4",
    "onedl-mmengine>=0.10.12,<0.11",
    "onedl-mmsegmentation>=1.4.2,<1.5",
    "opencv-python",  # required by onedl-mmcv; the headless variant beside it would break both
    "regex",
]
DEMO = ["pycocotools>=2.0.8", "scikit-image", "scikit-learn"]
EXPORT = ["onnx>=1.17", "onnxruntime>=1.20", "onnxscript>=0.3"]  # tools/export.py to ONNX, and its comparison
PARQUET = ["pyarrow>=16"]  # Hugging Face parquet files and `datasets` folders as training images
TIFF = ["tifffile>=2024.1.30"]  # TIFF files of other than one or three channels
DEV = [
    "hypothesis",
    "mypy",
    "pytest>=8",
    "pytest-timeout",
    "pytest-xdist",
    "ruff",
    "transformers>=5,<6",  # the independent oracle of the tests
    "types-PyYAML",
]

setup(
    name="mae-transfer",
    version="0.1.0",
    description="Masked autoencoder pretraining, and its encoder in Mask R-CNN, UperNet and classification",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["mae_transfer", "mae_transfer.*", "pretrain", "pretrain.*"]),
    package_data={"mae_transfer": ["assets/*"]},
    install_requires=[
        "huggingface-hub>=0.30",  # checkpoints by hf://owner/name; timm brings it too
        "matplotlib",
        "numpy>=2",
        "omegaconf>=2.3,<2.4",
        "pillow>=10",
        "PyYAML",
        "safetensors",
        "simplejpeg>=1.8",  # decodes JPEG files in part; absent, Pillow decodes them whole
        "tensorboard",
        "timm>=1.0.31",
        "torch>=2.6",
        "torchvision>=0.21",
        "tqdm",
    ],
    extras_require={
        "detection": DETECTION,
        "segmentation": SEGMENTATION,
        "demo": DEMO,
        "export": EXPORT,
        "parquet": PARQUET,
        "tiff": TIFF,
        "dev": DEV,
        "all": sorted({*DETECTION, *SEGMENTATION, *DEMO, *EXPORT, *PARQUET, *TIFF, *DEV}),
    },
)
