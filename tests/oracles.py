"""Independent implementations that tests compare with, and the key mappings that carry weights to them."""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain import MaskedAutoencoder


def hf_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our MAE state dict in the names of Hugging Face's ViTMAEForPreTraining (written from its module tree)."""
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name in ("cls_token", "pos_embed") or name.startswith("patch_embed."):
            new = {"cls_token": "vit.embeddings.cls_token", "pos_embed": "vit.embeddings.position_embeddings"}.get(name)
            out[new or name.replace("patch_embed.proj", "vit.embeddings.patch_embeddings.projection")] = tensor
        elif name.startswith("norm."):
            out["vit.layernorm." + name[5:]] = tensor
        elif name.startswith(("blocks.", "decoder_blocks.")):
            room, index, rest = name.split(".", 2)
            layer = f"{'vit.layers' if room == 'blocks' else 'decoder.decoder_layers'}.{index}"
            if rest.startswith("attn.qkv."):
                for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                    out[f"{layer}.attention.{part}_proj.{rest[9:]}"] = piece
            else:
                rest = rest.replace("norm1", "layernorm_before").replace("norm2", "layernorm_after")
                out[f"{layer}.{rest.replace('attn.proj', 'attention.o_proj')}"] = tensor
        else:
            out["decoder." + name] = tensor
    return out


def hf_mae(model: MaskedAutoencoder) -> torch.nn.Module:
    """A ViTMAEForPreTraining with the weights of ``model``, in its dtype."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    config = ViTMAEConfig(
        hidden_size=model.width,
        num_hidden_layers=model.depth,
        num_attention_heads=model.num_heads,
        intermediate_size=4 * model.width,
        hidden_act="gelu",
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
        attn_implementation="sdpa",
    )
    oracle = ViTMAEForPreTraining(config).to(model.pos_embed.dtype)
    oracle.load_state_dict(hf_keys(model.state_dict()), strict=True)
    return oracle
