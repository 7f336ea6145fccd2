"""NHGD: every structure inverts the Fisher matrix of the rows it was shown, and those are right."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import oracles
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam

from hyperopt_torch import BilevelOptimizer, ConjugateGradient, Identity
from hyperopt_torch.ihvp.base import InnerStep
from hyperopt_torch.ihvp.nhgd import NHGD, STRUCTURES
from hyperopt_torch.operators import Dense
from hyperopt_torch.recording import PerSample

N = 12
EYE = torch.eye(N, dtype=torch.float64)


def steps(count: int, n: int = N, seed: int = 0, dtype=torch.float64) -> Tensor:
    """Gradients whose scale differs by entry, as those of a network."""
    g = torch.Generator().manual_seed(seed)
    scale = torch.logspace(0, -1.5, n, dtype=torch.float64)
    return (torch.randn(count, n, dtype=torch.float64, generator=g) * scale).to(dtype)


def shown(nhgd: NHGD, gradients: Tensor, batch_size: int | None = 1) -> NHGD:
    for gradient in gradients:
        nhgd.observe(InnerStep(gradient, batch_size=batch_size))
    return nhgd


def many(rows: Tensor, wanted: Sequence[int]) -> InnerStep:
    """A step whose per-sample gradients are these."""
    return InnerStep(rows[0], batch_size=len(rows), chosen=wanted, chosen_rows=rows)


def fisher(rows: Tensor, decay: float = 1.0) -> Tensor:
    """Σ ω s sᵀ with ω ∝ decay^age, the slow way."""
    ages = torch.arange(len(rows) - 1, -1, -1, dtype=torch.float64)
    weights = decay**ages
    return torch.einsum("i,ij,ik->jk", weights / weights.sum(), rows, rows)


def ask(nhgd: NHGD, rhs: Tensor) -> Tensor:
    """x alone; the matrix of the closing product plays no role in it."""
    return nhgd.solve(Dense(torch.eye(len(rhs), dtype=rhs.dtype)), rhs).x


def assert_inverts(nhgd: NHGD, matrix: Tensor) -> None:
    """x = (matrix + ρI)⁻¹b with the ρ that was used, and ρ as documented."""
    for seed in range(3):
        b = steps(1, len(matrix), 100 + seed)[0]
        x = ask(nhgd, b)
        rho = float(nhgd.damping_used)
        exact = torch.linalg.solve(matrix + rho * torch.eye(len(matrix)).to(matrix), b)
        assert (x - exact).norm() <= 1e-10 * exact.norm()
    rule = max(nhgd.damping * float(matrix.diagonal().mean()), nhgd.min_damping)
    if nhgd.structure == "dense":  # carried along with the recursion
        assert 0.7 * rule < rho < 4 * rule
    else:
        assert rho == pytest.approx(rule, rel=1e-10)


# --- the inverse is that of the Fisher matrix -----------------------------------------------------


@pytest.mark.parametrize("decay", [1.0, 0.9])
@pytest.mark.parametrize("count", [1, 5, 12, 40])
def test_window(count, decay):
    rows = steps(count)
    assert_inverts(shown(NHGD(40, decay=decay), rows), fisher(rows, decay))


@pytest.mark.parametrize("decay", [1.0, 0.9])
@pytest.mark.parametrize("count", [1, 2, 5, 40])
def test_dense(count, decay):
    rows = steps(count)
    assert_inverts(shown(NHGD(structure="dense", decay=decay), rows), fisher(rows, decay))


@pytest.mark.parametrize("decay", [1.0, 0.9])
@pytest.mark.parametrize("count", [1, 5, 40])
def test_diagonal(count, decay):
    rows = steps(count)
    diagonal = torch.diag(fisher(rows, decay).diagonal())
    assert_inverts(shown(NHGD(structure="diagonal", decay=decay), rows), diagonal)


@pytest.mark.parametrize("damping", [0.0, 1e-3, 1.0])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_damping_is_relative_to_the_size_of_the_fisher_matrix(structure, damping):
    """(F + ρI)⁻¹ scales as F⁻¹, down to the floor; and the floor is absolute."""
    rows, b = steps(30), steps(1, seed=1)[0]
    nhgd = lambda: NHGD(structure=structure, damping=damping, min_damping=1e-9)  # noqa: E731
    x = ask(shown(nhgd(), rows), b)
    if damping:
        torch.testing.assert_close(ask(shown(nhgd(), 100 * rows), b), x / 1e4, rtol=1e-9, atol=0)
    floored = shown(NHGD(structure=structure, damping=damping, min_damping=7.0), rows)
    ask(floored, b)
    assert 7.0 <= floored.damping_used <= 14.0
    assert structure == "dense" or floored.damping_used == 7.0


@pytest.mark.parametrize("between", [1, 3, 7, 50])
@pytest.mark.parametrize("decay", [1.0, 0.8])
def test_ring_buffer(decay, between):
    """Solves in between, at any distance, see the last rows and nothing else."""
    nhgd, rows = NHGD(8, decay=decay), steps(100)
    for start in range(0, 100, between):
        shown(nhgd, rows[start : start + between])
        stop = min(start + between, 100)
        assert_inverts(nhgd, fisher(rows[max(0, stop - 8) : stop], decay))
    assert nhgd.state["rows"].shape == (8, N)


def test_ring_buffer_with_several_rows_a_step():
    """Three rows a step into eight slots: the age is that of the step."""
    nhgd, rows = NHGD(8, rows="per_sample", samples=3, decay=0.7), steps(30)
    for chosen in rows.split(3):
        wanted = nhgd.samples_wanted(3)
        nhgd.observe(many(chosen, wanted))
    ages = torch.tensor([2, 2, 1, 1, 1, 0, 0, 0], dtype=torch.float64)
    weights = 0.7**ages / (0.7**ages).sum()
    assert_inverts(nhgd, torch.einsum("i,ij,ik->jk", weights, rows[-8:], rows[-8:]))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_several_rows_a_step_weigh_the_same(structure):
    rows = steps(30)
    nhgd = NHGD(structure=structure, rows="per_sample", samples=4)
    for chosen in rows.split(4):  # the last step has two
        wanted = nhgd.samples_wanted(len(chosen))
        nhgd.observe(many(chosen, wanted))
    matrix = fisher(rows)
    assert_inverts(nhgd, torch.diag(matrix.diagonal()) if structure == "diagonal" else matrix)


@pytest.mark.parametrize("decay", [1.0, 0.999, 0.9, 0.3])
def test_dense_recursion_over_five_thousand_steps(decay):
    """Two directions are never excited: a plain recursion would blow up there as decay^-t."""
    rows = steps(5000)
    rows[:, -2:] = 0
    nhgd = NHGD(structure="dense", decay=decay)
    worst = 0.0
    for start in range(0, 5000, 500):
        shown(nhgd, rows[start : start + 500])
        b = steps(1, seed=start)[0]
        x = ask(nhgd, b)
        matrix = fisher(rows[: start + 500], decay) + nhgd.damping_used * EYE
        exact = torch.linalg.solve(matrix, b)
        worst = max(worst, float((x - exact).norm() / exact.norm()))
    assert worst < 1e-9
    assert_inverts(nhgd, fisher(rows, decay))
    A = nhgd.state["inverse"]
    torch.testing.assert_close(A, A.mT, rtol=1e-12, atol=1e-12 * float(A.abs().max()))


def test_dense_refuses_many_parameters():
    with pytest.raises(ValueError, match='structure="window"'):
        shown(NHGD(structure="dense"), torch.ones(1, 5000))


def test_float32_rows():
    """The m×m algebra is float64, so F's rounding is all that is left of the dtype."""
    rows, b = steps(64, 2000, dtype=torch.float32), steps(1, 2000, 1, dtype=torch.float32)[0]
    narrow, wide = shown(NHGD(64), rows), shown(NHGD(64), rows.double())
    x, exact = ask(narrow, b).double(), ask(wide, b.double())
    assert (x - exact).norm() < 1e-5 * exact.norm()
    assert narrow.state["rows"].dtype == torch.float32
    assert narrow.state["gram"].dtype == torch.float64


