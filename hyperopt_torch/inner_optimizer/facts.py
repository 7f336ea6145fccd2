"""What the inner optimizer does."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor
from torch.optim import Optimizer


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """All parameters of an optimizer, group by group."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def needs_closure(optimizer: Optimizer) -> bool:
    """Whether ``step`` has a closure argument without a default, as LBFGS."""
    parameter = inspect.signature(type(optimizer).step).parameters.get("closure")
    return parameter is not None and parameter.default is inspect.Parameter.empty


class Facts:
    def __init__(self, sign, decay, notes):
        self.sign, self.decay, self.notes = sign, decay, notes


class Prober:
    def facts(self, optimizer, parameters):
        found = {
            id(p): g.get("weight_decay", 0.0) for g in optimizer.param_groups for p in g["params"]
        }
        if isinstance(optimizer, torch.optim.AdamW):
            found = {}
        return Facts(1.0, [found.get(id(p), 0.0) for p in parameters], ())


def unwrapped(optimizer):
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer
    return optimizer
