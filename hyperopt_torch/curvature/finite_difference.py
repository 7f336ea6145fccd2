"""The Hessian by differences of first gradients."""

from __future__ import annotations

from torch import Tensor

from ..errors import check_number
from ..operators import LinearOperator
from ..plain_gradient import PlainGradient
from .base import FirstOrderCurvature


class FiniteDifference(FirstOrderCurvature):
    """H = ∂²f/∂θ², its products by central differences of ∇f along x.

        Hx ≈ (∇f(θ + εx) - ∇f(θ - εx)) / 2ε,    and Jᵀx from the same two gradients

    For whatever has no second derivative: compiled modules, fused attention, custom functions,
    DistributedDataParallel. The training closure is called again at θ ± εx with its batch, modes,
    buffers and random streams put back; θ, ``.grad`` and all else are as found afterwards.

    Args:
        step: h, by which part of its size a parameter tensor moves at most, > 0; None: 2e-6 where
            f computes in float64, 0.003 in float32, 0.05 in half precision.

    Raises:
        ValueError: ``step`` is not a finite number > 0.
        RuntimeError: inner parameters are stored in half precision (autocast is fine), or the
            training loss was given as a tensor.

    Accuracy: on smooth networks about 1e-3 of the hypergradient in float32, 1e-7 in float64. At
    kinks (ReLU, max-pool) the differences mean less, in float32 0.01 to above 1:
    ``report.kink`` measures it, and ``report.trouble()`` says so.

    Cost: two gradients of f a product, joint or not; no graph is kept.

    Example:
        >>> import torch
        >>> from hyperopt_torch import BilevelOptimizer, DenseSolve
        >>> w, phi = (torch.ones(1, dtype=torch.float64, requires_grad=True) for _ in range(2))
        >>> opt = BilevelOptimizer(
        ...     torch.optim.SGD([w], lr=0.1),
        ...     torch.optim.SGD([phi], lr=0.1),
        ...     ihvp=DenseSolve(),
        ...     curvature=FiniteDifference(),
        ... )
        >>> _ = opt.inner_step(lambda: (w - phi).square().sum())  # w* = φ
        >>> round(opt.hypergradient((w - 3).square().sum())[0].item(), 6)  # 2(w - 3)
        -4.0

    Reference: Pearlmutter 1994 on products by differences; the step is this library's.
    """

    def __init__(self, step: float | None = None) -> None:
        self.step = None if step is None else check_number("step", step, positive=True)

    def operator(self, gradient: PlainGradient) -> LinearOperator:
        return _Differences(gradient)


class _Differences(LinearOperator):
    def __init__(self, gradient: PlainGradient) -> None:
        layout = gradient.layout
        super().__init__(layout.n, layout.dtype, layout.device)
        self._gradient = gradient

    def _product(self, x: Tensor) -> Tensor:
        return self._gradient.differences(x)[0]

    def _joint(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._gradient.differences(x)