# --- the solution and its report ------------------------------------------------------------------


def test_residual_and_product():
    rows, b = steps(30), steps(1, seed=1)[0]
    H, J = fisher(steps(50, seed=2)), steps(N, 3, seed=3)
    nhgd, operator = shown(NHGD(), rows), Dense(H, J)
    found = nhgd.solve(operator, b)
    assert operator.matvecs == 1
    r = b - H @ found.x - nhgd.damping_used * found.x
    torch.testing.assert_close(found.residual, r.norm() / b.norm())
    torch.testing.assert_close(found.cross, J.mT @ found.x)
    assert found.rank == N
    assert not found.negative_curvature
    assert found.notes == ()


def test_rescale_gives_the_best_multiple():
    """Rows that are three times too short make x nine times too long; one product undoes it."""
    rows, b, J = steps(200), steps(1, seed=1)[0], steps(N, 3, seed=3)
    operator = Dense(fisher(rows), J)
    plain = shown(NHGD(200), rows / 3).solve(operator, b)
    nhgd = shown(NHGD(200, rescale=True), rows / 3)
    found = nhgd.solve(operator, b)
    torch.testing.assert_close(found.x / found.x.norm(), plain.x / plain.x.norm())
    A = operator.matrix + nhgd.damping_used * EYE
    exact = torch.linalg.solve(A, b)
    torch.testing.assert_close(found.x @ A @ found.x, found.x @ b)  # stationary in its scale
    assert (found.x - exact).norm() < 0.1 * exact.norm()
    assert (plain.x - exact).norm() > exact.norm()
    torch.testing.assert_close(found.cross, J.mT @ found.x)
    r = b - A @ found.x
    torch.testing.assert_close(found.residual, r.norm() / b.norm(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("rescale", [False, True])
def test_negative_curvature_is_flagged_and_not_divided_by(rescale):
    nhgd = shown(NHGD(rescale=rescale), steps(30))
    b = steps(1, seed=1)[0]
    found = nhgd.solve(Dense(-100 * EYE), b)
    assert found.negative_curvature
    torch.testing.assert_close(found.x, ask(shown(NHGD(), steps(30)), b))


def test_zero_right_hand_side():
    zero = torch.zeros(N, dtype=torch.float64)
    for rescale in (False, True):
        found = shown(NHGD(rescale=rescale), steps(30)).solve(Dense(EYE), zero)
        assert torch.equal(found.x, zero)
        assert found.residual == 0
        assert not found.negative_curvature


@pytest.mark.parametrize("structure", STRUCTURES)
def test_rows_that_are_not_finite_are_left_out(structure):
    rows, b = steps(20), steps(1, seed=1)[0]
    bad = rows.clone()
    clean = shown(NHGD(structure=structure), torch.cat([rows[:8], rows[10:]]))
    bad[8], bad[9, 3] = math.nan, math.inf
    nhgd = shown(NHGD(structure=structure), bad[:9])
    assert ask(nhgd, b).isfinite().all()
    shown(nhgd, bad[9:])
    if structure == "dense":  # ρ is a matter of the calendar there
        assert_inverts(nhgd, fisher(torch.cat([rows[:8], rows[10:]])))
    else:
        torch.testing.assert_close(ask(nhgd, b), ask(clean, b), rtol=1e-10, atol=0)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_nothing_finite_yet(structure):
    """The first steps of a GradScaler: no curvature is known, so x = b, and rank 0 says so."""
    nhgd = shown(NHGD(structure=structure), torch.full((3, N), math.inf, dtype=torch.float64))
    b = steps(1)[0]
    found = nhgd.solve(Dense(EYE), b)
    torch.testing.assert_close(found.x, b)
    assert structure != "window" or found.rank == 0
    rows = steps(20, seed=2)  # and it recovers
    shown(nhgd, rows)
    if structure == "window":
        assert_inverts(nhgd, fisher(rows))
    else:
        assert 0 < ask(nhgd, b).norm() < 1e6


@pytest.mark.parametrize("structure", STRUCTURES)
def test_nan_in_the_right_hand_side_stays(structure):
    b = torch.full((N,), math.nan, dtype=torch.float64)
    assert ask(shown(NHGD(structure=structure), steps(5)), b).isnan().all()


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("kappa", [0.0, 0.3, -0.3])
def test_curvature_of_the_penalty(structure, kappa):
    """κI is part of what is inverted and no part of ρ; a negative one counts as zero."""
    rows, b = steps(40), steps(1, seed=1)[0]
    nhgd = NHGD(structure=structure)
    for row in rows:
        nhgd.observe(InnerStep(row, batch_size=1))
    nhgd.observe_penalty(torch.tensor(kappa, dtype=torch.float64))
    x, matrix = ask(nhgd, b), fisher(rows)
    matrix = torch.diag(matrix.diagonal()) if structure == "diagonal" else matrix
    rho, kappa = float(nhgd.damping_used), max(kappa, 0.0)
    exact = torch.linalg.solve(matrix + (kappa + rho) * EYE, b)
    assert (x - exact).norm() <= 1e-10 * exact.norm()
    rule = 1e-3 * float(matrix.diagonal().mean())
    assert 0.7 * rule < rho < 4 * rule
    found = nhgd.prepare(Dense(EYE), 0.5)(b)
    exact = torch.linalg.solve(matrix + (kappa + 0.5) * EYE, b)
    assert (found - exact).norm() <= 1e-10 * exact.norm()


# --- as a preconditioner --------------------------------------------------------------------------


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("damping", [0.0, 1e-6, 10.0])
def test_preconditioner(structure, damping):
    """r -> (F + max(damping, ρ)I)⁻¹ r: symmetric, positive definite, without a product."""
    rows, operator = steps(6), Dense(EYE)
    nhgd = shown(NHGD(structure=structure), rows)
    apply = nhgd.prepare(operator, damping)
    P_inv = torch.stack([apply(e) for e in EYE])
    assert operator.matvecs == 0
    torch.testing.assert_close(P_inv, P_inv.mT, rtol=1e-9, atol=1e-9)
    matrix = fisher(rows)
    matrix = torch.diag(matrix.diagonal()) if structure == "diagonal" else matrix
    ask(nhgd, rows[0])
    rho = max(damping, float(nhgd.damping_used))
    exact = torch.linalg.inv(matrix + rho * EYE)
    assert torch.linalg.eigvalsh(P_inv).min() > 0
    torch.testing.assert_close(P_inv, exact, rtol=1e-8, atol=1e-8 * float(exact.abs().max()))


def test_preconditioner_before_the_first_step():
    b = steps(1)[0]
    assert torch.equal(NHGD().prepare(Dense(EYE), 0.1)(b), b)


@pytest.mark.parametrize("observer", ["window", "dense", "kronecker", "diagonal", "per-sample"])
def test_inside_conjugate_gradients(observer):
    """Fed by the inner steps through the strategy that holds it; reset and saved with it."""

    def make() -> ConjugateGradient:
        nhgd = OBSERVERS[observer]()
        return ConjugateGradient(60, tol=1e-12, damping=1.0, preconditioner=nhgd)

    rig, fresh = Rig(make(), inner=lambda p: SGD(p, lr=0.01)), make()
    for _ in range(4):
        rig.bo.inner_step(rig.train)
    cg = rig.bo.estimator.ihvp
    assert cg.preconditioner.state["steps"] == 4
    found = oracles.flat(rig.bo.hypergradient(rig.val()))
    rig.form = "scalar"
    expected = oracles.hypergradient(
        rig.train, rig.val, rig.parameters, [rig.phi, rig.decay], damping=1.0
    )
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
    fresh.load_state_dict(cg.state_dict())
    assert str(fresh.state_dict()) == str(cg.state_dict())
    rig.bo.reset()
    assert cg.preconditioner.state == cg.preconditioner.initial_state()


def test_two_observers_are_shown_their_own_samples():
    """What is wanted is taken together, once, and each finds its own rows in it."""

    class Both(Identity):
        def __init__(self, *parts: NHGD) -> None:
            super().__init__()
            self.first, self.second = parts

    def one(samples: int) -> NHGD:
        return NHGD(rows="per_sample", samples=samples)

    together = Rig(Both(one(2), one(3)))
    assert together.bo.estimator.ihvp.samples_wanted(10) == [0, 5, 3, 6]
    together.bo.inner_step(together.train)
    for part, samples in (
        (together.bo.estimator.ihvp.first, 2),
        (together.bo.estimator.ihvp.second, 3),
    ):
        alone = Rig(one(samples))
        alone.bo.inner_step(alone.train)
        torch.testing.assert_close(part.state["rows"], alone.bo.estimator.ihvp.state["rows"])


# --- what an inner step shows ---------------------------------------------------------------------


class Rig:
    """Weighted samples and a weight decay over a small classifier; records what was shown."""

    def __init__(self, nhgd=None, form="parts", inner=None, dtype=torch.float64, **kwargs) -> None:
        torch.manual_seed(0)
        self.model = self.make_model().to(dtype)
        self.x, self.y = torch.randn(10, 4, dtype=dtype), torch.randint(3, (10,))
        self.phi = torch.linspace(-1, 1, 10, dtype=dtype).requires_grad_()
        self.decay = torch.tensor(-2.0, dtype=dtype, requires_grad=True)
        self.form = form
        self.inner = (inner or (lambda p: SGD(p, lr=0.1, momentum=0.9)))(self.model.parameters())
        self.bo = BilevelOptimizer(
            self.inner, Adam([self.phi, self.decay], lr=0.01), nhgd or Identity(), **kwargs
        )

    def make_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))

    @property
    def parameters(self) -> list[Tensor]:
        return list(self.model.parameters())

    def penalty(self) -> Tensor:
        return self.decay.exp() / 2 * sum(p.square().sum() for p in self.model.parameters())

    def outputs(self) -> Tensor:
        return self.model(self.x)

    def train(self):
        outputs = self.outputs()
        losses = F.cross_entropy(outputs.to(self.phi.dtype), self.y, reduction="none")
        weights = self.phi.exp()
        return {
            "parts": lambda: PerSample(losses, weights, self.penalty()),
            "parts and outputs": lambda: (PerSample(losses, weights, self.penalty()), outputs),
            "parts without weights": lambda: PerSample(losses, penalty=self.penalty()),
            "losses alone": lambda: PerSample(losses),
            "losses": lambda: weights * losses,
            "outputs": lambda: ((weights * losses).mean() + self.penalty(), outputs),
            "scalar": lambda: (weights * losses).mean() + self.penalty(),
        }[self.form]()

    def val(self) -> Tensor:
        outputs = self.model(self.x[:5])
        return F.cross_entropy(outputs.to(self.phi.dtype), self.y[:5])

    def run(self, count: int = 3, inner: int = 2) -> Rig:
        for _ in range(count):
            for _ in range(inner):
                self.bo.inner_step(self.train)
            self.bo.outer_step(self.val())
        return self

    def by_hand(self, *, weighted: bool = True) -> tuple[Tensor, Tensor]:
        """(B, n) ∇ℓ_i, one backward pass at a time, and (B,) weights."""
        losses = F.cross_entropy(self.outputs(), self.y, reduction="none")
        rows = [
            oracles.flat(torch.autograd.grad(loss, self.parameters, retain_graph=True))
            for loss in losses
        ]
        return torch.stack(rows), self.phi.detach().exp() if weighted else torch.ones(10).double()


