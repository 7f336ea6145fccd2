"""Laws of every strategy: NaN is never lost, a memory has one owner, a state fits or not."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from cases import STRATEGIES, Case
from problems import spd
from torch import Tensor

from hyperopt_torch import (
    NHGD,
    BilevelOptimizer,
    ConjugateGradient,
    Identity,
    LancBiO,
    NystromPCG,
    RecycledCG,
    RecycledPairs,
)
from hyperopt_torch.ihvp.base import InnerStep
from hyperopt_torch.operators import Dense

N = 12
EVERY = pytest.mark.parametrize("case", STRATEGIES, ids=str)
SOLVERS = pytest.mark.parametrize(
    "case", [c for c in STRATEGIES if not c.name.startswith("nhgd")], ids=str
)


def system(dtype=torch.float64, n: int = N) -> tuple[Dense, Tensor]:
    g = torch.Generator().manual_seed(3)
    J = torch.randn(n, 4, generator=g, dtype=torch.float64)
    return Dense(spd(n, 10.0).to(dtype), J.to(dtype)), torch.randn(n, generator=g).to(dtype)


def prepared(case: Case):
    strategy = case.make()
    if strategy.observes:
        g = torch.Generator().manual_seed(4)
        for _ in range(20):
            strategy.observe(InnerStep(torch.randn(N, generator=g, dtype=torch.float64), 8))
    return strategy


@EVERY
@pytest.mark.parametrize("where", ["matrix", "cross", "rhs"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_never_lost(case: Case, where: str, value: float):
    """As an estimator sees it: x, and Jᵀx by the strategy or by the closing product."""
    strategy, (H, b) = prepared(case), system()
    target = {"matrix": H.matrix, "cross": H.cross, "rhs": b}[where]
    target[(5, 5) if where == "matrix" else (5, 2) if where == "cross" else 5] = value
    found = strategy.solution(H, b)
    assert found.damping is not None or strategy.damping != "auto"
    closing, cross = H.joint(found.x)
    cross = cross if found.cross is None else found.cross
    assert not (cross.isfinite().all() and closing.isfinite().all())
    if found.cross is not None:  # nobody looks after it
        assert not found.cross.isfinite().any()


@SOLVERS
def test_a_memory_moves_to_another_dtype_or_starts_anew(case: Case):
    strategy = case.make()
    for dtype in (torch.float32, torch.float64, torch.float32):
        for _ in range(2):
            H, b = system(dtype)
            found = strategy.solution(H, b)
        assert found.x.dtype == dtype
        assert found.x.isfinite().all()
    H, b = system(n=N + 3)
    assert strategy.solution(H, b).x.isfinite().all()


@EVERY
@pytest.mark.parametrize("key", ["strategy", "settings", "state", "parts"])
def test_a_state_that_lacks_something_changes_nothing(case: Case, key: str):
    strategy = prepared(case)
    strategy.solution(*system())
    before = str(strategy.state_dict())
    broken = copy.deepcopy(strategy.state_dict())
    del broken[key]
    for state in (broken, {}, None):
        with pytest.raises(ValueError, match="This is no state of"):
            strategy.load_state_dict(state)
    assert str(strategy.state_dict()) == before


@pytest.mark.parametrize(
    ("make", "sizes"),
    [
        (RecycledCG, (20, 40)),
        (LancBiO, (3, 5)),
        (NystromPCG, (3, 5)),
        (NHGD, (16, 32)),
        (lambda w: ConjugateGradient(preconditioner=RecycledPairs(w)), (5, 8)),
    ],
    ids=["recycled-cg", "lancbio", "nystrom-pcg", "nhgd", "part"],
)
def test_a_state_of_another_size_is_refused(make, sizes):
    small, large = map(make, sizes)
    before = str(large.state_dict())
    with pytest.raises(ValueError, match="This state belongs to"):
        large.load_state_dict(small.state_dict())
    assert str(large.state_dict()) == before
    make(sizes[0]).load_state_dict(small.state_dict())


class Loop:
    def __init__(self, strategy) -> None:
        w, phi = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)
        self.bo = BilevelOptimizer(
            torch.optim.SGD([w], lr=0.1), torch.optim.SGD([phi], lr=0.1), strategy
        )


def test_one_strategy_serves_one_loop():
    strategy = RecycledCG()
    first = Loop(strategy)
    with pytest.raises(ValueError, match=r"\.fresh\(\)"):
        Loop(strategy)
    others = Loop(strategy.fresh()), Loop(copy.deepcopy(strategy))
    del first
    gc.collect()
    again = Loop(strategy)  # the first is gone
    assert again.bo.estimator.ihvp is strategy
    assert all(other.bo.estimator.ihvp is not strategy for other in others)


def test_what_remembers_nothing_may_be_shared():
    strategy = Identity()
    loops = Loop(strategy), Loop(strategy)
    assert loops[0].bo.estimator.ihvp is loops[1].bo.estimator.ihvp


def test_a_live_object_is_not_pickled():
    with pytest.raises(TypeError, match="state_dict"):
        copy.deepcopy(Loop(Identity()).bo)


@pytest.mark.parametrize("key", ["inner", "outer", "estimator", "steps"])
def test_a_bilevel_state_that_lacks_something(key: str):
    bo = Loop(RecycledCG()).bo
    state = bo.state_dict()
    del state[key]
    with pytest.raises(ValueError, match=repr(key)):
        bo.load_state_dict(state)
    with pytest.raises(ValueError, match="BilevelOptimizer"):
        bo.load_state_dict(bo.outer.state_dict())
