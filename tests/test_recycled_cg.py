"""RecycledCG: CG's limit, its own cost, less error than CG for it, and safeguards that act."""

import pytest
import torch
from problems import spd, tensor

from hyperopt_torch import BilevelOptimizer, ConjugateGradient
from hyperopt_torch.ihvp._descent import begin, descend
from hyperopt_torch.ihvp._recycling import RecycledPairs, _factor
from hyperopt_torch.ihvp.recycled_cg import RecycledCG
from hyperopt_torch.operators import Damped, Dense


def error(x, H, b, rho=0.0):
    exact = torch.linalg.solve(H + rho * torch.eye(len(b), dtype=H.dtype), b)
    return float((x - exact).norm() / exact.norm())


def drifting(steps, speed, n=80, condition=1e3, seed=0):
    """H_t = R_t H R_tᵀ with a slow rotation, b_t moving along."""
    g = torch.Generator().manual_seed(seed)
    H = spd(n, condition, seed)
    S = torch.randn(n, n, dtype=torch.float64, generator=g)
    R = torch.linalg.matrix_exp(speed * (S - S.mT) / n**0.5)
    b = torch.linalg.cholesky(H) @ torch.randn(n, dtype=torch.float64, generator=g)
    for _ in range(steps):
        yield H, b
        H, b = R @ H @ R.mT, R @ b


@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_first_solve_is_cg(damping):
    H, b = spd(40, 50.0), torch.randn(40, dtype=torch.float64)
    operator = Dense(H)
    found = RecycledCG(tol=1e-3, damping=damping).solve(operator, b)
    plain = ConjugateGradient(operator.matvecs, tol=0.0, damping=damping).solve(Dense(H), b)
    # Early steps, where CG's own loss of orthogonality has not begun.
    torch.testing.assert_close(found.x, plain.x, rtol=1e-9, atol=1e-9)
    assert found.residual < 1e-3


def test_fixed_system_costs_one_warm_start_more_and_converges_faster_than_cg():
    H, b = spd(200, 1e4), torch.randn(200, dtype=torch.float64)
    recycled, warm = RecycledCG(damping=0.0), ConjugateGradient(2, tol=0.0, warm_start=True)
    first = recycled.solve(Dense(H), b)
    warm.state["x"] = first.x
    for _ in range(15):
        operator = Dense(H)
        mine = recycled.solve(operator, b)
        assert operator.matvecs == 3
        theirs = warm.solve(Dense(H), b)
    assert error(mine.x, H, b) < error(theirs.x, H, b)
    assert mine.residual < first.residual


def test_residual_and_cross_are_true():
    J = torch.randn(80, 3, dtype=torch.float64)
    solver = RecycledCG(damping=0.05)
    for H, b in drifting(6, 1e-3):
        found = solver.solve(Dense(H, J), b)
        r = b - H @ found.x - 0.05 * found.x
        torch.testing.assert_close(found.residual, r.norm() / b.norm(), rtol=1e-6, atol=1e-10)
        torch.testing.assert_close(found.cross, J.mT @ found.x)


@pytest.mark.parametrize("speed", [1e-4, 1e-3])
def test_beats_warm_cg_on_drifting_systems(speed):
    recycled, warm = RecycledCG(damping=0.0), ConjugateGradient(2, tol=0.0, warm_start=True)
    errors = []
    for t, (H, b) in enumerate(drifting(40, speed)):
        pair = [error(s.solve(Dense(H), b).x, H, b) for s in (recycled, warm)]
        if t == 0:
            warm.state["x"] = recycled.state["x"].clone()
        if t > 5:
            errors.append(pair)
    mine, theirs = torch.tensor(errors).median(0).values
    assert mine < theirs / 2


def test_tolerance_mode_meets_it():
    solver = RecycledCG(tol=1e-3, damping=0.0)
    for t, (H, b) in enumerate(drifting(20, 1e-4)):
        operator = Dense(H)
        found = solver.solve(operator, b)
        assert found.converged or operator.matvecs == 21
        assert t == 0 or operator.matvecs <= 21


