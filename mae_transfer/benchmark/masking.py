"""What leaving hidden patches out of the encoder is worth: a training step with and without mask tokens in it.

The paper's comparison (Table 2, ViT-L): 2.8 times at decoder depth 8, and 3.7 or 4.1 times at depth 1.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext

import torch

from mae_transfer.benchmark.measure import Contestant, Spread, environment, race, ratios, table, write_json
from mae_transfer.engine.allocator import keep_freed_memory
from mae_transfer.engine.optimizer import OptimConfig, build_adamw, decay_groups
from mae_transfer.errors import ConfigError
from pretrain.model import MaskedAutoencoder, build_mae
from pretrain.planner import training_flops


class MaskedStep(Contestant):
    """A training step of ours; ``everywhere``: mask tokens pass through the encoder."""

    def __init__(
        self, *, size: str, image_size: int, depth: int, everywhere: bool, batch_size: int, precision: str
    ) -> None:
        self.name = "mask tokens in the encoder" if everywhere else "visible patches only"
        self.size, self.image_size, self.depth, self.everywhere = size, image_size, depth, everywhere
        self.batch_size, self.precision = batch_size, precision
        with torch.device("meta"):
            self.flops = float(training_flops(self.model()) * batch_size)

    def model(self) -> MaskedAutoencoder:
        torch.manual_seed(0)
        return build_mae(
            size=self.size,
            image_size=self.image_size,
            decoder_depth=self.depth,
            mask_tokens_in_encoder=self.everywhere,
        )

    def imports(self) -> None:
        keep_freed_memory()

    def set_up(self) -> None:
        self.trained = self.model().train()
        config = OptimConfig()
        self.optimizer = build_adamw(decay_groups(self.trained, config.weight_decay), config)
        self.images = torch.randn(self.batch_size, 3, self.image_size, self.image_size)

    def turn(self) -> None:
        with torch.autocast("cpu", torch.bfloat16) if self.precision == "bf16" else nullcontext():
            loss = self.trained(self.images).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", default="large", help="(default: %(default)s, the paper's)")
    parser.add_argument("--image-size", type=int, default=224, help="pixels (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="(default: %(default)s)")
    parser.add_argument("--decoder-depth", type=int, nargs="+", default=[8, 1], help="(default: 8 1)")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each that count (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(default: all: %(default)s)")
    parser.add_argument("--max-seconds", type=float, help="for each depth: begin no further round after so long")
    parser.add_argument("--json", metavar="FILE", help="write every number there too")


def run(arguments: argparse.Namespace) -> int:
    """Raises ConfigError for counts below 1."""
    if min(arguments.rounds, arguments.threads, arguments.batch_size, *arguments.decoder_depth) < 1:
        raise ConfigError("--rounds, --threads, --batch-size and --decoder-depth must be at least 1")
    facts = environment(arguments.threads)
    print(" · ".join(f"{key} {value}" for key, value in facts.items()))
    print(f"{arguments.size}, {arguments.image_size} px, batch {arguments.batch_size}, {arguments.precision}")
    rows, results = [], []
    for depth in arguments.decoder_depth:
        pair = [
            MaskedStep(
                size=arguments.size,
                image_size=arguments.image_size,
                depth=depth,
                everywhere=everywhere,
                batch_size=arguments.batch_size,
                precision=arguments.precision,
            )
            for everywhere in (False, True)
        ]
        visible, everywhere = race(
            pair, rounds=arguments.rounds, threads=arguments.threads, max_seconds=arguments.max_seconds
        )
        faster = ratios(everywhere.seconds, visible.seconds)
        rows.append(
            [
                f"decoder depth {depth}",
                Spread.of(visible.seconds).show(),
                Spread.of(everywhere.seconds).show(),
                faster.show(),
                f"{everywhere.flops / visible.flops:.2f}",
            ]
        )
        results.append({"decoder_depth": depth, "seconds": {t.name: t.seconds for t in (visible, everywhere)}})
    print(table(["", "visible only, s", "mask tokens in encoder, s", "faster by", "operations fewer by"], rows))
    write_json(arguments.json, {"environment": facts, "results": results})
    return 0
