"""No curvature at all: the T1-T2 hypergradient."""

from __future__ import annotations

from torch import Tensor

from ..errors import check_number
from ..operators import LinearOperator
from .base import IHVP, Solution, rescaled


class Identity(IHVP):
    """x = scale · b: the inner Hessian is taken for a multiple of I.

    The baseline that every other strategy has to beat.

    Args:
        scale: > 0: H is taken for I / scale. None: the best multiple of b, x = b·bᵀb / bᵀHb, by
            the one product that Jᵀx takes anyway.
        rescale: take the best multiple whatever ``scale`` is. None: only without a scale.

    Raises:
        ValueError: ``scale`` is not a finite number > 0.

    Exact limit: H = I / scale; without a scale, any multiple of I.

    Trouble: where bᵀHb is not positive there is no best multiple: x = scale · b (scale 1 if None),
    and negative curvature is flagged.

    Cost: no product in the solve; no sync.

    Example:
        >>> import torch
        >>> from hyperopt_torch.operators import Dense
        >>> Identity(0.5).solve(Dense(2 * torch.eye(2)), torch.tensor([2.0, 4.0]))
        tensor([1., 2.])

    Reference: Luketina et al., "Scalable gradient-based tuning of continuous regularization
    hyperparameters" (T1-T2), ICML 2016.
    """

    def __init__(self, scale: float | None = None, *, rescale: bool | None = None) -> None:
        super().__init__()
        self.scale = None if scale is None else check_number("scale", scale, positive=True)
        self.rescale = scale is None if rescale is None else bool(rescale)

    @property
    def vectors(self) -> int:
        return 1

    def solve(self, operator: LinearOperator, rhs: Tensor) -> Tensor | Solution:
        x = rhs if self.scale is None else self.scale * rhs
        return rescaled(operator, self.damping, rhs, x) if self.rescale else x
