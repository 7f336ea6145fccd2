"""LancBiO and SubBiO: exact on fixed systems, safe on drifting ones, the published method to the
letter without safeguards.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from itertools import islice, pairwise

import pytest
import torch
from problems import spd, tensor
from torch import Tensor

from hyperopt_torch import IHVP
from hyperopt_torch.ihvp import LancBiO, SubBiO
from hyperopt_torch.ihvp.base import Solution
from hyperopt_torch.operators import Dense

EITHER = pytest.mark.parametrize("safeguard", [True, False])


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rotation(n: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(randn(n, n, seed=seed))[0]


def solve(solver: IHVP, A: Tensor, b: Tensor) -> Tensor:
    found = solver.solve(Dense(A), b)
    return found.x if isinstance(found, Solution) else found


def error(x: Tensor, A: Tensor, b: Tensor) -> float:
    exact = torch.linalg.solve(A, b)
    return float((x - exact).norm() / exact.norm())


# --- a fixed system -----------------------------------------------------------------------------


@EITHER
@pytest.mark.parametrize("distinct", [1, 2, 3, 5, 8])
def test_exact_after_as_many_steps_as_distinct_eigenvalues(distinct: int, safeguard: bool):
    Q = rotation(30)
    H = Q * (1.0 + torch.arange(30) % distinct) @ Q.mT
    A, b = H + 0.1 * torch.eye(30, dtype=torch.float64), randn(30, seed=1)
    solver = LancBiO(10, damping=0.1, safeguard=safeguard)
    errors = [error(solve(solver, H, b), A, b) for _ in range(distinct)]
    assert errors[-1] < 1e-10
    assert all(e > 1e-3 for e in errors[:-1])


@pytest.mark.parametrize("n", [1, 2, 3, 9])
def test_fewer_dimensions_than_subspace_dim(n: int):
    """And it stays exact: nothing grows out of rounding once the subspace is exhausted."""
    A, b, solver = spd(n, 100.0), randn(n, seed=1), LancBiO(20)
    errors = [error(solve(solver, A, b), A, b) for _ in range(4 * n)]
    assert max(errors[n - 1 :]) < 1e-10


def test_every_answer_is_that_of_conjugate_gradients():
    """The definition: x_j minimises the A-norm error over span{b, Ab, ..., A^(j-1) b}."""
    A, b, solver = spd(12, 30.0), randn(12, seed=1), LancBiO(12)
    K = [b]
    for _ in range(8):
        Q = torch.linalg.qr(torch.stack(K, 1))[0]
        best = Q @ torch.linalg.solve(Q.mT @ A @ Q, Q.mT @ b)
        torch.testing.assert_close(solve(solver, A, b), best, rtol=1e-7, atol=1e-9)
        K.append(A @ K[-1] / (A @ K[-1]).norm())


@EITHER
@pytest.mark.parametrize("m", [1, 2, 5])
def test_starting_anew_goes_on_improving(m: int, safeguard: bool):
    """With m = 1 this is steepest descent; the published method cannot do worse in a fixed A."""
    A, b = spd(40, 50.0), randn(40, seed=1)
    solver = LancBiO(m, safeguard=safeguard)
    errors = [error(solve(solver, A, b), A, b) for _ in range(300)]
    at_start = errors[m - 1 :: m]
    assert all(late < max(early, 1e-12) for early, late in pairwise(at_start))
    assert errors[-1] < 1e-3


def test_float32_reaches_its_own_precision_and_stays_there():
    A, b, solver = spd(30, 50.0, dtype=torch.float32), torch.ones(30), LancBiO(10)
    found = [solve(solver, A, b) for _ in range(80)]
    assert found[0].dtype == torch.float32
    assert max(error(x.double(), A.double(), b.double()) for x in found[60:]) < 1e-5


def test_damping():
    H, b, solver = spd(5, 10.0), randn(5), LancBiO(5, damping=0.5)
    A = H + 0.5 * torch.eye(5, dtype=torch.float64)
    assert error([solve(solver, H, b) for _ in range(5)][-1], A, b) < 1e-12


def test_cross_product_and_residual_are_true():
    J = randn(15, 4, seed=5)
    for solver in (LancBiO(4, damping=0.1), SubBiO(0.5, damping=0.1)):
        for A, b in islice(drifting(FLAT, 0.02, n=15), 12):
            found = solver.solve(Dense(A, J), b)
            torch.testing.assert_close(found.cross, J.mT @ found.x)
            r = b - A @ found.x - 0.1 * found.x
            torch.testing.assert_close(found.residual, r.norm() / b.norm())


# --- cost ---------------------------------------------------------------------------------------


def products(solver: IHVP, solves: int) -> list[int]:
    counts = []
    for A, b in islice(drifting(FLAT, 0.001), solves):
        H = Dense(A)
        solver.solve(H, b)
        counts.append(H.matvecs)
    return counts


def test_products_with_safeguards():
    """One new vector and one closing joint product; at a start, w. The first start has w = 0."""
    assert products(LancBiO(10), 31) == [2] * 10 + [3] + [2] * 9 + [3] + [2] * 9 + [3]


def test_products_of_the_published_method():
    """The closing product is left to the caller."""
    expected = [1] * 10 + [2] + [1] * 9 + [2] + [1] * 9
    assert products(LancBiO(10, safeguard=False), 30) == expected


def test_products_of_subbio():
    assert products(SubBiO(0.1), 4) == [1, 3, 3, 3]


# --- drift --------------------------------------------------------------------------------------


def FLAT(n: int) -> Tensor:
    """10 outliers from 10 to 1 above a flat bulk: κ = 1000."""
    return torch.cat([torch.logspace(1, 0, 10, dtype=torch.float64), torch.full((n - 10,), 0.01)])


def SLOW_DECAY(n: int) -> Tensor:
    return 10.0 / torch.arange(1, n + 1, dtype=torch.float64) + 0.01


def drifting(
    spectrum: Callable[[int], Tensor], rate: float, seed: int = 0, n: int = 100
) -> Iterator[tuple[Tensor, Tensor]]:
    """(A, b) of one outer step after another: eigenvectors turn by ``rate`` a step, b with them."""
    g = torch.Generator().manual_seed(seed)
    lam, U = spectrum(n), rotation(n, seed)
    z = torch.randn(n, dtype=torch.float64, generator=g)
    while True:
        A = U * lam @ U.mT
        yield (A + A.mT) / 2, U * lam.sqrt() @ (U.mT @ z)
        S = torch.randn(n, n, dtype=torch.float64, generator=g)
        U = torch.linalg.qr(U + rate * (S - S.mT) @ U / (2 * n) ** 0.5)[0]


def track(solver: IHVP, systems: Iterator[tuple[Tensor, Tensor]], steps: int = 60) -> Tensor:
    """Relative errors, the first 15 steps left out."""
    errors = [error(solve(solver, A, b), A, b) for A, b in islice(systems, steps)]
    return tensor(*errors[15:])


class MultipleOfB(IHVP):
    def solve(self, operator, rhs: Tensor) -> Tensor:
        return rhs * (rhs @ rhs) / (rhs @ (operator @ rhs))


def transcription(
    systems: Iterator[tuple[Tensor, Tensor]], m: int, steps: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The algorithm box: lists of vectors, T in full. Yields (A, b, v)."""
    v = None
    for k, (A, b) in enumerate(islice(systems, steps)):
        v = torch.zeros_like(b) if v is None else v
        if k % m == 0:
            v_bar, w = v, A @ v
            basis, diagonal, beside = [(b - w) / (b - w).norm()], [], []
            beta, last = 0.0, torch.zeros_like(b)
        u = A @ basis[-1] - beta * last
        alpha = basis[-1] @ u
        diagonal.append(alpha)
        T = torch.diag(torch.stack(diagonal))
        for i, value in enumerate(beside):
            T[i, i + 1] = T[i + 1, i] = value
        Q = torch.stack(basis, dim=1)
        v = v_bar + Q @ torch.linalg.inv(T) @ Q.mT @ (b - w)
        omega = u - alpha * basis[-1]
        beta, last = omega.norm(), basis[-1]
        beside.append(beta)
        basis.append(omega / beta)
        yield A, b, v


