"""CG is CG: exact steps, the right iterate, a residual that is true, and breakdowns that show."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import spd, tensor

from hyperopt_torch import ConjugateGradient, NystromPCG, RecycledCG
from hyperopt_torch.ihvp._recycling import RecycledPairs
from hyperopt_torch.ihvp.nystrom_pcg import NystromSketch
from hyperopt_torch.operators import Dense


@pytest.mark.parametrize("distinct", [1, 2, 3, 5])
def test_exact_in_as_many_steps_as_distinct_eigenvalues(distinct):
    Q, _ = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64))
    H = Q * (1 + torch.arange(20) % distinct) @ Q.mT
    b = torch.randn(20, dtype=torch.float64)
    exact = torch.linalg.solve(H, b)
    x = ConjugateGradient(distinct, tol=0.0).solve(Dense(H), b).x
    assert (x - exact).norm() < 1e-12 * exact.norm()
    if distinct > 1:
        early = ConjugateGradient(distinct - 1, tol=0.0).solve(Dense(H), b).x
        assert (early - exact).norm() > 1e-3 * exact.norm()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), steps=st.integers(1, 8), damping=st.sampled_from([0.0, 0.1]))
def test_every_iterate_is_optimal_in_its_krylov_space(seed, steps, damping):
    """The definition: x_l minimises the A-norm error over span{b, Ab, ..., A^(l-1) b}."""
    A = spd(12, 30.0, seed) + damping * torch.eye(12, dtype=torch.float64)
    b = torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    K = [b]
    for _ in range(steps - 1):
        K.append(A @ K[-1] / (A @ K[-1]).norm())
    Q, _ = torch.linalg.qr(torch.stack(K, 1))
    best = Q @ torch.linalg.solve(Q.mT @ A @ Q, Q.mT @ b)
    found = ConjugateGradient(steps, tol=0.0, damping=damping).solve(Dense(spd(12, 30.0, seed)), b)
    torch.testing.assert_close(found.x, best, rtol=1e-6, atol=1e-8)
    true_residual = (b - A @ found.x).norm() / b.norm()
    torch.testing.assert_close(found.residual, true_residual, rtol=1e-6, atol=1e-12)


def test_cross_product_comes_along():
    H, J = spd(15, 20.0), torch.randn(15, 4, dtype=torch.float64)
    b = torch.randn(15, dtype=torch.float64)
    for warm in (False, True):
        solver = ConjugateGradient(4, warm_start=warm, damping=0.01)
        for _ in range(3):
            found = solver.solve(Dense(H, J), b)
            torch.testing.assert_close(found.cross, J.mT @ found.x)


def test_tolerance_is_met_and_said():
    H, b = Dense(spd(40, 100.0)), torch.ones(40, dtype=torch.float64)
    loose = ConjugateGradient(100, tol=1e-3).solve(H, b)
    assert loose.converged
    assert loose.residual <= 1e-3
    assert H.matvecs < 100
    assert not ConjugateGradient(2, tol=1e-3).solve(H, b).converged


def test_zero_right_hand_side():
    found = ConjugateGradient(5).solve(Dense(torch.eye(3)), torch.zeros(3))
    assert found.x.equal(torch.zeros(3))
    assert found.residual == 0
    assert found.converged


def test_zero_curvature_in_the_first_step():
    """H = diag(2, -1), b = (1, √2): bᵀHb = 0. Flagged, finite, along b."""
    b = tensor(1.0, 2**0.5)
    found = ConjugateGradient(5).solve(Dense(torch.diag(tensor(2.0, -1.0))), b)
    assert found.negative_curvature
    assert found.x.isfinite().all()
    torch.testing.assert_close(found.x, b * b.norm() / 6**0.5)


def test_negative_curvature_keeps_the_best_iterate():
    """Outliers first, then a negative direction: the iterate before the breakdown is kept."""
    H = torch.diag(tensor(10.0, 5.0, 2.0, -0.1))
    b = tensor(1.0, 1.0, 1.0, 0.05)
    found = ConjugateGradient(10).solve(Dense(H), b)
    assert found.negative_curvature
    assert found.residual < 1
    torch.testing.assert_close(found.residual, (b - H @ found.x).norm() / b.norm())


def test_runaway_step_does_not_win():
    """Indefinite, yet pᵀAp > 0 at every step taken: the last step is enormous, the best is kept."""
    H = torch.diag(tensor(1.0, -1.0))
    b = tensor(1.0, 1.0 - 1e-6)  # bᵀHb = 2e-6
    found = ConjugateGradient(1, tol=0.0).solve(Dense(H), b)
    assert found.residual > 1e5  # the only step there is; nothing hides it
    good = torch.diag(tensor(100.0, 1.0, -1.0))
    b = torch.cat([tensor(1000.0), b])
    found = ConjugateGradient(2, tol=0.0).solve(Dense(good), b)
    torch.testing.assert_close(found.residual, (b - good @ found.x).norm() / b.norm())
    assert found.residual < 0.1


def test_nan_stays_nan():
    H = torch.eye(3)
    H[1, 1] = torch.nan
    for tol in (0.0, 1e-6):
        found = ConjugateGradient(3, tol=tol).solve(Dense(H), torch.ones(3))
        assert found.x.isnan().any()
        assert not found.converged


def test_warm_start_recovers_from_a_bad_memory():
    b = torch.ones(3)
    solver = ConjugateGradient(3, warm_start=True)
    for bad in (torch.full((3,), torch.nan), -b, torch.zeros(3), torch.ones(7)):
        solver.state["x"] = bad
        torch.testing.assert_close(solver.solve(Dense(2 * torch.eye(3)), b).x, b / 2)


@pytest.mark.parametrize("lowest", [-0.3, -1.0])
def test_warm_start_does_not_run_away_on_an_indefinite_system(lowest):
    """Its energy has no minimum: from step to step a warm start could grow without bound."""
    g = torch.Generator().manual_seed(0)
    Q, _ = torch.linalg.qr(torch.randn(50, 50, dtype=torch.float64, generator=g))
    eigenvalues = torch.cat([tensor(lowest), torch.logspace(0, -3, 49, dtype=torch.float64)])
    H, solver = Q * eigenvalues @ Q.mT, ConjugateGradient(2, tol=0.0, warm_start=True)
    b = torch.randn(50, dtype=torch.float64, generator=g)
    for _ in range(60):
        H = H + 1e-3 * torch.eye(50, dtype=torch.float64) * float(torch.randn((), generator=g))
        assert solver.solve(Dense(H), b).residual <= 100


def test_tiny_right_hand_side_in_float32():
    b = torch.full((4,), 1e-25)
    found = ConjugateGradient(3).solve(Dense(2 * torch.eye(4)), b)
    torch.testing.assert_close(found.x, b / 2, rtol=1e-6, atol=0)


def test_warm_start_tracks_a_drifting_system():
    """Two warm steps beat two cold ones on a system that moves by a percent a step."""
    H, b = spd(60, 300.0), torch.randn(60, dtype=torch.float64)
    solver = ConjugateGradient(2, tol=0.0, warm_start=True)
    for t in range(30):
        A = H * (1 + 0.01 * torch.sin(torch.tensor(float(t))))
        exact = torch.linalg.solve(A, b)
        warm = (solver.solve(Dense(A), b).x - exact).norm() / exact.norm()
    cold = (ConjugateGradient(3, tol=0.0).solve(Dense(A), b).x - exact).norm() / exact.norm()
    assert warm < cold / 2


@pytest.mark.parametrize("make", [lambda: NystromSketch(5), RecycledPairs], ids=["sketch", "pairs"])
@pytest.mark.parametrize("warm_start", [False, True])
def test_any_preconditioner_converges_to_the_same_solution(make, warm_start):
    H, b = spd(30, 1e3), torch.randn(30, dtype=torch.float64)
    solver = ConjugateGradient(
        40, tol=1e-11, damping=0.01, warm_start=warm_start, preconditioner=make()
    )
    exact = torch.linalg.solve(H + 0.01 * torch.eye(30, dtype=torch.float64), b)
    for _ in range(3):
        found = solver.solve(Dense(H), b)
        assert (found.x - exact).norm() < 1e-8 * exact.norm()
        assert found.converged


def test_recycled_pairs_pay():
    """The second solve of the same matrix, another right-hand side, takes fewer products."""
    H = spd(100, 1e4)
    solver = ConjugateGradient(100, tol=1e-3, preconditioner=RecycledPairs(window=80))
    counts = []
    for _ in range(2):
        operator = Dense(H)
        solver.solve(operator, torch.linalg.cholesky(H) @ torch.randn(100, dtype=torch.float64))
        counts.append(operator.matvecs)
    assert counts[1] < counts[0] / 2


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "make",
    [
        lambda: ConjugateGradient(5, preconditioner=RecycledPairs()),
        lambda: NystromPCG(5, damping=0.0),
        lambda: RecycledCG(damping=0.0),
    ],
)
def test_negative_curvature_in_the_first_step_is_no_answer_of_zero(make, seed):
    """The zero vector is the answer to b = 0 only; where nothing is known, it is b."""
    b = torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    found = make().solve(Dense(-torch.eye(8, dtype=torch.float64)), b)
    assert found.negative_curvature
    assert found.cross is not None
    assert found.x.norm() > 0
    torch.testing.assert_close(found.x, b)
