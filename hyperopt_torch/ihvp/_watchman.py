"""What watches every solve, whatever the strategy: nothing that is not finite gets lost."""

from __future__ import annotations

import torch
from torch import Tensor

from ..operators import LinearOperator, Wrapping


class Watched(Wrapping):
    """The same operator; remembers whether anything that came out of it was not finite.

    A safeguard compares, and a comparison with NaN is false: so it may return an older iterate, or
    zero, as if nothing had been. What was met is kept apart, on the device, without waiting.

    Attributes:
        poison: () 0, or NaN once a product was not finite.
    """

    def __init__(self, operator: LinearOperator, rhs: Tensor) -> None:
        super().__init__(operator)
        self.poison = _poisoned(rhs.new_zeros(()), rhs)

    def _keep(self, product: Tensor) -> Tensor:
        if product.numel():
            self.poison = _poisoned(self.poison, product)
        return product

    def _product(self, x: Tensor) -> Tensor:
        return self._keep(self.operator @ x)

    def _products(self, X: Tensor) -> Tensor:
        return self._keep(self.operator @ X)

    def _joint(self, x: Tensor) -> tuple[Tensor, Tensor]:
        product, cross = self.operator.joint(x)
        return self._keep(product), self._keep(cross)

    def _exact(self, x: Tensor) -> Tensor:
        return self._keep(self.operator.exact(x))


def _poisoned(poison: Tensor, x: Tensor) -> Tensor:
    """``poison``, which is 0, or NaN where x has an entry that is not finite."""
    return torch.add(poison, x.sum(), alpha=0)  # 0·inf is NaN
