"""Losses as lists of closures: the mean is meant, one graph is alive at a time."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from problems import network
from torch.optim import SGD

from hyperopt_torch import (
    CG,
    PZOBO,
    BilevelOptimizer,
    FiniteDifference,
    Hessian,
    Identity,
    Unrolled,
)


def rig(**settings):
    problem = network(samples=24)
    bo = BilevelOptimizer(
        SGD(problem.inner, lr=0.1), SGD(problem.outer, lr=0.1), on_trouble="ignore", **settings
    )
    bo.inner_step(problem.train_loss)
    return problem, bo


def flat(grads):
    return torch.cat([g.flatten() for g in grads if g is not None])


@pytest.mark.parametrize(
    "settings",
    [
        {"ihvp": CG(20, damping=0.3)},
        {"ihvp": CG(20, damping=0.3), "curvature": FiniteDifference()},
        {"ihvp": Identity(), "curvature": Hessian()},
        {"estimator": Unrolled()},
        {"estimator": PZOBO(generator=torch.Generator().manual_seed(0))},
    ],
    ids=str,
)
def test_validation_losses(settings):
    problem, bo = rig(**settings)
    whole = (problem.val_loss() + 3 * problem.train_loss()) / 2
    expected = flat(bo.hypergradient(whole))
    parts = [problem.val_loss, lambda: 3 * problem.train_loss()]
    torch.testing.assert_close(flat(bo.hypergradient(parts)), expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(bo.outer_step(parts), whole.detach())


@pytest.mark.parametrize("curvature", [Hessian(), FiniteDifference()], ids=str)
def test_training_losses(curvature):
    problem, bo = rig(ihvp=CG(20, damping=0.3), curvature=curvature)
    parts = [problem.train_loss, lambda: problem.train_loss() * 2]
    expected = flat(bo.hypergradient(problem.val_loss(), lambda: 1.5 * problem.train_loss()))
    found = flat(bo.hypergradient(problem.val_loss(), parts))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_an_average_given_as_an_iterator_hooks_and_streams():
    """Whatever one loss may do, several may: a generator of parameters, dropout, a clip hook."""
    problem, bo = rig(ihvp=Identity())
    for p in problem.inner:
        p.register_hook(lambda g: 100 * g)  # about the training step, not about this one
    expected = flat(bo.hypergradient(problem.val_loss(), averaged=iter(problem.inner)))
    found = flat(bo.hypergradient([problem.val_loss] * 2, averaged=iter(problem.inner)))
    torch.testing.assert_close(found, expected)


def test_parts_behind_a_reentrant_checkpoint():
    problem, bo = rig(ihvp=CG(20, damping=0.3), curvature=FiniteDifference())
    x = torch.ones(1, dtype=torch.float64, requires_grad=True)

    def hidden():
        return torch.utils.checkpoint.checkpoint(
            lambda one: one[0] * problem.val_loss(), x, use_reentrant=True
        )

    expected = flat(bo.hypergradient(problem.val_loss()))
    torch.testing.assert_close(flat(bo.hypergradient([hidden, hidden])), expected)


def test_one_graph_is_alive_at_a_time():
    problem, bo = rig(ihvp=Identity())
    alive, most = [], 0

    def closure():
        nonlocal most
        gc.collect()
        most = max(most, sum(ref() is not None for ref in alive))
        loss = problem.val_loss()
        alive.append(weakref.ref(loss))
        return loss

    bo.outer_step([closure] * 4)
    assert most <= 1
    assert len(alive) == 4


@pytest.mark.parametrize("wrong", [[], [torch.ones(())], [lambda: torch.ones(()), 3.0]])
def test_other_lists_are_refused(wrong):
    problem, bo = rig(ihvp=Identity())
    with pytest.raises(TypeError, match="must hold closures"):
        bo.outer_step(wrong)
    with pytest.raises(TypeError, match="must hold closures"):
        bo.outer_step(problem.val_loss(), [*wrong, 1.0])
