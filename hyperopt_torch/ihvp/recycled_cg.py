"""Conjugate gradients that live on what earlier outer steps have paid for."""

from __future__ import annotations

from torch import Tensor

from ..errors import check_count, check_number
from ..operators import Damped, LinearOperator
from ._coordinates import RecycledDescent
from ._damping import AUTO, SelfTunedDamping, check_damping
from ._descent import Descent, rescued
from ._recycling import RecycledPairs
from .base import IHVP, Solution

_FIRST_TOL = 0.03  # what the first solve, which has nothing to recycle, is solved to
_FIRST_STEPS = 60
_MOST_STEPS = 20  # of a later solve in tolerance mode
_WEIGHT = 0.4  # of a new solution in the average over the steps
_HELD_UP = 0.5  # of ρ: where H takes more than that, A is positive by luck
_AKIN = 0.5  # of the energy reached: with less the last solution was of another problem


class RecycledCG(IHVP):
    """Warm conjugate gradients, preconditioned by the pairs (q, Hq) of earlier outer steps.

    A bilevel run solves nearly the same system hundreds of times. Every product of the last steps
    is kept as a pair and becomes the preconditioner of the next solve (:class:`RecycledPairs`);
    every product is a joint one, so Jᵀx comes along and no cross product is needed. The algebra is
    done in coordinates on the pairs (:class:`~hyperopt_torch.ihvp._coordinates.RecycledDescent`).

    Args:
        window: pairs kept, >= 1; 2·window vectors of memory.
        max_iter: budget mode: steps a solve, >= 1; max_iter + 1 products with the warm start.
        tol: tolerance mode: steps until ‖r‖ <= tol·‖b‖, at most 20, looked at before a product is
            spent; ``max_iter`` is not used then. None: budget mode.
        damping: ρ >= 0, or "auto": relative to ‖H‖, between 1e-10 and 0.015 of it, chosen from
            solve to solve by what becomes of the curvature along the last solution
            (:class:`~hyperopt_torch.ihvp._damping.SelfTunedDamping`). Then the answer does not
            depend on the scale of the loss, and systems that hold still are solved undamped. Where
            H changes at random, as on small mini-batches, the solution is averaged over the
            steps, a new one with the weight 0.4, at no product.

    Raises:
        ValueError: an argument is out of its range.

    Exact limit: as for conjugate gradients, in as many steps or fewer.

    Trouble: the first solve of an inner problem has no solution to go on from: it runs to a
    residual of 0.03 (or ``tol``), within 60 steps. A solve is never judged by its residual, which
    may rise above ‖b‖ on the way of an ill-conditioned one: conjugate directions lower the energy
    ½xᵀAx - bᵀx at every step, from that of the last solution on. Negative curvature is flagged and
    ends the solve; the solution gets the length that is best for the residual.

    Cost: max_iter + 1 joint products, 3 products more before the first solve with "auto"; vector
    work of about 8·(window + max_iter)·n flops a step, by one pass over the pairs before a product
    and one after it; 2·window + 2·max_iter + 5 vectors, at the first solve as later; a sync a
    product and one a solve, one more where the residual is measured anew.

    Example:
        >>> import torch
        >>> from hyperopt_torch.operators import Dense
        >>> H = Dense(torch.diag(torch.tensor([1.0, 4.0])))
        >>> RecycledCG(tol=1e-6, damping=0.0).solve(H, torch.tensor([1.0, 1.0])).x
        tensor([1.0000, 0.2500])

    Reference: this library's; recycling of Krylov subspaces: Parks et al., SIAM J. Sci. Comput.
    2006; the preconditioner: Frangella, Tropp & Udell 2023, and L-BFGS; the damping: after
    Levenberg and Marquardt.
    """

    follows = True

    def __init__(
        self,
        window: int = 40,
        *,
        max_iter: int = 2,
        tol: float | None = None,
        damping: float | str = AUTO,
    ) -> None:
        super().__init__()
        self.max_iter = check_count("max_iter", max_iter)
        self.tol = None if tol is None else check_number("tol", tol, positive=True)
        self.damping = check_damping(damping)
        spare = 1 + (self.max_iter if self.tol is None else _MOST_STEPS)
        self.pairs = RecycledPairs(window, spare=spare)
        if self.damping == AUTO:
            self._tuned = SelfTunedDamping()

    @property
    def vectors(self) -> int:
        return self.pairs.vectors + 4

    def begin(self) -> None:
        self.state.clear()  # the pairs may serve the new problem; the solution does not

    def solve(self, operator: LinearOperator, rhs: Tensor) -> Solution:
        tuned = self._tuned if self.damping == AUTO else None
        rho = tuned.choose(operator, rhs, self.pairs.largest()) if tuned else self.damping
        first = not self.state
        steps = _FIRST_STEPS if first else self.max_iter if self.tol is None else _MOST_STEPS
        tol = (_FIRST_TOL if first else 0.0) if self.tol is None else self.tol

        run = RecycledDescent(operator, self.pairs, rho, rhs)
        run.begin(self.state.get("x"))
        run.descend(steps, tol)
        akin = run.start > _AKIN * run.curvature and not run.negative
        if tuned and tuned.noisy and akin and self.tol is None:
            run.average(_WEIGHT)
        found = rescued(Damped(operator, rho), rhs, run.result())

        if found.rhs_norm:  # b = 0 says nothing
            if tuned:
                self._tune(tuned, operator, rhs, rho, run.start_rayleigh, found)
            self.state["x"] = found.x
        return found.solution(self.tol, damping=rho if tuned else None)

    def _tune(
        self,
        tuned: SelfTunedDamping,
        operator: LinearOperator,
        rhs: Tensor,
        rho: float,
        new: float,
        found: Descent,
    ) -> None:
        """Learns from the curvature of H along the last solution, ``new``, and along this one."""
        end = found.rayleigh(operator) - rho
        if "curvature" in self.state:
            agreement = _agreement(self.state["curvature"], new - rho if new else 0.0)
            tuned.learn(agreement, found.negative or end < -_HELD_UP * rho)
        self.state["curvature"] = end
        tuned.look(operator, found.x, rhs - found.r - rho * found.x)


def _agreement(a: float, b: float) -> float:
    """The smaller over the larger of two curvatures; 0 where one is not positive."""
    return min(a, b) / max(a, b) if min(a, b) > 0 else 0.0