@pytest.mark.parametrize("m", [1, 2, 7, 10])
@pytest.mark.parametrize("spectrum", [FLAT, SLOW_DECAY])
@pytest.mark.parametrize("rate", [1e-3, 2e-2])
def test_published_method_to_the_letter(rate: float, spectrum, m: int):
    """As far as nearly singular T let two orders of rounding agree."""
    solver = LancBiO(m, safeguard=False)
    for A, b, expected in transcription(drifting(spectrum, rate), m, steps=25):
        assert (solve(solver, A, b) - expected).norm() < 1e-11 * expected.norm()


def test_published_method_to_the_last_digits():
    """Well-conditioned, so that nothing blows rounding up."""
    solver = LancBiO(6, safeguard=False)
    lam = lambda n: torch.linspace(1.0, 2.0, n, dtype=torch.float64)  # noqa: E731
    for A, b, expected in transcription(drifting(lam, 1e-2), 6, steps=30):
        found = solve(solver, A, b)
        assert (found - expected).norm() < 1e-12 * expected.norm()


@pytest.mark.parametrize("seed", [0, 1])
def test_slow_drift(seed: int):
    """0.1% a step, two products: far below what a solve from scratch gets for five times that."""
    errors = track(LancBiO(10), drifting(FLAT, 1e-3, seed))
    assert errors.median() < 0.005
    assert errors.max() < 0.02
    errors = track(LancBiO(10), drifting(SLOW_DECAY, 1e-3, seed))
    assert errors.median() < 0.005
    assert errors.max() < 0.02


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_fast_drift_is_safe(seed: int):
    """2% a step and κ = 1000: below the best multiple of b in every single step."""
    errors = track(LancBiO(10), drifting(FLAT, 2e-2, seed))
    identity = track(MultipleOfB(), drifting(FLAT, 2e-2, seed))
    assert (errors < identity).all()
    assert errors.median() < 0.12
    assert errors.max() < 0.3


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_fast_drift_is_not_safe_without_safeguards(seed: int):
    """The test above can fail."""
    errors = track(LancBiO(10, safeguard=False), drifting(FLAT, 2e-2, seed))
    assert errors.max() > 2
    assert errors.median() > 3 * track(LancBiO(10), drifting(FLAT, 2e-2, seed)).median()


