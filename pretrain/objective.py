"""The pretraining objective on the engine: model, optimiser and loss of a run."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mae_transfer.checkpoint import describe
from mae_transfer.data.batches import open_images
from mae_transfer.engine.distribution import Processes
from mae_transfer.engine.objective import Objective, open_once
from mae_transfer.engine.optimizer import build_optimizer, decay_groups, is_not_decayed
from mae_transfer.engine.run_folder import git_commit
from mae_transfer.layer_decay import parameter_groups
from pretrain.config import PretrainConfig
from pretrain.images import MaskedBatch, MaskedImages
from pretrain.masking import build_sampler
from pretrain.model import MaskedAutoencoder, build_mae
from pretrain.planner import training_flops


def build_model(config: PretrainConfig) -> MaskedAutoencoder:
    """The masked autoencoder of a config, weights drawn from ``run.seed``."""
    torch.manual_seed(config.run.seed)
    return build_mae(**config.model_arguments)


class PretrainRun(Objective[MaskedBatch]):
    """Everything of a pretraining run but its folder and its loop.

    Raises:
        DataError: no images. ConfigError: no length given, a warm-up longer than the run, a batch that does not
            divide among the processes.
    """

    model: MaskedAutoencoder

    def __init__(self, config: PretrainConfig, processes: Processes) -> None:
        self.config = config
        source = open_once(lambda: open_images(config.data, config.data.roots), processes)
        super().__init__(config, processes, source=source, optim=config.optim)
        self.sampler = build_sampler(config.mask.kind, config.grid, config.mask.ratio)
        self.dataset = MaskedImages(source, data=config.data, sampler=self.sampler, seed=config.run.seed)
        self.model = build_model(config).to(processes.device)
        self.sample_flops = training_flops(self.model, mask_ratio=config.mask.ratio)

    def build_optimizer(self) -> torch.optim.Optimizer:
        optim, decay = self.optim, self.optim.weight_decay
        if optim.layer_decay == 1:
            return build_optimizer(decay_groups(self.model, decay), optim)
        groups = parameter_groups(
            self.model,
            depth=self.model.depth,
            rate=optim.layer_decay,
            lr=optim.base_lr,
            weight_decay=decay,
            no_decay=is_not_decayed,
        )
        return build_optimizer(groups, optim)

    def loss(self, model: nn.Module, batch: MaskedBatch) -> Tensor:
        """Mean squared error over the masked patches of a micro-batch."""
        return model(self.to_device(batch.images), batch.noise).loss

    def metadata(self) -> dict[str, str]:
        """What transfer needs to know of the encoder."""
        return describe(
            self.model,
            mean=tuple(self.mean),
            std=tuple(self.std),
            normalised_target=self.config.model.norm_pix_loss,
            decoder_num_heads=self.model.decoder_num_heads,
            positions=self.model.positions,
            cross_prediction_ratio=self.model.cross_prediction_ratio if self.model.decoder == "cross" else None,
            git_commit=git_commit(),
            **self.lineage,
        ).to_metadata()
