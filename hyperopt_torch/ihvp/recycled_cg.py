"""Conjugate gradients that live on what earlier outer steps have paid for."""

from __future__ import annotations

from torch import Tensor

from ..errors import check_count, check_number
from ..operators import Damped, LinearOperator
from ._descent import begin, descend
from ._recycling import RecycledPairs
from .base import IHVP, Solution

_FIRST_TOL = 1e-2  # what the first solve, which has nothing to recycle, is solved to
_FIRST_STEPS = 60
_MOST_STEPS = 20  # of a later solve in tolerance mode
_RETRY_STEPS = 10  # of the cold solve after a failed warm one


class RecycledCG(IHVP):
    """Warm conjugate gradients, preconditioned by the pairs (q, Hq) of earlier outer steps.

    A bilevel run solves nearly the same system hundreds of times. Every product of the last steps
    is kept as a pair and becomes the preconditioner of the next solve (:class:`RecycledPairs`);
    every product is a joint one, so Jᵀx comes along and no cross product is needed.

    Args:
        window: pairs kept, >= 1; 2·window vectors of memory.
        max_iter: budget mode: steps a solve, >= 1; max_iter + 1 products with the warm start.
        tol: tolerance mode: steps until ‖r‖ <= tol·‖b‖, at most 20, looked at before a product is
            spent; ``max_iter`` is not used then. None: budget mode.
        damping: ρ >= 0.

    Raises:
        ValueError: an argument is out of its range.

    Exact limit: as for conjugate gradients, in as many steps or fewer.

    Trouble: the first solve has nothing to recycle: it runs to a residual of 0.01 (or ``tol``),
    within 60 steps. Negative curvature is flagged, the pairs are forgotten, the iterate before it
    is kept. A residual above ‖b‖, or one that is not finite, is answered by one cold solve of 10
    steps.

    Cost: max_iter + 1 joint products; vector work of about (4·window + 40)·n flops a
    step; 2·window + 2·max_iter vectors; syncs at every step.

    Example:
        >>> import torch
        >>> from hyperopt_torch.operators import Dense
        >>> H = Dense(torch.diag(torch.tensor([1.0, 4.0])))
        >>> RecycledCG(tol=1e-6, damping=0.0).solve(H, torch.tensor([1.0, 1.0])).x
        tensor([1.0000, 0.2500])

    Reference: this library's; recycling of Krylov subspaces: Parks et al., SIAM J. Sci. Comput.
    2006; the preconditioner: Frangella, Tropp & Udell 2023, and L-BFGS.
    """

    follows = True

    def __init__(
        self,
        window: int = 40,
        *,
        max_iter: int = 2,
        tol: float | None = None,
        damping: float = 0.01,
    ) -> None:
        super().__init__()
        self.max_iter = check_count("max_iter", max_iter)
        self.tol = None if tol is None else check_number("tol", tol, positive=True)
        self.damping = check_number("damping", damping)
        self.pairs = RecycledPairs(window)

    def solve(self, operator: LinearOperator, rhs: Tensor) -> Solution:
        A = Damped(operator, self.damping)
        found = begin(A, rhs, self.state.get("x"))
        first = not self.state
        steps = _FIRST_STEPS if first else self.max_iter if self.tol is None else _MOST_STEPS
        tol = (_FIRST_TOL if first else 0.0) if self.tol is None else self.tol
        found = descend(A, found, self.pairs.prepare(operator, self.damping), steps, tol)
        paid = found.pairs
        notes: tuple[str, ...] = ()
        if not found.negative and not found.residual <= 1 and not first:
            notes = ("the warm solve failed and was replaced by a cold one",)
            found = descend(A, begin(A, rhs), None, _RETRY_STEPS, tol)
            paid = found.pairs
        if found.negative:
            self.pairs.reset()
        else:
            self.pairs.learn(operator, [(p.q, p.Aq - self.damping * p.q) for p in paid])
        self.state["x"] = found.x
        return found.solution(A, rhs, self.tol, notes)
