"""What the inner optimizer does."""

from __future__ import annotations

import inspect

from torch import Tensor
from torch.optim import Optimizer


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """All parameters of an optimizer, group by group."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def needs_closure(optimizer: Optimizer) -> bool:
    """Whether ``step`` has a closure argument without a default, as LBFGS."""
    parameter = inspect.signature(type(optimizer).step).parameters.get("closure")
    return parameter is not None and parameter.default is inspect.Parameter.empty
