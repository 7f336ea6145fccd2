"""Ways to a hypergradient by name, and what runs with them have measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import sqrt
from statistics import mean
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

Method = Literal["pzobo", "pzobo-per-tensor", "unrolled", "cg", "fixed-point", "default", "direct"]
METHODS: tuple[Method, ...] = get_args(Method)


class DirectOnly(HypergradientEstimator):
    """∂g/∂φ alone, θ held fixed: what a plain optimizer of the validation loss does."""

    def estimate(self, problem: Any, outer_loss: Tensor) -> list[Tensor | None]:
        b, direct = problem.outer_gradients(outer_loss)
        rhs_norm = torch.stack([g.norm() for g in b if g is not None]).norm()
        self.report = SolveReport("DirectOnly()", matvecs=0, rhs_norm=rhs_norm, gradients=0)
        return list(direct)


def make_estimator(
    method: str, inner_steps: int, inner_lr: float, smoothing: float, directions: int = 1
) -> HypergradientEstimator | None:
    """A fresh one for each run; PZOBO takes the seed of its directions from torch.manual_seed.

    Args:
        method: "default", and whatever is no estimator, gives None; "fixed-point" is a Neumann
            series of as many terms as there are inner steps.
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
    return DirectOnly() if method == "direct" else None


def zeroth_order(
    objective: Callable[[], Tensor], outer: Sequence[Tensor], smoothing: float, directions: int
) -> Tensor:
    """HOZOG: (1/Q) Σ (F(φ + μu) - F(φ)) / μ · u, u ~ N(0, I), goes into ``.grad``; F(φ) returned.

    F is the whole outer objective, the inner run in it: what PZOBO takes from autograd, ∂g/∂φ and
    ∂g/∂θ, is as unknown here as the response. With μ → 0 and the same u, PZOBO's second term is the
    same, and ⟨∂g/∂φ, u⟩ u stands for its ∂g/∂φ.

    Args:
        objective: F at the present values of ``outer``, the same at each call.
        smoothing, directions: μ and Q.

    Cost: Q inner runs more.

    Reference: Gu, Liu, Zhang, Geng & Huang, "Optimizing large-scale hyperparameters via automated
    learning algorithm", 2021.
    """
    base = objective().detach()
    kept = [p.detach().clone() for p in outer]
    for p in outer:
        p.grad = torch.zeros_like(p)
    with torch.no_grad():
        for _ in range(directions):
            u = [torch.randn_like(p) for p in outer]
            for p, at, step in zip(outer, kept, u, strict=True):
                p.copy_(at + smoothing * step)
            with torch.enable_grad():
                slope = (objective().detach() - base) / smoothing
            for p, step in zip(outer, u, strict=True):
                assert p.grad is not None
                p.grad += slope / directions * step
        for p, at in zip(outer, kept, strict=True):
            p.copy_(at)
    return base


def direct_term(val_loss: Tensor, outer: Sequence[Tensor]) -> list[Tensor]:
    """∂g/∂φ, to be taken before the optimizer frees the graph of the loss."""
    return list(
        torch.autograd.grad(
            val_loss, outer, retain_graph=True, allow_unused=True, materialize_grads=True
        )
    )


@dataclass
class Run:
    """What one run has measured: plain values, which go into its checkpoint."""

    losses: list[float] = field(default_factory=list)  # outer, before each outer step
    ratios: list[float] = field(default_factory=list)  # |second term| / |direct term|
    products: int = 0
    gradients: int = 0  # beyond those of the training
    seconds: float = 0.0  # of training
    test: list[float] = field(default_factory=list)

    @staticmethod
    def load(checkpoint: Checkpoint, settings: dict[str, str]) -> tuple[int, Run]:
        """(steps done, what they measured), once it is sure that they had the same settings."""
        done, log = checkpoint.load()
        if log and log["settings"] != settings:
            raise SystemExit(f"{checkpoint.path} was saved with other settings: {log['settings']}")
        return done, Run(**log["run"]) if log else Run()

    def count(self, report: SolveReport) -> None:
        """The cost of one more hypergradient."""
        self.products += report.matvecs
        self.gradients += report.gradients or 0

    def look(self, outer: Sequence[Tensor], direct: Sequence[Tensor]) -> None:
        """After an outer step, given the direct term: what else is in ``.grad``."""
        pairs = zip(outer, direct, strict=True)
        second = [-d if p.grad is None else p.grad - d for p, d in pairs]
        self.ratios.append(_norm(second) / _norm(direct))

    @property
    def late_loss(self) -> float:
        """Mean over the last tenth of the outer steps."""
        return mean(self.losses[-max(1, len(self.losses) // 10) :])


def _norm(tensors: Sequence[Tensor]) -> float:
    return sqrt(sum(t.double().square().sum().item() for t in tensors))
