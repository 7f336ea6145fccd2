"""Ways to a hypergradient by name, and what runs with them have measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import sqrt
from statistics import mean, median
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from hyperopt_torch import (
    PZOBO,
    ConjugateGradient,
    HypergradientEstimator,
    ImplicitDifferentiation,
    Neumann,
    SolveReport,
    Unrolled,
)

from .checkpoint import Checkpoint

Method = Literal["pzobo", "pzobo-per-tensor", "unrolled", "cg", "fixed-point", "direct"]
METHODS: tuple[Method, ...] = get_args(Method)


class DirectOnly(HypergradientEstimator):
    """∂g/∂φ alone, θ held fixed: what a plain optimizer of the validation loss does."""

    def estimate(self, problem: Any, outer_loss: Tensor) -> list[Tensor | None]:
        b, direct = problem.outer_gradients(outer_loss)
        rhs_norm = torch.stack([g.norm() for g in b if g is not None]).norm()
        self.report = SolveReport("DirectOnly()", matvecs=0, rhs_norm=rhs_norm, gradients=0)
        return list(direct)


def make_estimator(
    method: Method, inner_steps: int, inner_lr: float, smoothing: float, directions: int = 1
) -> HypergradientEstimator:
    """A fresh one for each run; PZOBO takes the seed of its directions from torch.manual_seed.

    Args:
        method: "fixed-point" is a Neumann series of as many terms as there are inner steps.
        inner_steps, inner_lr: of the loop that it is for.
        smoothing, directions: μ and Q of both kinds of PZOBO.
    """
    if method == "pzobo":
        return PZOBO(directions, smoothing=smoothing)
    if method == "pzobo-per-tensor":
        return PZOBO(directions, smoothing=smoothing, directions="per_tensor")
    if method == "unrolled":
        return Unrolled()
    if method == "cg":
        return ImplicitDifferentiation(ConjugateGradient(10))
    if method == "fixed-point":
        return ImplicitDifferentiation(Neumann(inner_steps, scale=inner_lr))
    return DirectOnly()


def direct_term(val_loss: Tensor, outer: Sequence[Tensor]) -> list[Tensor]:
    """∂g/∂φ, to be taken before the optimizer frees the graph of the loss."""
    return list(
        torch.autograd.grad(
            val_loss, outer, retain_graph=True, allow_unused=True, materialize_grads=True
        )
    )


# The head of what ``cells`` gives.
COLUMNS = ("|second|/|direct|", "products", "gradients", "seconds")


@dataclass
class Run:
    """What one run has measured: plain values, which go into its checkpoint."""

    losses: list[float] = field(default_factory=list)  # outer, before each outer step
    ratios: list[float] = field(default_factory=list)  # |second term| / |direct term|
    products: int = 0  # of one hypergradient
    gradients: int = 0  # of one hypergradient, beyond those of the training
    seconds: float = 0.0  # of training
    test: list[float] = field(default_factory=list)

    @staticmethod
    def load(checkpoint: Checkpoint, settings: dict[str, str]) -> tuple[int, Run]:
        """(steps done, what they measured), once it is sure that they had the same settings."""
        done, log = checkpoint.load()
        if log and log["settings"] != settings:
            raise SystemExit(f"{checkpoint.path} was saved with other settings: {log['settings']}")
        return done, Run(**log["run"]) if log else Run()

    def look(
        self, report: SolveReport, outer: Sequence[Tensor], direct: Sequence[Tensor] | None
    ) -> None:
        """After an outer step: its cost; given the direct term, what else is in ``.grad``."""
        self.products, self.gradients = report.matvecs, report.gradients or 0
        if direct:
            pairs = zip(outer, direct, strict=True)
            second = [-d if p.grad is None else p.grad - d for p, d in pairs]
            self.ratios.append(_norm(second) / _norm(direct))

    @property
    def late_loss(self) -> float:
        """Mean over the last tenth of the outer steps."""
        return mean(self.losses[-max(1, len(self.losses) // 10) :])


def cells(runs: Sequence[Run]) -> list[str]:
    """Of one method, with one run for each seed."""
    return [
        f"{median(x for r in runs for x in r.ratios):.2g}",
        f"{runs[0].products}",
        f"{runs[0].gradients}",
        f"{mean(r.seconds for r in runs):.1f}",
    ]


def _norm(tensors: Sequence[Tensor]) -> float:
    return sqrt(sum(t.double().square().sum().item() for t in tensors))