def outliers_only(rate: float, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """b has nothing outside the outliers, so that all that is found there is drift, over 0.01."""
    for A, b in drifting(FLAT, rate, seed):
        U = torch.linalg.eigh(A)[1][:, -10:]
        yield A, U @ (U.mT @ b)


def test_eigenvalues_below_the_drift_are_not_trusted():
    """Without that, or with the two numbers of the short recurrence, some answers are useless."""
    errors = torch.cat([track(LancBiO(10), outliers_only(2e-2, seed)) for seed in range(4)])
    assert errors.median() < 0.25
    assert errors.max() < 0.6


@pytest.mark.parametrize("rate", [1e-3, 2e-2, 0.2])
@pytest.mark.parametrize("spectrum", [FLAT, SLOW_DECAY])
def test_error_in_the_A_norm_never_exceeds_that_of_zero(spectrum, rate: float):
    solver = LancBiO(10)
    for A, b in islice(drifting(spectrum, rate), 40):
        x, exact = solve(solver, A, b), torch.linalg.solve(A, b)
        assert (x - exact) @ A @ (x - exact) <= exact @ b


@pytest.mark.parametrize("change", ["rotated", "times 100", "over 100", "negated", "another b"])
def test_replaced_parameters(change: str):
    """Another system from one step to the next: as good as a new start soon after."""
    A, b = next(drifting(FLAT, 0.0))
    solver = LancBiO(10)
    for _ in range(15):
        solve(solver, A, b)
    R = rotation(100, seed=9)
    A, b = {
        "rotated": (R @ A @ R.mT, b),
        "times 100": (100 * A, b),
        "over 100": (A / 100, b),
        "negated": (A, -b),
        "another b": (A, randn(100, seed=7)),
    }[change]
    fresh = LancBiO(10)
    identity = error(solve(MultipleOfB(), A, b), A, b)
    for step in range(25):
        old, new = error(solve(solver, A, b), A, b), error(solve(fresh, A, b), A, b)
        assert old <= 1.05 * identity
        if step >= 11:
            assert old < 1e-3 + 2 * new


@pytest.mark.parametrize("factor", [100.0, 0.01])
def test_a_jump_ends_the_subspace(factor: float):
    """x keeps its direction, so no multiple of b is better, but T is of no use: anew at once."""
    A, b = next(drifting(FLAT, 0.0))
    solver = LancBiO(10)
    for _ in range(14):
        solve(solver, A, b)
    jumped, after = Dense(factor * A), Dense(factor * A)
    solver.solve(jumped, b)
    solver.solve(after, b)
    assert after.matvecs == 3


def test_return_to_a_multiple_of_b_is_said():
    A, b = next(drifting(FLAT, 0.0))
    solver = LancBiO(10)
    for _ in range(12):
        usual = solver.solve(Dense(A), b)
    assert usual.converged is None
    assert not usual.notes
    R = rotation(100, seed=9)
    moved = R @ A @ R.mT
    H = Dense(moved)
    found = solver.solve(H, b)
    assert found.converged is False
    assert "multiple of b" in found.notes[0]
    assert H.matvecs == 3
    torch.testing.assert_close(found.x, b * (b @ b) / (b @ moved @ b))
    assert not found.negative_curvature


# --- trouble ------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: LancBiO(5), lambda: SubBiO(0.3)])
def test_negative_curvature_is_flagged(make):
    A = torch.diag(tensor(3.0, 2.0, 1.0, -0.5))
    b, solver = torch.ones(4, dtype=torch.float64), make()
    found = [solver.solve(Dense(A), b) for _ in range(12)]
    assert any(f.negative_curvature for f in found)
    assert all(f.x.norm() < 20 for f in found)
    assert all(f.negative_curvature or f.residual < 10 for f in found)


@pytest.mark.parametrize("make", [lambda: LancBiO(5), lambda: SubBiO(0.3)])
def test_zero_curvature_along_b(make):
    """H = diag(2, -1), b = (1, √2): bᵀHb = 0. Flagged, finite, along b, at every solve."""
    A, b, solver = torch.diag(tensor(2.0, -1.0)), tensor(1.0, 2**0.5), make()
    found = solver.solve(Dense(A), b)
    assert found.negative_curvature
    torch.testing.assert_close(found.x, b * b.norm() / (A @ b).norm())
    for _ in range(5):
        assert solver.solve(Dense(A), b).x.isfinite().all()


@pytest.mark.parametrize("make", [lambda: LancBiO(5), lambda: SubBiO(0.3)])
def test_zero_matrix(make):
    solver = make()
    for _ in range(3):
        found = solver.solve(Dense(torch.zeros(3, 3)), torch.ones(3))
        assert found.x.isfinite().all()
        assert found.x.norm() > 0


def test_singular_system():
    """b has a part that A cannot reach: the solution does not exist, and is not looked for far."""
    A, b, solver = torch.diag(tensor(3.0, 2.0, 1.0, 0.0)), torch.ones(4).double(), LancBiO(10)
    found = [solver.solve(Dense(A), b) for _ in range(40)]
    assert all(f.x.norm() < 1000 for f in found)
    assert sum(bool(f.negative_curvature) for f in found) > 30


def test_the_subspace_stays_orthonormal():
    """In float32, and over a spectrum where Lanczos loses orthogonality."""
    A, b, solver = spd(200, 1e4, dtype=torch.float32), torch.ones(200), LancBiO(40)
    for _ in range(39):
        solve(solver, A, b)
    Q = solver.state["Q"].double()
    torch.testing.assert_close(Q @ Q.mT, torch.eye(40).double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rate", [0.0, 2e-2, 0.2])
@pytest.mark.parametrize("spectrum", [FLAT, SLOW_DECAY])
def test_positive_definite_systems_are_not_flagged(spectrum, rate: float):
    for solver in (LancBiO(10), LancBiO(40), SubBiO(0.1)):
        for A, b in islice(drifting(spectrum, rate, n=50), 60):
            assert not solver.solve(Dense(A), b).negative_curvature


@pytest.mark.parametrize("n", [1, 2, 5, 20])
def test_solved_positive_definite_systems_are_not_flagged(n: int):
    """What is left is rounding, and its curvature that of A all the same."""
    for dtype in (torch.float32, torch.float64):
        A, b, solver = spd(n, 50.0, dtype=dtype), torch.ones(n, dtype=dtype), LancBiO(10)
        for _ in range(80):
            found = solver.solve(Dense(A), b)
            assert not found.negative_curvature
            assert found.converged is None


@pytest.mark.parametrize(
    "make", [lambda: LancBiO(3), lambda: LancBiO(3, safeguard=False), lambda: SubBiO(1.0)]
)
@pytest.mark.parametrize("where", ["matrix", "right-hand side"])
@pytest.mark.parametrize("when", [0, 1, 3, 5])
def test_nan_is_returned_and_then_forgotten(when: int, where: str, make):
    A, b, solver = spd(6, 5.0), randn(6), make()
    for step in range(60):
        bad = torch.full_like(A, torch.nan) if where == "matrix" else A
        bad_b = b.clone()
        bad_b[2] = torch.nan
        if step == when:
            x = solve(solver, bad, b if where == "matrix" else bad_b)
            assert x.isnan().any()
        else:
            x = solve(solver, A, b)
        if step >= when + 4:  # a start is at most three steps off
            assert x.isfinite().all()
    assert error(x, A, b) < 1e-5


def test_overflow_is_not_taken_for_a_solution():
    b = torch.ones(3)
    solver = LancBiO(3)
    found = solver.solve(Dense(torch.eye(3) * 1e38), b * 1e30)
    assert found.converged is False or found.residual < 1e-3
    assert solve(solver, torch.eye(3) * 2, b).equal(b / 2)


@pytest.mark.parametrize(
    "make", [lambda: LancBiO(3), lambda: LancBiO(3, safeguard=False), lambda: SubBiO(1.0)]
)
def test_zero_right_hand_side(make):
    """At first, and in the middle; the answer to b = 0 is 0."""
    A, b, solver = spd(6, 5.0), randn(6), make()
    if isinstance(solver, LancBiO) and not solver.safeguard:
        solve(solver, A, b)  # 0/0 at a start is the published method's
        solve(solver, A, b)
        assert solve(solver, A, 0 * b).isfinite().all()
        return
    for right in (0 * b, 0 * b, b, b, 0 * b, b):
        found = solver.solve(Dense(A), right)
        assert found.x.isfinite().all()
        if not right.any():
            assert found.x.equal(0 * b)
            assert found.residual == 0
            assert not found.negative_curvature
    for _ in range(60):
        x = solve(solver, A, b)
    assert error(x, A, b) < 1e-5


@pytest.mark.parametrize(
    "make", [lambda: LancBiO(4), lambda: LancBiO(4, safeguard=False), lambda: SubBiO(0.3)]
)
def test_a_memory_of_another_size_is_dropped(make):
    solver = make()
    for _ in range(3):
        solve(solver, spd(8, 5.0), randn(8))
    A, b, new = spd(5, 5.0), randn(5), make()
    for _ in range(6):
        assert solve(solver, A, b).equal(solve(new, A, b))
    found = solve(solver, A.float(), b.float())
    assert found.dtype == torch.float32


def test_a_memory_of_the_other_kind_is_dropped():
    A, b = spd(8, 5.0), randn(8)
    for ours, theirs in ((True, False), (False, True)):
        first, second = LancBiO(4, safeguard=ours), LancBiO(4, safeguard=theirs)
        solve(first, A, b)
        second.load_state_dict(first.state_dict())
        assert solve(second, A, b).equal(solve(LancBiO(4, safeguard=theirs), A, b))
    with pytest.raises(ValueError, match="subspace_dim"):
        LancBiO(6).load_state_dict(first.state_dict())


@pytest.mark.parametrize(
    "make",
    [lambda: LancBiO(4), lambda: LancBiO(4, safeguard=False), lambda: SubBiO(0.1)],
)
@pytest.mark.parametrize("cut", range(0, 11, 2))
def test_a_run_cut_in_two_is_the_whole_run(cut: int, make):
    systems = list(islice(drifting(FLAT, 0.01, n=30), 13))
    systems[7] = (-systems[7][0], systems[7][1])  # with some trouble on the way
    whole, first = make(), make()
    for A, b in systems[:cut]:
        solve(whole, A, b)
        solve(first, A, b)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = make()
    second.load_state_dict(torch.load(file, weights_only=True))
    for A, b in systems[cut:]:
        assert solve(second, A, b).equal(solve(whole, A, b))


def test_the_answer_is_not_overwritten_by_later_solves():
    systems = drifting(FLAT, 0.01, n=30)
    for solver in (LancBiO(3), LancBiO(3, safeguard=False), SubBiO(0.1)):
        A, b = next(systems)
        x = solve(solver, A, b)
        kept = x.clone()
        for A, b in islice(systems, 7):
            solve(solver, A, b)
        assert x.equal(kept)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: LancBiO(0), "subspace_dim"),
        (lambda: LancBiO(2.5), "subspace_dim"),
        (lambda: LancBiO(damping=-1.0), "damping"),
        (lambda: LancBiO(damping=float("nan")), "damping"),
        (lambda: SubBiO(0.0), "step_size"),
        (lambda: SubBiO(-0.1), "step_size"),
        (lambda: SubBiO(float("inf")), "step_size"),
        (lambda: SubBiO(0.1, damping=-1.0), "damping"),
    ],
)
def test_invalid_settings(make, name: str):
    with pytest.raises(ValueError, match=f"Invalid {name}"):
        make()


