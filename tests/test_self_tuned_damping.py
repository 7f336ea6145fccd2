"""RecycledCG() as shipped: a damping that follows the scale of the loss and what systems do."""

from __future__ import annotations

import pytest
import torch
from problems import spd
from test_recycled_cg import drifting, error
from torch import nn

from hyperopt_torch import (
    AutomaticCurvature,
    BilevelOptimizer,
    ConjugateGradient,
    DenseSolve,
    GaussNewton,
    Hessian,
    Identity,
    LancBiO,
    Neumann,
    Nystrom,
    NystromPCG,
    RecycledCG,
    RecycledPairs,
)
from hyperopt_torch.estimators._moving import Moving
from hyperopt_torch.ihvp._watchman import Watched
from hyperopt_torch.operators import Damped, Dense, InnerGradient, Shifted, Summed


@pytest.mark.parametrize("scale", [1e-8, 1e-3, 400.0])
def test_the_answer_does_not_depend_on_the_scale_of_the_loss(scale):
    """(sH) x = b has the solution x/s, and Jᵀ is scaled as well: the same hypergradient."""
    J = torch.randn(80, 5, dtype=torch.float64)
    one, other = RecycledCG(), RecycledCG()
    for H, b in drifting(15, 1e-3):
        expected = one.solve(Dense(H, J), b).cross
        torch.testing.assert_close(other.solve(Dense(scale * H, scale * J), b).cross, expected)


RELATIVE = [
    lambda: ConjugateGradient(15, tol=1e-10, damping="auto"),
    lambda: ConjugateGradient(4, damping="auto", preconditioner=RecycledPairs(8)),
    lambda: NystromPCG(8, damping="auto"),
    lambda: Neumann(20, damping="auto"),
    lambda: LancBiO(5, damping="auto"),
    lambda: DenseSolve("auto"),
    lambda: Nystrom(8),
    lambda: Nystrom(8, sketch="gaussian", chunk_size=3),
    lambda: Identity(),
]


@pytest.mark.parametrize("scale", [1e-6, 1e4])
@pytest.mark.parametrize("make", RELATIVE, ids=lambda make: str(make()).split(", generator")[0])
def test_relative_damping_follows_the_scale_of_the_loss_everywhere(make, scale):
    one, other = make(), make()
    for H, b in drifting(4, 1e-3):
        expected, found = one.solution(Dense(H), b), other.solution(Dense(scale * H), b)
        torch.testing.assert_close(scale * found.x, expected.x, rtol=1e-4, atol=1e-7)
    if expected.damping is not None:
        assert 0 < float(expected.damping) < 0.02 * float(torch.linalg.matrix_norm(H, 2))
        assert float(found.damping) == pytest.approx(scale * float(expected.damping), rel=1e-6)


@pytest.mark.parametrize("make", RELATIVE[:1] + RELATIVE[2:3])
def test_relative_damping_rises_at_negative_curvature_and_comes_back(make):
    H, b = spd(30, 100.0), torch.randn(30, dtype=torch.float64)
    solver, lam = make(), torch.linalg.eigvalsh(H)
    before = float(solver.solution(Dense(H), b).damping)
    shifted = H - 2 * lam[0] * torch.eye(30, dtype=H.dtype)
    for _ in range(4):
        solver.solution(Dense(shifted), b)
    assert float(solver.solution(Dense(shifted), b).damping) > 2 * before
    for _ in range(60):
        after = float(solver.solution(Dense(H), b).damping)
    assert after == pytest.approx(before, rel=0.05)


def test_a_system_that_holds_still_is_solved_undamped():
    H, b, solver = spd(80, 100.0), torch.randn(80, dtype=torch.float64), RecycledCG(20)
    rho = [solver.solve(Dense(H), b).damping for _ in range(60)]
    assert rho[-1] < 1e-8 < rho[0]
    assert error(solver.state["x"], H, b) < 1e-5