@pytest.mark.parametrize(
    ("form", "root"),
    [("parts", True), ("parts and outputs", True), ("losses alone", None), ("losses", False)],
)
@pytest.mark.parametrize("samples", [1, 3, 10, 99])
def test_per_sample_rows(form: str, root: bool | None, samples: int):
    """√w_i ∇ℓ_i without the penalty; weights that are hidden in the losses act as w_i ∇ℓ_i."""
    nhgd = NHGD(rows="per_sample", samples=samples)
    rig = Rig(nhgd, form)
    gradients, weights = rig.by_hand()
    factor = {True: weights.sqrt(), False: weights, None: torch.ones_like(weights)}[root]
    chosen = nhgd.samples_wanted(10)
    assert len(set(chosen)) == len(chosen) == min(samples, 10)
    rig.bo.inner_step(rig.train)
    expected = (factor[:, None] * gradients)[chosen]
    found = nhgd.state["rows"][: len(chosen)]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_negative_weights_count_as_zero():
    rig = Rig(NHGD(rows="per_sample", samples=10))
    rig.bo.inner_step(lambda: PerSample(rig.train().losses, rig.phi))
    rows = rig.bo.estimator.ihvp.state["rows"][:10]
    assert torch.equal(rows.norm(dim=1) > 0, rig.phi > 0)