def test_preconditioner_is_the_definition():
    """U(Λ + ρ)⁻¹Uᵀ + (I - UUᵀ)/(t + ρ), with U formed here, and exact on the newest pair."""
    H, rho = spd(30, 100.0), 0.01
    pairs = RecycledPairs(window=6, corrections=0)
    Q = torch.linalg.qr(torch.randn(30, 4, dtype=torch.float64))[0]
    operator = Dense(H)
    pairs.learn(operator, [(q, H @ q) for q in Q.unbind(1)])
    apply = pairs.prepare(operator, rho)
    Y = H @ Q
    lam, V = torch.linalg.eigh(Y @ torch.linalg.solve(Q.mT @ Y, Y.mT))
    U, lam = V[:, -4:], lam[-4:]
    r = torch.randn(30, dtype=torch.float64)
    complement = (r - U @ (U.mT @ r)) / (lam.min() + rho)
    torch.testing.assert_close(apply(r), U @ ((U.mT @ r) / (lam + rho)) + complement)

    corrected = RecycledPairs(window=6, corrections=3)
    corrected.learn(operator, [(q, H @ q) for q in Q.unbind(1)])
    q = Q[:, -1]
    torch.testing.assert_close(corrected.prepare(operator, rho)(H @ q + rho * q), q)


def test_window_forgets_the_oldest():
    H, pairs = Dense(spd(20, 10.0)), RecycledPairs(window=3)
    Q = torch.linalg.qr(torch.randn(20, 5, dtype=torch.float64))[0]
    for q in Q.unbind(1):
        pairs.learn(H, [(q, H @ q)])
    R = pairs.ring(Q[:, 0])
    torch.testing.assert_close(R[[4, 0, 2]], Q[:, 2:].mT)
    torch.testing.assert_close(pairs.gram, R @ R.mT)


def two_loop(pairs, rho, r):
    """The same preconditioner as Nocedal & Wright write it, around U(Λ + ρ)⁻¹Uᵀ formed whole."""
    R, slots = pairs.state["rows"], pairs.alive()
    Q = R[[2 * i for i in slots]].mT
    HQ = pairs.unit * R[[2 * i + 1 for i in slots]].mT
    factor = _factor(Q.mT @ Q, Q.mT @ HQ, HQ.mT @ HQ)
    F, lam = factor
    U = HQ @ F / lam.sqrt()
    alphas, newest = [], list(range(len(slots)))[-pairs.corrections :]
    for i in reversed(newest):
        y = HQ[:, i] + rho * Q[:, i]
        alphas.append(Q[:, i] @ r / (Q[:, i] @ y))
        r = r - alphas[-1] * y
    d = U @ ((U.mT @ r) / (lam + rho)) + (r - U @ (U.mT @ r)) / (lam.min() + rho)
    for i, alpha in zip(newest, reversed(alphas), strict=True):
        y = HQ[:, i] + rho * Q[:, i]
        d = d + (alpha - y @ d / (Q[:, i] @ y)) * Q[:, i]
    return d


@pytest.mark.parametrize("corrections", [1, 4, 10])
def test_coordinates_are_the_two_loop_recursion(corrections):
    """Pairs of drifting systems: QᵀHQ is not symmetric, and QᵀY not triangular."""
    pairs, rho = RecycledPairs(8, corrections), 0.03
    for H, b in drifting(12, 1e-3):
        q = torch.randn(len(b), dtype=b.dtype)
        q /= q.norm()
        pairs.learn(Dense(H), [(q, H @ q)])
    r = torch.randn(len(b), dtype=b.dtype)
    found = pairs.prepare(Dense(H), rho)(r)
    torch.testing.assert_close(found, two_loop(pairs, rho, r), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("window", [3, 20])
def test_iterates_in_coordinates_are_those_of_vectors(window):
    """`descend` orthogonalises vector by vector, with the same pairs as its preconditioner."""
    recycled = RecycledCG(window, damping=0.01)
    pairs, x = RecycledPairs(window), None
    for H, b in drifting(40, 1e-3):
        mine, A = recycled.solve(Dense(H), b), Damped(Dense(H), 0.01)
        start = begin(A, b, x)
        steps, tol = (60, 0.03) if x is None else (2, 0.0)
        found = descend(A, start, pairs.prepare(Dense(H), 0.01), steps, tol)
        pairs.learn(Dense(H), [(p.q, p.Aq - 0.01 * p.q) for p in found.pairs])
        x = found.x
        torch.testing.assert_close(mine.x, x, rtol=1e-7, atol=1e-7)
        assert float(mine.residual) == pytest.approx(found.residual, rel=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e10])
def test_no_scale_underflows_in_float32(scale):
    one, other = RecycledCG(damping=0.0), RecycledCG(damping=0.0)
    for H, b in drifting(5, 1e-3):
        H, b = H.float(), b.float()
        expected = one.solve(Dense(H), b)
        found = other.solve(Dense(H * scale), b)
        gap = found.x.double() * scale - expected.x.double()
        assert float(gap.norm()) < 1e-3 * float(expected.x.norm())
        assert float(found.residual) == pytest.approx(float(expected.residual), rel=1e-2)


