"""The data-cleaning benchmark is the problem that it says, on digits in place of MNIST."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.functional import hessian

from benchmarks._bilevel_runs import images
from benchmarks.cleaning_race import (
    METHODS,
    PENALTY,
    Clock,
    Task,
    combined,
    derivatives,
    optimum,
    run,
    val_gradient,
)
from hyperopt_torch import BilevelOptimizer, DenseSolve

ALL = slice(None)


@pytest.fixture(scope="module")
def digits():
    return images("digits")


def small(digits, n=40, n_val=20):
    """In float64, at a point that is no optimum of either level."""
    task = Task.draw(digits, digits, 0.5, seed=0, n=n, n_val=n_val)
    for name in ("x", "x_val", "x_test"):
        setattr(task, name, getattr(task, name).double()[:, 20:28])
    g = torch.Generator().manual_seed(1)
    theta = torch.randn(8, 10, generator=g, dtype=torch.float64).requires_grad_()
    phi = torch.randn(n, generator=g, dtype=torch.float64).requires_grad_()
    return task, theta, phi


@pytest.mark.parametrize("ratio", [0.5, 0.9])
def test_a_drawn_label_is_the_old_one_once_in_ten(digits, ratio):
    task = Task.draw(digits, digits, ratio, seed=3, n=1200, n_val=400)
    assert task.x.shape == (1200, 64)
    assert task.x_val.shape == (400, 64)
    assert task.x_test.shape == (1797, 64)
    rate = 1 - task.right.float().mean()
    assert abs(rate - 0.9 * ratio) < 3 * (0.25 / 1200) ** 0.5
    used = task.x.std(0, correction=0) > 0  # a pixel may be black throughout
    assert torch.allclose(task.x.mean(0), torch.zeros(64), atol=1e-5)
    assert torch.allclose(task.x.std(0, correction=0)[used], torch.ones(int(used.sum())))
    again = Task.draw(digits, digits, ratio, seed=3, n=1200, n_val=400)
    assert torch.equal(task.y, again.y)


def test_it_starts_as_published_and_an_epoch_has_every_sample_once(digits):
    task = Task.draw(digits, digits, 0.5, seed=0, n=1200, n_val=400)
    theta, phi = task.start()
    assert not theta.any()
    assert torch.equal(phi, torch.full((1200,), -2.0))
    assert task.train_loss(theta, phi, ALL).item() == pytest.approx(
        float(torch.tensor(-2.0).sigmoid() * torch.tensor(10.0).log())
    )
    batches = task.batches(100)
    epoch = torch.cat([torch.arange(1200)[next(batches)] for _ in range(12)])
    assert torch.equal(epoch.sort().values, torch.arange(1200))


def test_the_hypergradient_is_that_of_a_dense_oracle(digits):
    task, theta, phi = small(digits)
    bilevel = BilevelOptimizer(
        torch.optim.SGD([theta], lr=0.1), torch.optim.SGD([phi], lr=0.1), DenseSolve()
    )
    bilevel.inner_step(lambda: task.train_loss(theta, phi, ALL))
    (found,) = bilevel.hypergradient(task.val_loss(theta))

    # H = Σ w_i x_i x_iᵀ ⊗ (diag p_i - p_i p_iᵀ) / n + .4 I, without autograd
    with torch.no_grad():
        x, w, n = task.x, phi.sigmoid(), len(task.y)
        P = torch.softmax(x @ theta, 1)
        H = 2 * PENALTY * torch.eye(80, dtype=torch.float64)
        for x_i, w_i, p in zip(x, w, P, strict=True):
            H += w_i / n * torch.kron(torch.outer(x_i, x_i), p.diag() - torch.outer(p, p))
        b = task.x_val.T @ (torch.softmax(task.x_val @ theta, 1) - F.one_hot(task.y_val, 10))
        v = torch.linalg.solve(H, b.flatten() / len(task.y_val)).view(8, 10)
        expected = -w * (1 - w) / n * ((P - F.one_hot(task.y, 10)) * (x @ v)).sum(1)
    assert torch.allclose(found, expected, rtol=1e-9, atol=0)


def test_the_closed_forms_are_those_of_autograd(digits):
    task, theta, phi = small(digits)
    v = torch.randn(8, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    s = slice(5, 25)
    gradient, product, cross = derivatives(task, theta.detach(), v, phi.detach(), s)
    (ours,) = torch.autograd.grad(task.train_loss(theta, phi, s), theta, create_graph=True)
    assert torch.allclose(gradient, ours.detach())
    assert torch.allclose(cross, torch.autograd.grad(ours, phi, v)[0][s])
    H = hessian(lambda t: task.train_loss(t, phi.detach(), s), theta.detach()).view(80, 80)
    assert torch.allclose(product.flatten(), H @ v.flatten())
    (b,) = torch.autograd.grad(task.val_loss(theta, s), theta)
    assert torch.allclose(val_gradient(task, theta.detach(), s), b)


def test_differences_of_two_points_are_those_of_each(digits):
    task, theta, phi = small(digits)
    theta, phi, s = theta.detach(), phi.detach(), slice(0, 20)
    new, old = (theta, theta + 1, phi), (-theta, theta - 1, phi / 2)
    found = combined(task, [new, old], torch.tensor([1.0, -1.0], dtype=torch.float64), s)
    for f, a, b in zip(found, derivatives(task, *new, s), derivatives(task, *old, s), strict=True):
        assert torch.allclose(f, a - b)
    gradients = [val_gradient(task, t[0], s) for t in (new, old)]
    assert torch.allclose(val_gradient(task, new[0], s, old[0]), gradients[0] - gradients[1])


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_the_optimum_is_one(digits, kind):
    task, _, phi = small(digits)
    task.x = task.x.float()
    weights = phi.detach().float().sigmoid() if kind == "soft" else task.right.float()
    theta = optimum(task, weights)
    gradient = derivatives(task, theta, theta, weights.logit(), ALL)[0]
    assert gradient.norm() < 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_judged_as_it_leaves_its_model(digits, method):
    task = Task.draw(digits, digits, 0.5, seed=0, n=1200, n_val=500)
    theta, phi = next(METHODS[method](task, Clock(1.0)))
    assert theta.shape == (64, 10)
    assert phi is None or phi.shape == (1200,)
    row = run(METHODS[method], task, seconds=1e-6)  # one judgement
    assert row["yields"] == 1
    assert row["error"] < 0.9
    assert ("refit" in row) == (phi is not None)