def test_samples_are_spread_and_all_are_seen():
    nhgd, seen = NHGD(rows="per_sample", samples=4), []
    for step in range(5):
        nhgd.state["steps"] = step
        chosen = nhgd.samples_wanted(20)
        assert chosen == [step, 5 + step, 10 + step, 15 + step]
        seen += chosen
    assert sorted(seen) == list(range(20))
    for batch in range(1, 40):
        seen = []
        for step in range(batch):
            nhgd.state["steps"] = step
            chosen = nhgd.samples_wanted(batch)
            assert len(set(chosen)) == len(chosen)
            seen += chosen
        assert set(seen) == set(range(batch))


@pytest.mark.parametrize("per_step", [5, 10])
def test_a_fixed_batch_gives_its_fisher_matrix(per_step):
    rig = Rig(NHGD(10, rows="per_sample", samples=per_step), inner=lambda p: SGD(p, lr=0.0))
    for _ in range(10 // per_step):
        rig.bo.inner_step(rig.train)
    gradients, weights = rig.by_hand()
    assert_inverts(rig.bo.estimator.ihvp, fisher(weights.sqrt()[:, None] * gradients))


@pytest.mark.parametrize("form", ["parts", "parts without weights", "losses", "outputs", "scalar"])
def test_batch_rows(form: str):
    """√B times the mean gradient, and of a weighted one times Σw / Σw²: F goes with w, not w²."""
    nhgd = NHGD()
    rig = Rig(nhgd, form)
    gradients, weights = rig.by_hand(weighted=form != "parts without weights")
    data = (weights[:, None] * gradients).mean(0)
    decay = rig.decay.detach().exp() * oracles.flat(rig.parameters).detach()
    expected = {
        "parts": math.sqrt(10) * (data + decay) * (weights.sum() / weights.square().sum()).sqrt(),
        "parts without weights": math.sqrt(10) * (data + decay),
        "losses": math.sqrt(10) * data,
        "outputs": math.sqrt(10) * (data + decay),
        "scalar": data + decay,  # B is not known
    }[form]
    rig.bo.inner_step(rig.train)
    torch.testing.assert_close(nhgd.state["rows"][0], expected, rtol=1e-10, atol=1e-12)


PENALTIES = {
    "weight decay": (lambda r, p: 0.3 / 2 * sum(q.square().sum() for q in p), 0.3),
    "of some tensors": (lambda r, p: p[0].square().sum() + p[1].sum(), 2 * 12 / 27),
    "per parameter": (lambda r, p: sum((r.phi[:3] * q.square()).sum() for q in p), None),
    "linear": (lambda r, p: sum(q.sum() for q in p), 0.0),
    "quartic": (lambda r, p: sum((q - 1).pow(4).sum() for q in p), None),
    "of the outer level": (lambda r, p: r.phi.square().sum(), 0.0),
}


@pytest.mark.parametrize("name", PENALTIES)
def test_mean_curvature_of_a_penalty(name: str):
    """The trace of its Hessian over n, where that is diagonal."""
    penalty, expected = PENALTIES[name]
    rig = Rig(NHGD())
    rig.model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    rig.bo.inner.param_groups[0]["params"] = parameters = rig.parameters
    if name == "per parameter":
        parameters[:] = [p for p in parameters if p.shape[-1] == 3]
        rig.bo.inner.param_groups[0]["params"] = parameters
    rig.inner.param_groups[0]["lr"] = 0.0
    if expected is None:
        H, _ = oracles.jacobians(lambda: penalty(rig, parameters), parameters, [rig.phi])
        expected = float(H.diagonal().mean())
    rig.bo.inner_step(lambda: rig.train()._replace(penalty=penalty(rig, parameters)))
    rig.bo.outer_step(rig.val())
    assert rig.bo.estimator.ihvp.state["penalty"] == pytest.approx(max(expected, 0.0))


def test_centred_rows():
    """By hand: a running mean of about ten steps is taken off, but for the first row."""
    gradients = steps(30) + 5.0
    nhgd = shown(NHGD(30, rows="batch_centred"), gradients, batch_size=4)
    mean, rows = torch.zeros(N, dtype=torch.float64), []
    for t, gradient in enumerate(gradients):
        rows.append(2 * (gradient - mean))
        mean = mean + max(1 / (t + 1), 0.1) * (gradient - mean)
    assert_inverts(nhgd, fisher(torch.stack(rows)))
    assert fisher(torch.stack(rows[1:])).norm() < 0.2 * fisher(2 * gradients).norm()


def test_overflow_does_not_spoil_the_mean():
    rows = steps(20)
    rows[4] = math.inf
    rows[5, 3] = math.nan
    nhgd = shown(NHGD(rows="batch_centred"), rows)
    assert nhgd.state["mean"].isfinite().all()
    assert ask(nhgd, steps(1)[0]).isfinite().all()


def test_equal_weights_scale_the_fisher_matrix_as_they_scale_the_hessian():
    rows = []
    for weight in (1.0, 0.25):
        rig = Rig(NHGD(), inner=lambda p: SGD(p, lr=0.0))
        rig.phi.data.fill_(math.log(weight))
        rig.bo.inner_step(lambda rig=rig: rig.train()._replace(penalty=None))
        rows.append(rig.bo.estimator.ihvp.state["rows"][0])
    torch.testing.assert_close(rows[1], rows[0] / 2)


def test_unknown_batch_size_is_noted_and_can_be_given():
    silent = Rig(NHGD(), "scalar").run(1)
    assert "pass batch_size" in silent.bo.report.notes[0]
    for rig in (Rig(NHGD(batch_size=10), "scalar").run(1), Rig(NHGD(), "outputs").run(1)):
        assert rig.bo.report.notes == ()
    given = Rig(NHGD(batch_size=40), "scalar")
    given.bo.inner_step(given.train)
    plain = Rig(NHGD(), "scalar")
    plain.bo.inner_step(plain.train)
    ratio = given.bo.estimator.ihvp.state["rows"][0] / plain.bo.estimator.ihvp.state["rows"][0]
    torch.testing.assert_close(ratio, torch.full_like(ratio, math.sqrt(40)))


@pytest.mark.parametrize("form", ["scalar", "outputs"])
def test_per_sample_rows_need_per_sample_losses(form: str):
    rig = Rig(NHGD(rows="per_sample"), form)
    before = [p.detach().clone() for p in rig.parameters]
    with pytest.raises(RuntimeError, match=r'PerSample.*choose rows="batch"'):
        rig.bo.inner_step(rig.train)
    assert all(map(torch.equal, before, rig.parameters))


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("query", ["outer_step", "accumulate", "hypergradient"])
def test_no_observation_yet(structure: str, query: str):
    rig = Rig(NHGD(structure=structure))
    with pytest.raises(RuntimeError, match="call inner_step"):
        getattr(rig.bo, query)(rig.val(), rig.train)
    rig.run(1)
    assert rig.phi.grad.norm() > 0


def test_the_hypergradient_is_that_of_the_fisher_matrix():
    """c - Jᵀ(F + ρI)⁻¹b, all by hand."""
    rig = Rig(NHGD(rows="per_sample", samples=10), inner=lambda p: SGD(p, lr=0.0))
    rig.bo.inner_step(rig.train)
    found = oracles.flat(rig.bo.hypergradient(rig.val()))
    rig.bo.outer_step(rig.val())
    rho = rig.bo.estimator.ihvp.damping_used
    rig = Rig(form="scalar")
    gradients, weights = rig.by_hand()
    matrix = fisher(weights.sqrt()[:, None] * gradients)
    matrix.diagonal().add_(rig.decay.detach().exp())  # the curvature of the penalty
    b = oracles.flat(torch.autograd.grad(rig.val(), rig.parameters))
    x = torch.linalg.solve(matrix + rho * torch.eye(len(b)).to(b), b)
    _, J = oracles.jacobians(rig.train, rig.parameters, [rig.phi, rig.decay])
    torch.testing.assert_close(found, -J.mT @ x, rtol=1e-8, atol=1e-10)


# --- law: observing changes nothing ---------------------------------------------------------------

OBSERVERS = {
    "window": lambda: NHGD(4),
    "centred": lambda: NHGD(4, rows="batch_centred"),
    "dense": lambda: NHGD(structure="dense", decay=0.9),
    "kronecker": lambda: NHGD(structure="kronecker", decay=0.9),
    "kronecker-per-sample": lambda: NHGD(structure="kronecker", rows="per_sample", samples=3),
    "diagonal": lambda: NHGD(structure="diagonal"),
    "per-sample": lambda: NHGD(8, rows="per_sample", samples=3),
}


class Moody(Rig):
    """Dropout draws and BatchNorm counts, some of it in a checkpoint that runs it again."""

    def make_model(self) -> nn.Module:
        self.first = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Dropout(0.3))
        return nn.Sequential(self.first, nn.Linear(3, 3))

    def outputs(self) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        hidden = checkpoint(self.first, self.x, use_reentrant=False, preserve_rng_state=self.keep)
        return self.model[1](hidden)

    keep = True