def test_a_right_hand_side_that_jumps_is_no_reason_to_damp():
    H, solver, undamped = spd(40, 1e3), RecycledCG(40), RecycledCG(40, damping=0.0)
    errors = []
    for _ in range(40):
        b = torch.randn(40, dtype=torch.float64)
        found = solver.solve(Dense(H), b)
        errors.append((error(found.x, H, b), error(undamped.solve(Dense(H), b).x, H, b)))
    assert found.damping < 1e-8
    mine, theirs = torch.tensor(errors[20:]).median(0).values
    assert mine < 1.1 * theirs


def batches(steps, n=60, rows=40, size=20, seed=0):
    """H of ``size`` random samples, and of all ``rows`` of them."""
    g = torch.Generator().manual_seed(seed)
    R = torch.randn(rows, n, dtype=torch.float64, generator=g)
    whole = R.mT @ R / rows
    b = R.mT @ torch.randn(rows, dtype=torch.float64, generator=g) / rows
    for _ in range(steps):
        chosen = R[torch.randperm(rows, generator=g)[:size]]
        yield chosen.mT @ chosen / size, whole, b


@pytest.mark.parametrize("seed", range(3))
def test_on_mini_batches_it_damps_and_averages(seed):
    """Closer to the solution with all samples than a solve of one batch, at the same damping."""
    solver, mine, theirs = RecycledCG(), [], []
    for H, whole, b in batches(40, seed=seed):
        found = solver.solve(Dense(H), b)
        rho = found.damping
        one = torch.linalg.solve(H + rho * torch.eye(len(b), dtype=b.dtype), b)
        mine.append(error(found.x, whole, b, rho))
        theirs.append(error(one, whole, b, rho))
    assert found.damping > 1e-3
    assert sorted(mine[10:])[15] < 0.7 * sorted(theirs[10:])[15]


@pytest.mark.parametrize("seed", range(4))
def test_indefinite_systems_are_damped_until_they_are_solved(seed):
    g = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(100, 100, generator=g))[0]
    spectrum = torch.cat([-0.05 * torch.rand(10, generator=g), torch.logspace(-2, 0, 90)])
    E, b, solver = torch.randn(100, 100, generator=g), torch.randn(100, generator=g), RecycledCG()
    residuals, lengths = [], []
    for step in range(40):
        H = (Q * spectrum) @ Q.mT + step * 1e-4 * (E + E.mT)
        found = solver.solve(Dense(H), b)
        residuals.append(float(found.residual))
        lengths.append(float(found.x.norm()) / float(torch.linalg.solve(H + 0.1, b).norm()))
    found = sorted(residuals[5:])
    assert found[17] < 0.3
    assert found[-3] < 1  # a new negative eigenvalue shows at the solve that meets it, not before
    assert sorted(lengths[5:])[-3] < 3


class Approximate(Dense):
    """A matrix that stands for another one."""

    approximate = True

    def __init__(self, matrix, whole):
        super().__init__(matrix)
        self.whole = whole

    def _exact(self, x):
        return self.whole @ x


@pytest.mark.parametrize("left_out", [0.0, 1e-3, 1e-2])
def test_what_an_approximate_curvature_leaves_out_is_the_least_damping(left_out):
    H, b, solver = spd(30, 1e3), torch.randn(30, dtype=torch.float64), RecycledCG()
    for _ in range(50):
        operator = Approximate(H, H + left_out * torch.eye(30, dtype=H.dtype))
        found = solver.solve(operator, b)
    assert operator.matvecs <= 3
    if left_out:
        assert 0.9 < found.damping / (left_out / 3) < 1.1
    else:
        assert found.damping < 1e-8


def test_exact_products_of_gauss_newton_are_those_of_the_hessian():
    """Through everything that wraps an operator."""
    f, x = gradient(), torch.tensor([0.3, -0.7])
    G, H = GaussNewton().operator(f), Hessian().operator(f)
    assert G.approximate
    assert not H.approximate
    torch.testing.assert_close(G.exact(x), H @ x)
    torch.testing.assert_close(H.exact(x), H @ x)
    assert G.matvecs == 1
    d, m = torch.tensor([0.1, 0.2]), torch.tensor([1.0, 0.0])
    for wrap in (
        lambda A: Damped(A, 0.5),
        lambda A: Shifted(A, d),
        lambda A: Moving(A, m),
        lambda A: Watched(A, x),
        lambda A: Summed([(0.5, lambda: A), (2.0, lambda: A)]),
    ):
        assert wrap(G).approximate
        torch.testing.assert_close(wrap(G).exact(x), wrap(H) @ x)


