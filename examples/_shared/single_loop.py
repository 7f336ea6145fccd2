"""The methods of the LancBiO comparisons, at their paces, and the loop around them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil, sqrt
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
    SubBiO,
)

from .rivals import F2SA, SOBA, AmIGO, Direct, GrowingLancBiO, RandomTerm

Method = Literal[
    "lancbio", "lancbio-growing", "lancbio-published", "subbio", "soba", "amigo", "stocbio",
    "ttsa", "bsa", "f2sa", "cg-warm-1", "cg-warm-10", "cg-cold-10", "direct", "identity", "nystrom",
    "nystrom-pcg", "recycled-cg", "default",
]  # fmt: skip
METHODS: tuple[Method, ...] = get_args(Method)
SINGLE: tuple[Method, ...] = ("soba", "ttsa")  # one inner step to an outer one


@dataclass(frozen=True)
class Scale:
    """What a problem asks of the strategies.

    Attributes:
        subspace: m of LancBiO.
        growth: (factor, every): how m gets there in the published schedule.
        step: η of those that descend (SOBA, AmIGO, stocBiO, BSA, TTSA); below 2 / λ_max.
        subbio: η of SubBiO, about 1 / λ_max.
        damping: of Nyström, which alone needs one.
        rates: what the outer rate is multiplied by for TTSA, BSA and F2SA.
        penalty: the first λ of F2SA.
    """

    subspace: int
    growth: tuple[float, int]
    step: float
    subbio: float
    damping: float
    rates: dict[str, float] = field(default_factory=lambda: {"ttsa": 1.0, "bsa": 1.0, "f2sa": 1.0})
    penalty: float = 1.0


def strategies(scale: Scale) -> dict[Method, Callable[[], IHVP | None]]:
    """A fresh one for each run; None is what BilevelOptimizer takes by itself. F2SA has none."""
    m = scale.subspace
    return {
        "lancbio": lambda: LancBiO(m),
        "lancbio-growing": lambda: GrowingLancBiO(m, *scale.growth, safeguard=True),
        "lancbio-published": lambda: GrowingLancBiO(m, *scale.growth, safeguard=False),
        "subbio": lambda: SubBiO(scale.subbio),
        "soba": lambda: SOBA(scale.step),
        "amigo": lambda: AmIGO(10, scale.step),
        "stocbio": lambda: Neumann(10, scale=scale.step),  # one batch serves all of its factors
        "ttsa": lambda: RandomTerm(10, scale.step),
        "bsa": lambda: RandomTerm(10, scale.step),
        "cg-warm-1": lambda: ConjugateGradient(1, warm_start=True),
        "cg-warm-10": lambda: ConjugateGradient(10, warm_start=True),
        "cg-cold-10": lambda: ConjugateGradient(10),
        "direct": Direct,
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
    noisy: bool  # whether both losses are of mini-batches

    def draw(self) -> None:
        """The next mini-batches, before an inner step."""

    def train_loss(self) -> Tensor: ...

    def val_loss(self) -> Tensor: ...

    def optimizer(self) -> torch.optim.Optimizer:
        """Of the outer level."""


class Implicit:
    """One outer step after another with a strategy for v, at the pace of its paper."""

    def __init__(self, problem: Problem, method: Method, inner_steps: int) -> None:
        self.problem, self.method, self.inner_steps = problem, method, inner_steps
        # The bilevel lines: wrap both optimizers, then inner_step and outer_step.
        self.optimizer = BilevelOptimizer(
            torch.optim.SGD([problem.inner], lr=problem.inner_lr),
            problem.optimizer(),
            ihvp=strategies(problem.scale)[method](),
            on_trouble="ignore",  # the residual is a column
        )
        groups = (o.param_groups[0] for o in (self.optimizer.inner, self.optimizer.outer))
        self.rates = [(group, group["lr"]) for group in groups]
        self.products = 0

    def step(self, k: int) -> None:
        optimizer, problem = self.optimizer, self.problem
        inner_steps, *factors = self._pace(k)
        for (group, rate), factor in zip(self.rates, factors, strict=True):
            group["lr"] = factor * rate
        together = self.method == "soba"
        problem.draw()
        if together:  # the hypergradient first: all three levels move from the same point
            optimizer.outer.zero_grad()
            optimizer.accumulate(problem.val_loss(), problem.train_loss)
        for i in range(inner_steps):
            if i > 0:
                problem.draw()
            optimizer.inner_step(problem.train_loss)
        if together:
            optimizer.outer.step()
        else:
            optimizer.outer_step(problem.val_loss())
        self.products += optimizer.report.matvecs

    def _pace(self, k: int) -> tuple[int, float, float]:
        """Inner steps, and what the rates of θ and φ are multiplied by, at outer step k."""
        rate = self.problem.scale.rates.get(self.method, 1.0)
        if self.method == "ttsa":  # two time scales: φ slows down more than θ does
            return 1, (k + 1) ** -0.4, rate * (k + 1) ** -0.6
        if self.method == "bsa":
            return ceil(sqrt(k + 1) / 2), 1.0, rate
        return 1 if self.method == "soba" else self.inner_steps, 1.0, rate

    @property
    def residual(self) -> float | None:
        report = self.optimizer.report
        relative = None if report.residual is None else float(report.residual)
        return None if relative is None else relative * float(report.rhs_norm)


def run(
    problem: Problem,
    method: Method,
    steps: int,
    look: Callable[[], dict[str, float]],
    points: int = 20,
    inner_steps: int = 5,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One method on one problem: what it cost and how well it solved, and its curve.

    SOBA and TTSA take three times as many outer steps, with one inner step each, as SOBA does in
    the published runs of the synthetic problem. ``look`` measures the problem at each of
    ``points``, unpaid.
    """
    steps = 3 * steps if method in SINGLE else steps
    level: F2SA | Implicit = (
        F2SA(problem, inner_steps) if method == "f2sa" else Implicit(problem, method, inner_steps)
    )
    seconds, curve, residuals = 0.0, [], []
    every = max(1, steps // points)
    for step in tqdm(range(steps), method, leave=False):
        began = time.process_time()
        level.step(step)
        seconds += time.process_time() - began
        if (step + 1) % every == 0 or step + 1 == steps:
            if level.residual is not None:
                residuals.append(level.residual)
            point = {"step": step + 1, "products": level.products, "cpu_s": seconds}
            curve.append(point | {"residual": level.residual} | look())
    known = {"residual": residuals[-1], "residual_median": median(residuals)} if residuals else {}
    return {"outer_steps": steps, "products": level.products, "cpu_s": seconds} | known, curve