# --- SubBiO -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_subbio_is_exact_on_a_plane(seed: int):
    A, b, solver = spd(2, 50.0, seed), randn(2, seed=seed), SubBiO(0.3)
    solve(solver, A, b)
    for _ in range(5):
        assert error(solve(solver, A, b), A, b) < 1e-12


def test_subbio_is_exact_where_the_solution_lies_in_the_plane():
    """b ∥ A⁻¹b, so the line of b is enough; then (I - ηA)x is parallel to b: the 1-D case."""
    A, solver = torch.diag(tensor(2.0, 3.0, 5.0)), SubBiO(0.1)
    b = tensor(0.0, 4.0, 0.0)
    for _ in range(3):
        assert error(solve(solver, A, b), A, b) < 1e-14


def test_subbio_is_the_galerkin_solution():
    solver, eta = SubBiO(0.05), 0.05
    last = None
    for A, b in islice(drifting(FLAT, 0.01, n=20), 10):
        x = solve(solver, A, b)
        columns = [b] if last is None else [b, last - eta * A @ last]
        Q = torch.linalg.qr(torch.stack(columns, 1))[0]
        torch.testing.assert_close(x, Q @ torch.linalg.solve(Q.mT @ A @ Q, Q.mT @ b))
        last = x


def test_subbio_converges_at_least_as_fast_as_gradient_descent():
    A, b = spd(20, 20.0), randn(20)
    exact = torch.linalg.solve(A, b)
    solver, descent, eta = SubBiO(1.0), torch.zeros_like(b), 1.0
    for step in range(200):
        x, descent = solve(solver, A, b), descent + eta * (b - A @ descent)
        ours, theirs = x - exact, descent - exact
        if step >= 1:
            assert ours @ A @ ours <= theirs @ A @ theirs + 1e-20
    assert error(x, A, b) < 1e-3
