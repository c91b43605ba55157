"""A linear probe: how well a linear classifier on frozen features tells labelled images apart.

Multinomial logistic regression on standardised features (what BatchNorm without affine parameters gives, as in the MAE
paper's probe, Appendix A.1), fitted to its optimum by full-batch L-BFGS. It is a function of the features alone:
nothing is drawn, and nothing is kept from one fit to the next.

Shapes: N images, D width, c classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mae_transfer.errors import ConfigError

_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """The online linear probe, for a run that has labelled images at hand (a folder a class)."""

    train_path: Any = None  # folder, or list of them, to fit on; null for no probe
    val_path: Any = None  # folder to test on
    every_epochs: float = 20.0  # of the run; 0 for never
    images: int = 10000  # at most so many of each

    def __post_init__(self) -> None:
        if (self.train_path is None) != (self.val_path is None):
            raise ConfigError("probe.train_path and probe.val_path go together; give both, or neither")
        if self.every_epochs < 0:
            raise ConfigError(f"probe.every_epochs={self.every_epochs} must not be negative; 0 means never")
        if self.images < 1:
            raise ConfigError(f"probe.images={self.images} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class LinearProbe:
    """A fitted probe.

    Attributes:
        mean, std: (D,) of the features that it was fitted on.
        weight: (c, D); bias: (c,).
        objective: mean cross-entropy + l2/2·|weight|² at the end of the fit.
        iterations: of L-BFGS.
    """

    mean: Tensor
    std: Tensor
    weight: Tensor
    bias: Tensor
    objective: float
    iterations: int

    def logits(self, features: Tensor) -> Tensor:
        """(N, D) -> (N, c)."""
        return F.linear((features - self.mean) / self.std, self.weight, self.bias)


def fit_probe(
    features: Tensor, labels: Tensor, *, num_classes: int, l2: float = 1e-3, max_iterations: int = 200
) -> LinearProbe:
    """Fit a linear classifier.

    Args:
        features: (N, D), from a frozen encoder; no gradient goes into them.
        labels: (N,) int64, 0 to c − 1.
        l2: strength of the penalty on the weight, relative to the mean cross-entropy: 1/(C·N) of scikit-learn's
            LogisticRegression. With a few images a class a probe without any would only learn them by heart.
        max_iterations: of L-BFGS, which stops when it no longer gains.
    """
    features = features.detach().float()
    mean, std = features.mean(dim=0), (features.var(dim=0, correction=0) + _EPS).sqrt()
    x = (features - mean) / std
    weight = torch.zeros(num_classes, x.shape[1], device=x.device, requires_grad=True)
    bias = torch.zeros(num_classes, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=max_iterations,
        tolerance_grad=1e-6,
        tolerance_change=1e-9,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(x, weight, bias), labels) + 0.5 * l2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():  # hooks of a run are called without
        optimizer.step(closure)
        objective = closure().item()
    return LinearProbe(
        mean=mean,
        std=std,
        weight=weight.detach(),
        bias=bias.detach(),
        objective=objective,
        iterations=int(optimizer.state[weight]["n_iter"]),
    )


def top_accuracies(logits: Tensor, labels: Tensor, ks: Sequence[int] = (1, 5)) -> list[float]:
    """The share of images, in per cent, whose class is among the k that score highest, for each k."""
    ranked = logits.topk(min(max(ks), logits.shape[1]), dim=1).indices  # (N, k)
    right = ranked == labels[:, None]
    return [100 * right[:, :k].any(dim=1).double().mean().item() for k in ks]
