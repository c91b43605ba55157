"""Masked-autoencoder pretraining: the model, its masks, and the run that teaches it."""

from pretrain.model import MAEOutput, MaskedAutoencoder, build_mae

__all__ = ["MAEOutput", "MaskedAutoencoder", "build_mae"]
