"""What one hypergradient cost, and whether to trust it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

_GROWTH = 100.0


class Trouble(NamedTuple):
    kind: str
    text: str


@dataclass(frozen=True)
class SelfCheck:
    product: float
    cross: float
    kink: float | None
    tolerance: float


@dataclass(frozen=True)
class SolveReport:
    """The record of one hypergradient: a solve of (H + ρI) x = b, or inner steps taken again.

    Numbers that live on the device stay 0-d tensors until somebody reads them: making a report
    never waits for the device; printing it, or calling :meth:`trouble`, does.

    Attributes:
        strategy: the strategy, with its settings.
        matvecs: products with the inner curvature in the whole hypergradient, the closing joint
            product (Hx, Jᵀx) included. A batched product of k columns counts k.
        rhs_norm: ‖b‖, the norm of the outer gradient with respect to the inner parameters.
        solution_norm: ‖x‖.
        inner_gradient_norm: ‖∇f‖ at the current point. The implicit function theorem speaks of
            points where it is zero.
        residual: ‖b - (H + ρI) x‖ / ‖b‖, where known; 0 for b = 0.
        rank: number of directions that a low-rank strategy kept.
        negative_curvature: whether the solve met a direction of nonpositive curvature.
        converged: whether the strategy met its own tolerance; None where it has none.
        gradients: inner gradients beyond those of the training itself, where inner steps are taken
            again.
        growth: ‖adjoint at the first inner step‖ / ‖b‖, of reverse mode through inner steps.
        astray: inner steps after which the parameters were not where the optimizer had put them.
        notes: remarks in words, such as a clamped rank.
    """

    strategy: str
    matvecs: int
    rhs_norm: Tensor
    solution_norm: Tensor | None = None
    inner_gradient_norm: Tensor | None = None
    residual: Tensor | None = None
    rank: Tensor | int | None = None
    negative_curvature: Tensor | bool | None = None
    converged: Tensor | bool | None = None
    gradients: int | None = None
    growth: Tensor | None = None
    astray: Tensor | None = None
    notes: tuple[str, ...] = ()
    hypergradient_norm: Any = None
    finite: Any = None
    damping: Any = None
    curvature: Any = None
    precision: Any = None
    self_check: Any = None
    loss: Any = None

    def troubles(self) -> list[Trouble]:
        found = [Trouble(text.split()[0], text) for text in self.trouble()]
        if self.finite is not None and not bool(self.finite):
            found.append(Trouble("not_finite", "not finite"))
        return found

    def trouble(self) -> list[str]:
        """What a user should look at before trusting the hypergradient; [] if nothing."""
        found = []
        sizes = [float(x) for x in (self.solution_norm, self.growth) if x is not None]
        if not all(map(math.isfinite, sizes)):
            found.append("the solution is not finite")
        if self.negative_curvature is not None and bool(self.negative_curvature):
            found.append(
                "negative curvature: H + damping is not positive definite; raise damping, or use "
                "curvature=GaussNewton() with a closure that returns (loss, outputs)"
            )
        if self.residual is not None and float(self.residual) > 1:
            found.append(
                f"residual {float(self.residual):.2g} > 1: further from solving the system than "
                "x = 0; raise damping, rank or max_iter"
            )
        if self.growth is not None and float(self.growth) > _GROWTH:
            found.append(
                f"the adjoint grew {float(self.growth):.2g} times over the inner steps: the inner "
                "loop is unstable; lower its learning rate or use a shorter window"
            )
        if self.astray is not None and int(self.astray):
            found.append(
                f"after {int(self.astray)} inner step(s) the parameters were not where the "
                "optimizer had put them (a projection, a skipped step?): that is not differentiated"
            )
        return found

    def __str__(self) -> str:
        lines = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "notes" or value is None:
                continue
            if isinstance(value, Tensor):
                value = value.item()
            text = f"{value:.4g}" if isinstance(value, float) else str(value)
            lines.append(f"{field.name:20} {text}")
        lines += [f"{'note':20} {note}" for note in self.notes]
        lines += [f"{'trouble':20} {text}" for text in self.trouble()]
        return "\n".join(lines)
