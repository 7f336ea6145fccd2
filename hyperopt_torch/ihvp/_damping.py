"""Damping relative to the curvature, and by what becomes of it from one system to the next."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from ..errors import check_number
from ..operators import LinearOperator
from ._memory import Memory

AUTO = "auto"
_START, _MOST, _LEAST = 3e-3, 1.5e-2, 1e-10  # δ
_ALERT, _INDEFINITE = 1e-3, 0.5  # δ from which, and up to which, to rise at negative curvature
_RETRY = 0.9  # a step, of what negative curvature called for
_HELD, _BROKEN = 0.95, 0.85  # agreement of the curvature along one solution on two systems
_DOWN, _UP = 0.5, 4.0
_TRUST, _EVERY = 1 / 3, 8  # of what an approximate curvature leaves out; solves between two looks
_FADING = 0.97  # a step, of the largest curvature met
_POWER_STEPS = 3


def check_damping(damping: Any, *, positive: bool = False) -> float | str:
    """``damping`` if it is a number >= 0 (> 0), or "auto"; ValueError otherwise."""
    if isinstance(damping, str):
        if damping == AUTO:
            return damping
        sign = ">" if positive else ">="
        raise ValueError(f'Invalid damping: {damping!r}; expected a number {sign} 0, or "auto".')
    return check_number("damping", damping, positive=positive)


class RelativeDamping(Memory):
    """ρ = δ·σ with σ ≈ ‖H‖ by the power method, so that ρ follows the scale of the loss.

    δ = 0.003, where a systematic error of that size is small beside that of a mini-batch, and a
    singular matrix is solvable. Curvature that is not positive raises it to at most 0.5; it comes
    back slowly.

    Cost: three products before the first solve, one before each later one.
    """

    follows = True

    def initial_state(self) -> dict[str, Any]:
        return {"floor": 0.0, "leading": None, "rho": 0.0}

    def choose(self, operator: LinearOperator, rhs: Tensor) -> float:
        """ρ for the coming solve."""
        last: Tensor | None = self.state["leading"]
        usable = last is not None and last.shape == rhs.shape
        start = last.to(rhs) if last is not None and usable else rhs
        size, leading = power_method(operator, start, 1 if usable else _POWER_STEPS)
        self.state["leading"] = leading
        self.state["rho"] = max(_START, float(self.state["floor"])) * (size or 1.0)
        return float(self.state["rho"])

    def learn(self, negative: bool) -> None:
        """Takes whether a curvature was not positive."""
        floor = _RETRY * float(self.state["floor"])
        self.state["floor"] = min(max(_START, floor) * _UP, _INDEFINITE) if negative else floor


class SelfTunedDamping(Memory):
    """ρ = δ·σ, with σ ≈ ‖H‖ and a δ that is earned from solve to solve.

    σ is the largest ‖Hq‖ over unit vectors q met so far, so that the solution does not depend on
    the scale of the loss. δ goes by what becomes of the last solution x on the next system, which a
    warm start looks at anyway: its curvature xᵀHx there against the one that was solved with. A
    right-hand side may change as it likes; but where H is of another mini-batch, the directions
    that had little curvature by chance have more of it now, and x was too long there.

    - They agree within 5%: H holds, and δ is halved: undamped in the end, without bias at a fixed
      point.
    - They differ by more than 15%: δ grows, up to 0.015.
    - Curvature that is not positive: δ grows, up to 0.5, and comes back to that slowly.

    And where G stands for H, as Gauss-Newton does, its smallest eigenvalues mean nothing once they
    are smaller than what it leaves out: ρ is a third of ‖(H - G)x‖/‖x‖ at least. That is zero
    for models linear in their parameters, and for the Hessian itself.

    Cost: three products before the first solve; of an approximate curvature one more every eight
    solves.
    """

    def initial_state(self) -> dict[str, Any]:
        return {"delta": _START, "floor": 0.0, "scale": 0.0, "neglected": 0.0, "age": 0}

    def choose(self, operator: LinearOperator, rhs: Tensor, known: float | None = None) -> float:
        """ρ for the coming solve.

        Args:
            known: a lower bound of ‖H‖ that is known already.
        """
        if known is None and not self.state["scale"]:
            known, _ = power_method(operator, rhs, _POWER_STEPS)
        scale = max(known or 0.0, _FADING * float(self.state["scale"]))
        if math.isfinite(scale):
            self.state["scale"] = scale
        return max(float(self.state["delta"]), _TRUST * float(self.state["neglected"])) * scale

    def look(self, operator: LinearOperator, x: Tensor, product: Tensor) -> None:
        """Every so often takes ‖(H - G)x‖/‖x‖, over ‖H‖, for ``product`` = Gx; one product."""
        scale = float(self.state["scale"])
        if not operator.approximate or not scale:
            return
        if self.state["age"] % _EVERY == 0:
            gap, size = operator.exact(x) - product, float(operator.inner(x, x).sqrt())
            if size > 0:
                self.state["neglected"] = float(operator.inner(gap, gap).sqrt()) / size / scale
        self.state["age"] += 1

    def learn(self, agreement: float, negative: bool) -> None:
        """Takes what a solve found.

        Args:
            agreement: the smaller over the larger curvature of the last solution, on the system
                that it solved and on this one.
            negative: whether a curvature was not positive.
        """
        delta, floor = float(self.state["delta"]), _RETRY * float(self.state["floor"])
        if negative:
            floor = min(max(delta, _ALERT) * _UP, _INDEFINITE)
        elif agreement > _HELD:
            delta *= _DOWN
        elif agreement < _BROKEN:
            delta *= _UP
        self.state["floor"] = floor
        self.state["delta"] = max(min(delta, _MOST), floor, _LEAST)

    @property
    def noisy(self) -> bool:
        """Whether about as much damping is called for as there may be: H changes at random."""
        return float(self.state["delta"]) >= _MOST / 2


def power_method(operator: LinearOperator, start: Tensor, steps: int) -> tuple[float, Tensor]:
    """‖Hq‖ for a unit q on the way to the leading eigenvector, and Hq: ``steps`` products."""
    size, y = 0.0, start
    for _ in range(steps):
        norm = float(operator.inner(y, y).sqrt())
        if not 0 < norm < math.inf:
            break
        y = operator @ (y / norm)
        size = float(operator.inner(y, y).sqrt())
    return size, y
