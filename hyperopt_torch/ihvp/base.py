"""The interface of everything that `ihvp=` takes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..operators import Damped, LinearOperator
from ._damping import AUTO, RelativeDamping, check_damping
from ._memory import InnerStep, Memory
from ._watchman import Watched

__all__ = ["IHVP", "InnerStep", "Memory", "Preconditioner", "Solution", "rescaled"]


@dataclass(frozen=True)
class Solution:
    """x ≈ (H + ρI)⁻¹ b, and what the strategy knows about it.

    Attributes:
        x: (n,) the solution.
        cross: (h,) Jᵀx, where it came along with the products; the caller computes it otherwise.
        residual: ‖b - (H + ρI) x‖ / ‖b‖, where known without a further product.
        curvature: xᵀ(H + ρI)x, where known without a further product.
        damping: ρ, where the strategy chose it itself.
        rank, negative_curvature, converged, diverged, notes: as in
            :class:`~hyperopt_torch.SolveReport`.
    """

    x: Tensor
    cross: Tensor | None = None
    residual: Tensor | None = None
    rank: Tensor | int | None = None
    negative_curvature: Tensor | bool | None = None
    converged: Tensor | bool | None = None
    notes: tuple[str, ...] = ()
    curvature: Tensor | None = None
    diverged: Tensor | bool | None = None
    damping: Tensor | float | None = None


class IHVP(Memory, ABC):
    """A strategy for x ≈ (H + damping·I)⁻¹ b, where H is known by its products.

    Law 1: in its exact limit (full rank, n steps, all terms) it gives the exact damped solution.
    Law 2: it never hides trouble. Breakdown and negative curvature are flagged in the
    :class:`Solution`; NaN stays NaN.

    A strategy sees flat vectors and a :class:`~hyperopt_torch.operators.LinearOperator`, never a
    model, an optimizer or a loss.
    """

    damping: Any = 0.0  # ρ, a number, or "auto": chosen, relative to ‖H‖
    follows: bool = False  # whether the memory is about a neighbourhood of θ, worthless elsewhere

    _relative: RelativeDamping | None = None

    def _set_damping(self, damping: Any) -> None:
        """Takes the setting; ValueError if it is neither a number >= 0 nor "auto"."""
        self.damping = check_damping(damping)
        if self.damping == AUTO:
            self._relative = RelativeDamping()

    def damped(self, operator: LinearOperator, rhs: Tensor) -> Damped:
        """H + ρI for the coming solve, ρ in its ``damping``; with "auto" a product, and syncs."""
        relative = self._relative
        return Damped(operator, relative.choose(operator, rhs) if relative else self.damping)

    @abstractmethod
    def solve(self, operator: LinearOperator, rhs: Tensor) -> Tensor | Solution:
        """x ≈ (H + damping·I)⁻¹ rhs: (n,) -> (n,), alone or in a :class:`Solution`."""

    def solution(self, operator: LinearOperator, rhs: Tensor) -> Solution:
        """:meth:`solve`, watched: where anything met was not finite, so is the solution.

        A memory of another dtype, device or size is forgotten first (``model.to(...)``).
        """
        if not self.observes and self._is_stale(rhs):
            self.reset()
        watched = Watched(operator, rhs)
        try:
            found = self.solve(watched, rhs)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # eigenvalues of NaN
            rho = torch.nan if self.damping == AUTO else None  # it was not found
            notes = (f"linear algebra failed: {error}",)
            found = Solution(rhs * torch.nan, notes=notes, damping=rho)
        operator.matvecs = max(operator.matvecs, watched.matvecs)
        solution = found if isinstance(found, Solution) else Solution(found)
        if self._relative is not None:
            self._relative.learn(bool(solution.negative_curvature))
            solution = replace(solution, damping=self._relative.state["rho"])
        poison = watched.poison.to(rhs.dtype)
        cross = solution.cross
        return replace(
            solution,
            x=solution.x + poison,
            cross=None if cross is None else cross + poison.to(cross.dtype),
        )

    def _is_stale(self, rhs: Tensor) -> bool:
        memories: list[Memory] = [self, *self._parts().values()]
        tensors = [
            v
            for m in memories
            for name, v in m.state.items()
            if isinstance(v, Tensor) and name not in m.state_of_its_own_size
        ]
        vectors = [v for v in tensors if v.ndim and v.is_floating_point() and len(rhs) in v.shape]
        like = (rhs.dtype, rhs.device)
        return any((v.dtype, v.device) != like for v in vectors if v.numel() >= len(rhs))


def rescaled(operator: LinearOperator, damping: Tensor | float, rhs: Tensor, x: Tensor) -> Solution:
    """The multiple of x that is best for (H + ρI) x = b: argmin over a of ½(ax)ᵀA(ax) - b(ax).

    One joint product, the one that a hypergradient needs anyway, so it costs nothing. Where
    xᵀAx is not positive there is no best multiple: x stays, and negative curvature is flagged.
    """
    Ax, cross = operator.joint(x)
    Ax = Ax + damping * x
    curvature, along = operator.inner(x, Ax), operator.inner(x, rhs)
    flat = (curvature <= 0) & (operator.inner(x, x) > 0)
    a = torch.where(curvature > 0, along / torch.where(curvature > 0, curvature, 1.0), 1.0)
    a = torch.where(curvature.isnan(), curvature, a)
    r = rhs - a * Ax
    bb = operator.inner(rhs, rhs)
    residual = (operator.inner(r, r) / torch.where(bb > 0, bb, 1.0)).sqrt()
    return Solution(
        a * x, a * cross, residual, negative_curvature=flat, curvature=a * a * curvature
    )


class Preconditioner(Memory, ABC):
    """P ≈ H + ρI, symmetric positive definite, given as the action of P⁻¹.

    Law: with any preconditioner conjugate gradients converge to the same solution. A scale of P
    does not matter; that P is fixed during one solve does.
    """

    @abstractmethod
    def prepare(self, operator: LinearOperator, damping: float) -> Callable[[Tensor], Tensor]:
        """r -> P⁻¹r, (n,) -> (n,), for one solve with H = ``operator`` and ρ = ``damping``."""

    def learn(self, operator: LinearOperator, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Takes the pairs (q, Hq), ‖q‖ = 1, that a solve has paid for; most ignore them."""
