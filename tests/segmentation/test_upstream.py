"""Nothing that only the onedl family has: upstream MMSegmentation 1.2.2 with MMEngine 0.10 takes the same classes.

Upstream is not installed here. ``UPSTREAM`` was read off mmsegmentation 1.2.2, mmengine 0.10.7 and mmcv-lite 2.1.0; a
name that is not in it must be looked up there before it is added. Where a Python with upstream is at hand, the slow
test trains with it::

    UPSTREAM_PYTHON=/path/to/python pytest -m slow tests/segmentation/test_upstream.py
"""

from __future__ import annotations

import ast
import os
import subprocess
from pathlib import Path

import pytest

from tests.segmentation.conftest import write_folder

ROOT = Path(__file__).resolve().parents[2]
FAMILY = ("mmseg", "mmengine", "mmcv")
UPSTREAM = {
    "mmcv": "imread",
    "mmcv.cnn": "build_norm_layer ConvModule",
    "mmcv.transforms": "BaseTransform Compose LoadImageFromFile RandomFlip RandomResize Resize TestTimeAug",
    "mmengine.config": "Config DictAction",
    "mmengine.device": "get_device",
    "mmengine.dist": "all_gather all_reduce barrier broadcast broadcast_object_list collect_results get_dist_info "
    "get_rank get_world_size is_main_process master_only",
    "mmengine.hooks": "CheckpointHook EMAHook Hook LoggerHook",
    "mmengine.logging": "HistoryBuffer MMLogger print_log",
    "mmengine.model": "BaseModule BaseTTAModel MMDistributedDataParallel is_model_wrapper",
    "mmengine.optim": "AmpOptimWrapper DefaultOptimWrapperConstructor LinearLR OptimWrapper PolyLR build_optim_wrapper",
    "mmengine.registry": "DefaultScope MODEL_WRAPPERS",
    "mmengine.runner": "IterBasedTrainLoop Runner",
    "mmengine.structures": "PixelData",
    "mmengine.utils": "apply_to",
    "mmseg.datasets": "ADE20KDataset BaseSegDataset COCOStuffDataset CityscapesDataset "
    "PascalContextDataset PascalContextDataset59 PascalVOCDataset",
    "mmseg.models": "",
    "mmseg.models.backbones": "MAE",
    "mmseg.models.decode_heads": "FCNHead UPerHead",
    "mmseg.models.decode_heads.decode_head": "BaseDecodeHead",
    "mmseg.models.losses": "CrossEntropyLoss DiceLoss accuracy",
    "mmseg.models.segmentors": "EncoderDecoder",
    "mmseg.registry": "DATASETS DATA_SAMPLERS HOOKS LOOPS METRICS MODELS OPTIM_WRAPPERS OPTIM_WRAPPER_CONSTRUCTORS "
    "TRANSFORMS",
    "mmseg.structures": "OHEMPixelSampler SegDataSample",
}


def test_every_name_that_is_imported_is_upstreams_too() -> None:
    unknown = set()
    for path in (ROOT / "mae_transfer" / "segmentation").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in FAMILY:
                known = UPSTREAM.get(node.module, "").split()
                unknown |= {f"{path.name}: {node.module}.{name.name}" for name in node.names if name.name not in known}
            elif isinstance(node, ast.Import):
                modules = [name.name for name in node.names if name.name.split(".")[0] in FAMILY]
                unknown |= {f"{path.name}: {name}" for name in modules if name not in UPSTREAM}
    assert not unknown, "look these up in upstream, then add them"


@pytest.mark.slow
@pytest.mark.skipif("UPSTREAM_PYTHON" not in os.environ, reason="UPSTREAM_PYTHON names no Python with upstream")
@pytest.mark.parametrize("config", ["upernet_tiny", "linear_tiny"])
def test_a_model_trains_and_predicts_in_upstream(config: str, tmp_path: Path) -> None:
    python, data, run = os.environ["UPSTREAM_PYTHON"], write_folder(tmp_path / "ade"), tmp_path / "run"
    family = "import mmseg, mmengine; print(mmseg.__version__, mmengine.__version__)"
    versions = subprocess.run([python, "-c", family], capture_output=True, text=True, check=True).stdout.split()
    assert versions[0].startswith("1.2") and versions[1].startswith("0.10")
    options = ["dataset.reduce_zero_label=False", "dataset.crop_size=32", "dataset.workers=0", "train.max_iters=2"]
    options += ["train.val_interval=2", "train.log_interval=1", f"dataset.root={data}"]
    file = ROOT / "configs" / "segmentation" / f"{config}.py"
    commands = [
        ["tools/train_seg.py", file, "--work-dir", run, "--cfg-options", *options],
        ["tools/test_seg.py", run / f"{config}.py", run / "iter_2.pth", "--tta"],
        ["tools/predict.py", run, data / "images" / "validation", "--out", tmp_path / "out"],
    ]
    for tool, *arguments in commands:
        done = subprocess.run(
            [python, ROOT / str(tool), *map(str, arguments)], capture_output=True, text=True, check=False, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out" / "scene_0_labels.png").is_file()
