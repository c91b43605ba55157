"""The peers, built to compute what ours computes: the same weights, sizes and loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision import transforms

from mae_transfer.checkpoint import IMAGENET_MEAN, IMAGENET_STD
from mae_transfer.errors import RunFailed, require
from pretrain.model import MaskedAutoencoder

_RENAMED = {
    "cls_token": "vit.embeddings.cls_token",
    "pos_embed": "vit.embeddings.position_embeddings",
    "patch_embed.proj.weight": "vit.embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "vit.embeddings.patch_embeddings.projection.bias",
    "norm.weight": "vit.layernorm.weight",
    "norm.bias": "vit.layernorm.bias",
}
_IN_BLOCKS = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.o_proj"}
_AGREEMENT = 1e-4  # of losses in fp32


def hugging_face(model: MaskedAutoencoder) -> nn.Module:
    """transformers' ViTMAEForPreTraining with the weights of ``model``, after a check that both give one loss.

    Raises:
        MissingDependencyError: transformers is not installed. RunFailed: they compute something else than we do.
    """
    transformers = require("transformers", "test")
    config = transformers.ViTMAEConfig(
        hidden_size=model.width,
        num_hidden_layers=model.depth,
        num_attention_heads=model.num_heads,
        intermediate_size=4 * model.width,
        layer_norm_eps=1e-6,
        image_size=model.image_size[0],
        patch_size=model.patch_size[0],
        num_channels=model.num_channels,
        decoder_num_attention_heads=model.decoder_num_heads,
        decoder_hidden_size=model.decoder_width,
        decoder_num_hidden_layers=model.decoder_depth,
        decoder_intermediate_size=4 * model.decoder_width,
        mask_ratio=model.mask_ratio,
        norm_pix_loss=model.norm_pix_loss,
    )
    peer: nn.Module = transformers.ViTMAEForPreTraining(config)
    peer.load_state_dict(hugging_face_keys(model.state_dict()), strict=True)
    check_same_loss(model, peer)
    return peer.train()


def literal_transform(size: int) -> transforms.Compose:
    """The transforms of the paper's code (Table 8), on Pillow images."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale=(0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )


@torch.no_grad()
def check_same_loss(model: MaskedAutoencoder, peer: nn.Module) -> None:
    """Raises RunFailed unless both say the same of two images, in fp32."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, model.num_channels, *model.image_size, generator=generator)
    noise = torch.rand(2, model.grid[0] * model.grid[1], generator=generator)
    ours, theirs = model(images, noise).loss.item(), peer(images, noise=noise).loss.item()
    if not abs(ours - theirs) <= _AGREEMENT:
        raise RunFailed(f"the loss is {ours:.6f} by ours and {theirs:.6f} by transformers: not the same computation")


def hugging_face_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict under the names of transformers' module tree; there q, k and v are layers of their own."""
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name in _RENAMED:
            out[_RENAMED[name]] = tensor
        elif name.startswith(("blocks.", "decoder_blocks.")):
            stack, index, rest = name.split(".", 2)
            layer = f"{'vit.layers' if stack == 'blocks' else 'decoder.decoder_layers'}.{index}"
            module, part = rest.rsplit(".", 1)
            if module == "attn.qkv":
                for letter, piece in zip("qkv", tensor.chunk(3), strict=True):
                    out[f"{layer}.attention.{letter}_proj.{part}"] = piece
            else:
                out[f"{layer}.{_IN_BLOCKS.get(module, module)}.{part}"] = tensor
        else:
            out[f"decoder.{name}"] = tensor
    return out
