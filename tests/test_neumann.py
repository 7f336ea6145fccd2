"""Neumann: its polynomial to the letter, a step length that is safe, divergence that shows."""

import pytest
import torch
from problems import spd, tensor

from hyperopt_torch import Neumann
from hyperopt_torch.ihvp.neumann import largest_eigenvalue_bound
from hyperopt_torch.operators import Dense


@pytest.mark.parametrize("K", [1, 2, 7])
def test_polynomial_per_eigenvalue(K):
    h, alpha = tensor(0.1, 1.0, 3.0), 0.3
    x = Neumann(K, scale=alpha).solve(Dense(torch.diag(h)), torch.ones(3, dtype=torch.float64)).x
    torch.testing.assert_close(x, (1 - (1 - alpha * h) ** (K + 1)) / h)


@pytest.mark.parametrize("n", [1, 3, 8, 50])
@pytest.mark.parametrize("condition", [1.0 + 1e-9, 10.0, 1e4])
def test_estimate_leaves_the_series_convergent_and_not_too_short(n, condition):
    for seed in range(10):
        H = spd(n, condition, seed) * 7.0
        b = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        bound = largest_eigenvalue_bound(Dense(H), b)
        top = torch.linalg.eigvalsh(H)[-1]
        assert 0.8 * top <= bound <= 1.5 * top  # α = 1 / bound must lie below 2 / top


def test_auto_scale_is_refreshed_every_20_solves_only():
    solver, b = Neumann(3), torch.ones(30, dtype=torch.float64)
    counts = []
    for _ in range(41):
        H = Dense(spd(30, 10.0))
        solver.solve(H, b)
        counts.append(H.matvecs)
    assert [i for i, count in enumerate(counts) if count > 3] == [0, 20, 40]


def test_divergence_is_caught_flagged_and_mended():
    solver, b = Neumann(50), torch.ones(30, dtype=torch.float64)
    solver.solve(Dense(spd(30, 10.0)), b)
    steep = 10 * spd(30, 10.0)  # the old step length is ten times too long here
    caught = solver.solve(Dense(steep), b)
    assert caught.diverged
    assert (b - steep @ caught.x).norm() < b.norm()
    mended = solver.solve(Dense(steep), b)
    assert not mended.diverged
    assert mended.converged is None
    torch.testing.assert_close(mended.x, torch.linalg.solve(steep, b), rtol=0.05, atol=0.05)


def test_negative_curvature_is_caught():
    H = torch.diag(tensor(1.0, 0.5, -0.5))
    found = Neumann(100, scale=1.0).solve(Dense(H), torch.ones(3, dtype=torch.float64))
    assert found.negative_curvature
    assert found.diverged
    assert found.x.norm() < 100


def test_nan_stays_nan():
    found = Neumann(5, scale=0.1).solve(Dense(torch.full((2, 2), torch.nan)), torch.ones(2))
    assert found.x.isnan().all()
