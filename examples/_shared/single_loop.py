"""The strategies of the LancBiO comparisons, the rivals of its paper, and the loop around them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor
from tqdm import tqdm

from hyperopt_torch import (
    IHVP,
    BilevelOptimizer,
    ConjugateGradient,
    Identity,
    LancBiO,
    Neumann,
    Nystrom,
    NystromPCG,
    RecycledCG,
    Solution,
    SubBiO,
)
from hyperopt_torch.operators import LinearOperator

Method = Literal[
    "lancbio", "subbio", "soba", "amigo", "stocbio", "cg-warm-1", "cg-warm-10", "cg-cold-10",
    "identity", "nystrom", "nystrom-pcg", "recycled-cg", "default",
]  # fmt: skip
METHODS: tuple[Method, ...] = get_args(Method)


class SOBA(IHVP):
    """v as it stands; then it takes one step of gradient descent, v ← v + η (b - Av).

    One joint product gives Jᵀv and that step. Where θ takes one step at the same point, θ, v and φ
    move together: Dagréou, Ablin, Vaiter & Moreau, NeurIPS 2022, with full batches.
    """

    def __init__(self, step_size: float) -> None:
        super().__init__()
        self.step_size = step_size

    def solve(self, operator: LinearOperator, rhs: Tensor) -> Solution:
        v = self.state.get("v", torch.zeros_like(rhs))
        Av, cross = operator.joint(v)
        self.state["v"] = v + self.step_size * (rhs - Av)
        return Solution(v, cross, (rhs - Av).norm() / rhs.norm())


class AmIGO(IHVP):
    """``steps`` steps of gradient descent on ½vᵀAv - bᵀv from the last v.

    The form of Arbel & Mairal, ICLR 2022, that descends; its other form is warm conjugate
    gradients. One joint product more closes it.
    """

    def __init__(self, steps: int, step_size: float) -> None:
        super().__init__()
        self.steps, self.step_size = steps, step_size

    def solve(self, operator: LinearOperator, rhs: Tensor) -> Solution:
        v = self.state.get("v", torch.zeros_like(rhs))
        for _ in range(self.steps):
            v = v + self.step_size * (rhs - operator @ v)
        self.state["v"] = v
        Av, cross = operator.joint(v)
        return Solution(v, cross, (rhs - Av).norm() / rhs.norm())


@dataclass(frozen=True)
class Scale:
    """What a problem asks of the strategies.

    Attributes:
        subspace: of LancBiO.
        step: η of those that descend (SOBA, AmIGO, stocBiO); below 2 / λ_max.
        subbio: η of SubBiO, about 1 / λ_max.
        damping: of Nyström, which alone needs one.
    """

    subspace: int
    step: float
    subbio: float
    damping: float


def strategies(scale: Scale) -> dict[Method, Callable[[], IHVP | None]]:
    """A fresh one for each run; None is what BilevelOptimizer takes by itself."""
    return {
        "lancbio": lambda: LancBiO(scale.subspace),
        "subbio": lambda: SubBiO(scale.subbio),
        "soba": lambda: SOBA(scale.step),
        "amigo": lambda: AmIGO(10, scale.step),
        "stocbio": lambda: Neumann(10, scale=scale.step),  # on full batches nothing else is left
        "cg-warm-1": lambda: ConjugateGradient(1, warm_start=True),
        "cg-warm-10": lambda: ConjugateGradient(10, warm_start=True),
        "cg-cold-10": lambda: ConjugateGradient(10),
        "identity": Identity,
        "nystrom": lambda: Nystrom(10, damping=scale.damping),
        "nystrom-pcg": lambda: NystromPCG(damping=0.0),
        "recycled-cg": lambda: RecycledCG(damping=0.0),
        "default": lambda: None,
    }


class Problem(Protocol):
    """Two levels: ``train_loss`` of ``inner`` and ``outer``, ``val_loss``; and their rates."""

    scale: Scale
    inner: Tensor
    outer: Tensor
    inner_lr: float

    def train_loss(self) -> Tensor: ...

    def val_loss(self) -> Tensor: ...

    def optimizer(self) -> torch.optim.Optimizer:
        """Of the outer level."""


def run(
    problem: Problem,
    method: Method,
    steps: int,
    look: Callable[[], dict[str, float]],
    points: int = 20,
    inner_steps: int = 5,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """One method on one problem: what it cost and how well it solved, and its curve.

    SOBA takes three times as many outer steps, with one inner step each, as the published runs of
    the synthetic problem do. ``look`` measures the problem at each of ``points``, unpaid.
    """
    together = method == "soba"
    steps, inner_steps = (3 * steps, 1) if together else (steps, inner_steps)
    # The bilevel lines: wrap both optimizers, then inner_step and outer_step.
    optimizer = BilevelOptimizer(
        torch.optim.SGD([problem.inner], lr=problem.inner_lr),
        problem.optimizer(),
        ihvp=strategies(problem.scale)[method](),
        on_trouble="ignore",  # the residual is a column
    )
    seconds, products, curve, residuals = 0.0, 0, [], []
    every = max(1, steps // points)
    for step in tqdm(range(1, steps + 1), method, leave=False):
        began = time.process_time()
        if together:  # the hypergradient first: all three levels move from the same point
            optimizer.outer.zero_grad()
            optimizer.accumulate(problem.val_loss(), problem.train_loss)
        for _ in range(inner_steps):
            optimizer.inner_step(problem.train_loss)
        if together:
            optimizer.outer.step()
        else:
            optimizer.outer_step(problem.val_loss())
        seconds += time.process_time() - began
        report = optimizer.report
        products += report.matvecs
        if step % every == 0 or step == steps:
            relative = float("nan") if report.residual is None else float(report.residual)
            residuals.append(relative * float(report.rhs_norm))
            point = {"step": step, "products": products, "cpu_s": seconds}
            curve.append(point | {"residual": residuals[-1]} | look())
    cost = {"outer_steps": steps, "products": products, "cpu_s": seconds}
    return cost | {"residual": residuals[-1], "residual_median": median(residuals)}, curve
