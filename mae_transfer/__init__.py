"""mae-transfer: Vision Transformers pretrained as masked autoencoders, carried to the tasks that people have.

    from mae_transfer import VisionTransformer, build_backbone, build_vit, load_backbone

Importing this pulls in no Detectron2 and no MMSegmentation: those live below ``mae_transfer.detection`` and
``mae_transfer.segmentation``.
"""

from mae_transfer.checkpoint import build_backbone, load_backbone
from mae_transfer.vit import VisionTransformer, build_vit

__version__ = "0.1.0"
__all__ = ["VisionTransformer", "__version__", "build_backbone", "build_vit", "load_backbone"]
