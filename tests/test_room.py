"""How many vectors a strategy says that it holds, and what is said where they do not fit."""

from __future__ import annotations

import warnings

import pytest
import torch

from benchmarks.solve_cost import STRATEGIES, memory
from hyperopt_torch import (
    BilevelOptimizer,
    HypergradientWarning,
    ImplicitDifferentiation,
    RecycledCG,
    _room,
)
from hyperopt_torch._default import default_estimator

BESIDE = 8  # gradients, a product and its graph, as in docs/which_strategy.md


@pytest.mark.parametrize("name", STRATEGIES)
def test_as_many_vectors_as_are_measured(name):
    settings = STRATEGIES[name]()
    first, later, _ = memory(settings)
    estimator = ImplicitDifferentiation(settings["ihvp"]) if settings else default_estimator()
    assert estimator.vectors + BESIDE == pytest.approx(max(first, later), rel=0.15)


def setting(ihvp=None):
    w = torch.zeros(1 << 20, requires_grad=True)
    phi = torch.zeros(1, requires_grad=True)
    bo = BilevelOptimizer(
        torch.optim.SGD([w], lr=0.1), torch.optim.SGD([phi], lr=0.1), ihvp=ihvp, self_check=False
    )
    bo.inner_step(lambda: (w - phi).square().sum())
    return bo, w


def test_a_shortage_is_said_before_the_first_solve(monkeypatch):
    monkeypatch.setattr(_room, "_free", lambda device: 1e8)
    bo, w = setting(RecycledCG(20))
    with pytest.warns(HypergradientWarning, match=r"51 vectors of n = 1.05e\+06.*0.1 GB are free"):
        bo.outer_step((w - 1).square().sum())
    with warnings.catch_warnings():
        warnings.simplefilter("error", HypergradientWarning)
        bo.outer_step((w - 1).square().sum())  # once


def test_what_fits_is_not_mentioned(monkeypatch):
    monkeypatch.setattr(_room, "_free", lambda device: 1e10)
    bo, w = setting()
    with warnings.catch_warnings():
        warnings.simplefilter("error", HypergradientWarning)
        bo.outer_step((w - 1).square().sum())


def test_out_of_memory_says_what_would_fit():
    bo, w = setting(RecycledCG(20))

    def closure():
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")

    with pytest.raises(torch.cuda.OutOfMemoryError, match=r"Tried.*51 vectors.*RecycledCG\(window"):
        bo.outer_step((w - 1).square().sum(), closure)
