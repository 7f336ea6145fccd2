"""The report counts every product, and a strategy takes as many as its table says."""

import pytest
import torch
from cases import STRATEGIES, Case
from problems import network, spd

from hyperopt_torch import BilevelOptimizer, ConjugateGradient, Nystrom
from hyperopt_torch.operators import Dense


@pytest.mark.parametrize("case", STRATEGIES, ids=str)
def test_products_of_one_hypergradient(case: Case, monkeypatch):
    problem = network(widths=(3, 3))  # n = 12
    calls = 0
    grad = torch.autograd.grad

    def counting(outputs, inputs, grad_outputs=None, **kwargs):
        nonlocal calls
        if grad_outputs is not None:  # a product: the two gradients have none
            calls += len(grad_outputs[0]) if kwargs.get("is_grads_batched") else 1
        return grad(outputs, inputs, grad_outputs, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", counting)
    optimizer = BilevelOptimizer(
        torch.optim.SGD(problem.inner, lr=0.1),
        torch.optim.SGD(problem.outer, lr=0.1),
        ihvp=case.make(),
        self_check=False,  # one product more, once
    )
    optimizer.inner_step(problem.train_loss)
    calls = 0
    optimizer.outer_step(problem.val_loss())
    assert optimizer.report.matvecs == calls
    assert case.products in (calls, None)


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 7, 20])
def test_chunked_nystrom_is_linear_in_rank(chunk_size):
    for rank in (5, 10, 20):
        H = Dense(spd(30, 100.0))
        Nystrom(rank, 0.01, chunk_size=chunk_size).solve(H, torch.ones(30, dtype=torch.float64))
        assert H.matvecs == 2 * rank + 2


def test_chunked_nystrom_holds_chunk_size_columns():
    """No product has more columns than κ, whatever the rank."""
    widest = 0

    class Watched(Dense):
        def _products(self, X):
            nonlocal widest
            widest = max(widest, X.shape[1])
            return super()._products(X)

    for sketch in ("columns", "gaussian"):
        solver = Nystrom(20, chunk_size=4, sketch=sketch)
        solver.solve(Watched(spd(30, 100.0)), torch.ones(30, dtype=torch.float64))
    assert widest == 4


def test_cg_stops_at_its_tolerance():
    H = Dense(torch.eye(50, dtype=torch.float64) * 3)
    ConjugateGradient(10).solve(H, torch.ones(50, dtype=torch.float64))
    assert H.matvecs == 1


def test_warm_start_costs_one_product_more():
    solver = ConjugateGradient(4, tol=0.0, warm_start=True)
    counts = []
    for _ in range(2):
        H = Dense(spd(30, 100.0))
        solver.solve(H, torch.ones(30, dtype=torch.float64))
        counts.append(H.matvecs)
    assert counts == [4, 5]