def plain_steps(rig: Rig, count: int) -> list[Tensor]:
    returned = []
    for _ in range(count):

        def closure() -> Tensor:
            rig.inner.zero_grad()
            losses, weights, penalty = rig.train()
            loss = (weights * losses).mean() + penalty
            loss.backward(inputs=rig.parameters)
            return loss

        returned.append(rig.inner.step(closure).detach())
    return returned


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize(
    "inner",
    [
        lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True),
        lambda p: Adam(p, lr=0.01),
        lambda p: LBFGS(p, lr=0.1, max_iter=3),
    ],
    ids=["sgd", "adam", "lbfgs"],
)
@pytest.mark.parametrize("observer", OBSERVERS)
def test_the_inner_trajectory_is_that_of_the_plain_loop(observer, inner, keep):
    plain, ours = Moody(inner=inner), Moody(OBSERVERS[observer](), inner=inner)
    plain.keep = ours.keep = keep
    torch.manual_seed(1)
    expected = plain_steps(plain, 8)
    torch.manual_seed(1)
    found = [ours.bo.inner_step(ours.train) for _ in range(8)]
    assert all(map(torch.equal, expected, found))
    for name, tensor in plain.model.state_dict().items():
        assert torch.equal(tensor, ours.model.state_dict()[name]), name
    for p, q in zip(plain.parameters, ours.parameters, strict=True):
        assert torch.equal(p.grad, q.grad)
    assert ours.phi.grad is None
    assert ours.bo.estimator.ihvp.state["steps"] == 8  # LBFGS: its first evaluations only