def test_the_report_tells_the_damping_and_does_not_call_it_trouble():
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 1), torch.randn(20, 3), torch.randn(20, 1)
    phi = torch.zeros(20, requires_grad=True)
    bo = BilevelOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.SGD([phi], lr=0.1)
    )
    bo.inner_step(lambda: (phi.exp() * (model(x) - y).square()[:, 0]).mean())
    bo.outer_step((model(x) - y).abs().mean())
    known = bo.report.as_dict()
    assert known["self_tuned"]
    assert known["damping"] > 0
    assert "damping" not in {kind for kind, _ in bo.report.troubles()}


def test_the_memory_goes_on_after_loading():
    first, second = RecycledCG(), RecycledCG()
    systems = list(drifting(12, 1e-3))
    for H, b in systems[:6]:
        first.solve(Dense(H), b)
    second.load_state_dict(first.state_dict())
    for H, b in systems[6:]:
        one, other = first.solve(Dense(H), b), second.solve(Dense(H), b)
        assert one.damping == other.damping
        torch.testing.assert_close(one.x, other.x, rtol=0, atol=0)


@pytest.mark.parametrize("when", [0, 3])
def test_a_zero_right_hand_side_says_nothing(when):
    solver = RecycledCG()
    for t, (H, b) in enumerate(drifting(6, 1e-3)):
        if t == when:
            before, delta = dict(solver.state), solver._tuned.state["delta"]
            assert not solver.solve(Dense(H), torch.zeros_like(b)).x.any()
            assert solver.state.keys() == before.keys()
            assert all(solver.state[name] is before[name] for name in before)
            assert solver._tuned.state["delta"] == delta
        found = solver.solve(Dense(H), b)
        assert t or found.residual <= 0.03


def test_a_new_problem_keeps_the_pairs_and_drops_the_solution():
    solver = RecycledCG()
    for H, b in drifting(5, 1e-3):
        solver.solve(Dense(H), b)
    solver.begin()
    assert not solver.state
    assert solver.pairs.state["count"]
    b = torch.randn(80, dtype=torch.float64)
    assert solver.solve(Dense(H), b).residual <= 0.1


@pytest.mark.parametrize("damping", ["automatic", -1.0, None, float("nan")])
def test_damping_is_checked(damping):
    with pytest.raises(ValueError, match="Invalid damping"):
        RecycledCG(damping=damping)


def gradient(outputs=True, linear=False):
    w = torch.tensor([2.0, -1.0], requires_grad=True)
    o = w**3
    loss = o.sum() if linear else ((o - 5) ** 2).sum()
    return InnerGradient(loss, [w], [], o if outputs else None)


def test_automatic_curvature_is_gauss_newton_where_there_are_outputs():
    found = AutomaticCurvature().operator(gradient()).dense()
    torch.testing.assert_close(found, GaussNewton().operator(gradient()).dense())


@pytest.mark.parametrize("settings", [{"outputs": False}, {"linear": True}])
def test_automatic_curvature_is_the_hessian_elsewhere(settings):
    found = AutomaticCurvature().operator(gradient(**settings)).dense()
    torch.testing.assert_close(found, Hessian().operator(gradient(**settings)).dense())


def test_the_default_takes_it_and_a_chosen_strategy_does_not():
    def curvature(**settings):
        w, phi = (torch.zeros(2, requires_grad=True) for _ in range(2))
        sgd = [torch.optim.SGD([t], lr=0.1) for t in (w, phi)]
        return BilevelOptimizer(*sgd, **settings).estimator.curvature

    assert isinstance(curvature(), AutomaticCurvature)
    assert isinstance(curvature(ihvp=RecycledCG()), Hessian)
    assert isinstance(curvature(curvature=GaussNewton()), GaussNewton)