def test_the_residual_is_true_below_the_rounding_of_the_gram_matrix():
    """Coordinates alone would lose it below the root of the precision; it is measured anew."""
    H, b = spd(40, 10.0), torch.randn(40, dtype=torch.float64)
    found = RecycledCG(tol=1e-11, damping=0.0).solve(Dense(H), b)
    true = (b - H @ found.x).norm() / b.norm()
    assert true < 1e-11
    assert float(found.residual) == pytest.approx(float(true), abs=1e-14)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("damping", [0.0, "auto"])
def test_negative_curvature_is_flagged_and_does_no_harm(damping, first):
    """Never further from solving the system than x = 0, and with the sign of b."""
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        solver, H = RecycledCG(damping=damping), spd(10, 10.0, seed)
        b = torch.randn(10, dtype=torch.float64, generator=g)
        if not first:
            solver.solve(Dense(H), b)
        lam, V = torch.linalg.eigh(H)
        lam[:3] *= -3
        found = solver.solve(Dense((V * lam) @ V.mT), b)
        assert found.negative_curvature or first
        assert found.residual <= 1
        assert found.x @ b >= 0


def test_where_nothing_is_known_the_answer_is_b_at_the_length_of_its_product():
    b = tensor(1.0, 2**0.5)
    first = RecycledCG(damping=0.0).solve(Dense(torch.diag(tensor(2.0, -1.0))), b)
    assert first.negative_curvature
    torch.testing.assert_close(first.x, b * b.norm() / 6**0.5)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_replaced_problem_is_no_worse_than_nothing(sign):
    """The old pairs say nothing about the new system; its energy is below that of x = 0."""
    for seed in range(5):
        solver = RecycledCG(damping=0.0)
        b = torch.randn(50, dtype=torch.float64)
        for _ in range(5):
            solver.solve(Dense(spd(50, 1e3, seed)), b)
        H = 50 * spd(50, 1e3, seed + 100)
        x = solver.solve(Dense(H), sign * b).x
        assert x @ H @ x / 2 - sign * b @ x < 0


def test_nan_stays_nan_and_passes():
    solver, b = RecycledCG(damping=0.0), torch.ones(3)
    found = solver.solve(Dense(torch.full((3, 3), torch.nan)), b)
    assert found.x.isnan().any()
    torch.testing.assert_close(solver.solve(Dense(2 * torch.eye(3)), b).x, b / 2)


def test_replaced_parameters_reset_the_strategy():
    """`theta` moved by more than half its norm: what was learned there is forgotten."""
    w = torch.ones(4, dtype=torch.float64, requires_grad=True)
    phi = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    solver = RecycledCG()
    optimizer = BilevelOptimizer(
        torch.optim.SGD([w], lr=0.01), torch.optim.SGD([phi], lr=0.01), ihvp=solver
    )

    def step():
        optimizer.inner_step(lambda: (w**2 + (w - phi) ** 2).sum())
        optimizer.outer_step((w - 1).square().sum() + (w[0] - 3) ** 2)
        return solver.pairs.state["count"]

    step()
    assert step() > (before := 1)
    grown = step()
    with torch.no_grad():
        w.mul_(-5)
    assert before <= step() < grown


def test_size_may_change():
    solver = RecycledCG(damping=0.0)
    for n in (5, 8):
        b = torch.ones(n, dtype=torch.float64)
        assert error(solver.solve(Dense(spd(n, 2.0)), b).x, spd(n, 2.0), b) < 0.05


def test_zero_right_hand_side():
    solver = RecycledCG()
    for _ in range(2):
        found = solver.solve(Dense(torch.eye(3)), torch.zeros(3))
        assert found.x.equal(torch.zeros(3))
        assert found.residual == 0


@pytest.mark.parametrize("solves", [0, 1, 7])
@pytest.mark.parametrize("new_problem", [False, True])
def test_a_loan_leaves_every_bit_of_the_memory(solves, new_problem):
    solver = RecycledCG(3)
    systems = [(Dense(H), b) for H, b in drifting(solves + 1, 1e-2)]
    for H, b in systems[:-1]:
        solver.solve(H, b)
    if new_problem:
        solver.begin()  # drops the solution: the next solve is long, and overwrites every slot
    before = solver.state_dict()
    with solver.on_loan():
        solver.solve(*systems[-1])
        assert str(solver.state_dict()) != str(before)
        solver.solve(*systems[-1])
    after = solver.state_dict()
    assert str(after) == str(before)
    for key, value in before["parts"]["pairs"]["state"].items():
        assert torch.equal(
            torch.as_tensor(value), torch.as_tensor(after["parts"]["pairs"]["state"][key])
        )
