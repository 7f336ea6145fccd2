"""What a BilevelOptimizer does for somebody who has chosen nothing."""

from __future__ import annotations

from .curvature import Curvature, GaussNewton, Hessian, NoGaussNewton
from .estimators import ImplicitDifferentiation
from .ihvp import RecycledCG
from .inner_gradient import InnerGradient
from .operators import LinearOperator


def default_estimator(curvature: Curvature | None = None) -> ImplicitDifferentiation:
    """Three products a step and 49 vectors of the size of the inner parameters."""
    return ImplicitDifferentiation(RecycledCG(window=20), curvature or AutomaticCurvature())


class AutomaticCurvature(Curvature):
    """:class:`GaussNewton` where the training closure returns outputs that allow it, else the
    :class:`Hessian`.

    On networks the Hessian is indefinite, and the exact solution with it jumps from step to step;
    the Gauss-Newton matrix is a stable target. Without ``(loss, outputs)``, or where the loss is
    linear in the outputs, there is none, and the Hessian is taken.

    Args:
        chunk_size: as for both of them.

    Raises:
        ValueError: ``chunk_size`` < 1.

    Cost: that of the one taken.

    Example:
        >>> import torch
        >>> w = torch.tensor([2.0], requires_grad=True)
        >>> o = w**2
        >>> loss = ((o - 5) ** 2 / 2).sum()
        >>> AutomaticCurvature().operator(InnerGradient(loss, [w], [], o)).dense()
        tensor([[16.]])
        >>> AutomaticCurvature().operator(InnerGradient(loss, [w], [])).dense()
        tensor([[14.]])
    """

    def __init__(self, chunk_size: int | None = None) -> None:
        self._gauss_newton, self._hessian = GaussNewton(chunk_size), Hessian(chunk_size)
        self.chunk_size = chunk_size

    def operator(self, inner_gradient: InnerGradient) -> LinearOperator:
        if inner_gradient.outputs is None:
            return self._hessian.operator(inner_gradient)
        try:
            return self._gauss_newton.operator(inner_gradient)
        except NoGaussNewton:
            return self._hessian.operator(inner_gradient)