@pytest.mark.parametrize("observer", OBSERVERS)
def test_no_graph_is_kept(observer):
    rig, graphs = Rig(OBSERVERS[observer]()), []

    class Alive(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            import weakref

            saved = x.clone()
            ctx.save_for_backward(saved)
            graphs.append(weakref.ref(ctx))
            return x.clone()

        @staticmethod
        def backward(ctx, g: Tensor) -> Tensor:
            return g * torch.ones_like(ctx.saved_tensors[0])

    def train() -> PerSample:
        losses, weights, penalty = rig.train()
        return PerSample(Alive.apply(losses), weights, penalty)

    for _ in range(3):
        rig.bo.inner_step(train)
    assert len(graphs) == 3
    assert not any(ref() for ref in graphs)


def test_a_loss_tensor_is_freed_as_by_backward():
    rig = Rig(NHGD(rows="per_sample"), "losses")
    losses = rig.train()
    rig.bo.inner_step(losses)
    with pytest.raises(RuntimeError, match="second time"):
        losses.sum().backward()


def test_operations_without_a_batching_rule():
    """Rows are then taken one by one."""

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, g: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            assert type(g.tolist()) is list  # a value is looked at: not under vmap
            return 2 * x * g

    found = []
    for square in (Square.apply, torch.square):
        rig = Rig(NHGD(rows="per_sample"))

        def train(rig=rig, square=square) -> PerSample:
            losses, weights, penalty = rig.train()
            return PerSample(square(losses), weights, penalty)

        rig.bo.inner_step(train)
        found.append(rig.bo.estimator.ihvp.state["rows"])
    assert found[0].norm() > 0
    torch.testing.assert_close(*found)


def test_a_strategy_that_does_not_observe_is_not_shown_anything(monkeypatch):
    rig = Rig(Identity())
    assert not rig.bo.estimator.observes
    monkeypatch.setattr(type(rig.bo.estimator), "before_backward", None)
    monkeypatch.setattr(type(rig.bo.estimator), "observe", None)
    rig.run(1)


# --- loss scaling ---------------------------------------------------------------------------------


@pytest.mark.parametrize("observer", OBSERVERS)
def test_loss_scaling_is_undone(observer):
    """A power of two is exact: the rows, and what comes of them, are the same bits."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    plain = Rig(OBSERVERS[observer]()).run()
    scaled = Rig(OBSERVERS[observer](), grad_scaler=scaler).run()
    assert str(plain.bo.estimator.state_dict()) == str(scaled.bo.estimator.state_dict())
    assert torch.equal(plain.phi, scaled.phi)


@pytest.mark.parametrize("observer", OBSERVERS)
def test_steps_that_overflow_are_left_out(observer):
    nhgd = OBSERVERS[observer]()
    rig = Rig(nhgd, grad_scaler=torch.amp.GradScaler("cpu", init_scale=4.0))

    def overflowing() -> PerSample:
        losses, weights, penalty = rig.train()
        return PerSample(losses * math.inf, weights, penalty)

    rig.bo.inner_step(overflowing)
    rig.bo.outer_step(rig.val(), rig.train)
    assert rig.phi.grad.isfinite().all()
    rig.run(2)
    rig.bo.inner_step(overflowing)
    rig.run(2)
    assert rig.phi.grad.isfinite().all()
    assert rig.bo.report.residual.isfinite()


# --- device, dtype, memory ------------------------------------------------------------------------


@pytest.mark.parametrize("observer", OBSERVERS)
def test_bfloat16_parameters(observer):
    rig = Rig(OBSERVERS[observer](), dtype=torch.float32)
    rig.model.to(torch.bfloat16)
    rig.x = rig.x.to(torch.bfloat16)
    rig.run()
    state = rig.bo.estimator.ihvp.state
    floats = {t.dtype for t in state.values() if isinstance(t, Tensor) and t.is_floating_point()}
    assert torch.bfloat16 not in floats
    assert rig.phi.grad.isfinite().all()


@pytest.mark.parametrize("observer", OBSERVERS)
def test_meta_device(observer):
    """Nothing looks at a value: not while observing, not in the solve."""
    rig = Rig(OBSERVERS[observer]())
    rig.model.to("meta")
    rig.x, rig.y = rig.x.to("meta"), rig.y.to("meta")
    rig.phi = rig.phi.detach().to("meta").requires_grad_()
    rig.decay = rig.decay.detach().to("meta").requires_grad_()
    rig.inner = SGD(rig.model.parameters(), lr=0.1)
    outer = SGD([rig.phi, rig.decay], lr=0.1)
    nhgd = rig.bo.estimator.ihvp
    del rig.bo  # it serves one at a time
    rig.bo = BilevelOptimizer(rig.inner, outer, nhgd)
    rig.run()
    assert rig.bo.report.residual.device.type == "meta"
    tensors = [t for t in rig.bo.estimator.ihvp.state.values() if isinstance(t, Tensor)]
    assert {t.device.type for t in tensors} == {"meta"}


@pytest.mark.parametrize("observer", OBSERVERS)
def test_memory_follows_the_parameters(observer):
    """A checkpoint from another device or dtype is moved at the next use."""
    nhgd = OBSERVERS[observer]()
    rig = Rig(nhgd)
    rig.run(2)
    rig.model.float()
    rig.x = rig.x.float()
    rig.phi, rig.decay = (p.detach().float().requires_grad_() for p in (rig.phi, rig.decay))
    rig.inner = SGD(rig.model.parameters(), lr=0.1)
    del rig.bo  # it serves one at a time
    bo = BilevelOptimizer(rig.inner, SGD([rig.phi, rig.decay], lr=0.1), nhgd)
    bo.outer_step(rig.val(), rig.train)
    bo.inner_step(rig.train)
    bo.outer_step(rig.val())
    assert rig.phi.grad.dtype == torch.float32
    assert nhgd.state["steps"] == 5


@pytest.mark.parametrize("observer", OBSERVERS)
def test_another_number_of_parameters_starts_anew(observer):
    rig = Rig(OBSERVERS[observer]()).run(2)
    rig.model[0].requires_grad_(False)
    val = rig.val()
    with pytest.raises(RuntimeError, match="call inner_step"):
        rig.bo.outer_step(val)
    rig.bo.inner_step(rig.train)
    rig.bo.outer_step(rig.val())
    assert rig.bo.estimator.ihvp.state["n"] == 12
    assert rig.bo.estimator.ihvp.state["steps"] == 1


@pytest.mark.parametrize("observer", OBSERVERS)
def test_resume(observer):
    """Cut after 3 of 6 outer steps, one inner step into the next: the same bits."""
    make = OBSERVERS[observer]
    whole = Rig(make()).run(3)
    whole.bo.inner_step(whole.train)
    first = Rig(make()).run(3)
    first.bo.inner_step(first.train)
    file = io.BytesIO()
    torch.save({"bo": first.bo.state_dict(), "model": first.model.state_dict()}, file)
    second, data = Rig(make()), torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    second.model.load_state_dict(data["model"])
    with torch.no_grad():
        second.phi.copy_(first.phi), second.decay.copy_(first.decay)
    second.bo.load_state_dict(data["bo"])
    whole.run(3), second.run(3)
    assert torch.equal(whole.phi, second.phi)
    assert all(map(torch.equal, whole.parameters, second.parameters))
    assert str(whole.bo.state_dict()) == str(second.bo.state_dict())
    without = Rig(make())
    without.model.load_state_dict(data["model"])
    without.bo.load_state_dict(data["bo"])
    without.bo.reset()
    assert without.bo.estimator.ihvp.state == NHGD().initial_state()


def test_memory_is_window_rows():
    nhgd = NHGD(16)
    shown(nhgd, torch.randn(100, 1000))
    entries = sum(t.numel() for t in nhgd.state.values() if isinstance(t, Tensor))
    assert entries == 16 * 1000 + 16 * 16 + 16


# --- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"window": 0}, "Invalid window: 0"),
        ({"structure": "kfac"}, "Invalid structure: 'kfac'"),
        ({"damping": -1.0}, "Invalid damping: -1.0"),
        ({"min_damping": 0.0}, "Invalid min_damping: 0.0"),
        ({"decay": 0.0}, "Invalid decay: 0.0"),
        ({"decay": 1.5}, "Invalid decay: 1.5; expected a number in"),
        ({"rows": "sample"}, "Invalid rows: 'sample'"),
        ({"samples": 0}, "Invalid samples: 0"),
        ({"window": 4, "rows": "per_sample"}, "Invalid samples: 8; expected <= window = 4"),
        ({"batch_size": 0}, "Invalid batch_size: 0"),
    ],
)
def test_invalid_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        NHGD(**kwargs)


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        (lambda L: PerSample(L.mean()), ValueError, "one by one"),
        (lambda L: PerSample(L[None]), ValueError, "shape"),
        (lambda L: PerSample(L.detach()), RuntimeError, "detached"),
        (lambda L: PerSample(None), TypeError, "Is a `return` missing"),
        (lambda L: PerSample(L, 2.0), ValueError, "Invalid weights in PerSample: 2.0"),
        (lambda L: PerSample(L, torch.ones(3)), ValueError, "Invalid weights in PerSample: shape"),
        (lambda L: PerSample(L, None, L), ValueError, "Invalid penalty in PerSample: shape"),
        (lambda L: PerSample(L, None, "x"), ValueError, "Invalid penalty in PerSample: 'x'"),
    ],
)
def test_invalid_parts(parts, error, message):
    rig = Rig(form="losses")
    with pytest.raises(error, match=message):
        rig.bo.inner_step(lambda: parts(rig.train()))


@pytest.mark.parametrize("form", ["parts", "parts and outputs"])
def test_parts_mean_what_they_say(form: str):
    """For every strategy: the step and the hypergradient are those of the sum."""
    rigs = [Rig(form=form), Rig(form="scalar")]
    for rig in rigs:
        rig.run()
    torch.testing.assert_close(rigs[0].phi, rigs[1].phi, rtol=1e-12, atol=1e-12)
    for p, q in zip(*(rig.parameters for rig in rigs), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_a_penalty_that_is_a_number():
    rig = Rig(NHGD())
    rig.bo.inner_step(lambda: PerSample(rig.train().losses, None, 0))


# --- the exact limit ------------------------------------------------------------------------------


def softmax_regression(n: int, nhgd: NHGD, seed: int = 0) -> tuple[float, float]:
    """Labels drawn from the model itself: cosine and length of x against (H + ρI)⁻¹b at θ*."""
    g = torch.Generator().manual_seed(seed)
    theta = torch.randn(3, 4, dtype=torch.float64, generator=g).requires_grad_()
    X = torch.randn(n, 4, dtype=torch.float64, generator=g)
    y = torch.multinomial((X @ theta.detach().mT).softmax(1), 1, generator=g)[:, 0]
    phi = torch.zeros((), dtype=torch.float64, requires_grad=True)
    bo = BilevelOptimizer(SGD([theta], lr=0.0), SGD([phi], lr=0.1), nhgd)
    for batch in torch.arange(n).split(100):

        def train(batch: Tensor = batch) -> PerSample:
            losses = F.cross_entropy(X[batch] @ theta.mT, y[batch], reduction="none")
            return PerSample(losses, None, phi * theta.square().sum())

        bo.inner_step(train)
    H, _ = oracles.jacobians(lambda: F.cross_entropy(X @ theta.mT, y), [theta], [phi])
    b = H @ torch.randn(12, dtype=torch.float64, generator=g)  # H is blind to a shift of all logits
    x = ask(nhgd, b)
    exact = torch.linalg.solve(H + nhgd.damping_used * EYE, b)
    return float(F.cosine_similarity(x, exact, dim=0)), float(x.norm() / exact.norm())


def test_the_fisher_matrix_approaches_the_hessian():
    """A well-specified softmax model at its optimum, all samples seen once."""

    def nhgd() -> NHGD:
        return NHGD(structure="dense", rows="per_sample", samples=100, damping=1e-2)

    cosines = {n: softmax_regression(n, nhgd()) for n in (200, 2_000, 20_000)}
    cosine, length = cosines[20_000]
    assert cosine > 0.99
    assert 0.9 < length < 1.1
    assert 1 - cosine < (1 - cosines[200][0]) / 3


def test_the_window_and_batch_rows_point_the_same_way():
    """A window of some samples is a coarser picture, batch means a coarser one still."""
    window, _ = softmax_regression(20_000, NHGD(2000, rows="per_sample", samples=10, damping=1e-2))
    assert window > 0.98
    batch, length = softmax_regression(20_000, NHGD(200, damping=1e-2))
    assert batch > 0.8
    assert 0.3 < length < 3
