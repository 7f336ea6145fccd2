"""PZOBO: its own definition to rounding, its mean and its limit the hypergradient of the steps."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperopt_torch import PZOBO, BilevelOptimizer, Unrolled, learn_hyperparameter
from hyperopt_torch._tensors import FlatLayout

INNER: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=3),
}
DIFFERENTIABLE = ["momentum", "adam"]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


X, Y, X_VAL, Y_VAL = randn(3, 6, 3), randn(3, 6, seed=1), randn(5, 3, seed=2), randn(5, seed=3)


def train_loss(theta: Sequence[Tensor], phi: Sequence[Tensor], batch: int) -> Tensor:
    (w, c), (weights, log_decay) = theta, phi
    x, y = X[batch].to(w.dtype), Y[batch].to(w.dtype)
    losses = ((x @ w).tanh() + c - y).square()
    penalty = (w.square().sum() + c.square()) / 2
    return (weights.sigmoid() * losses).mean() + log_decay.exp() * penalty


class Loop:
    """Weighted regression, θ = (3 + 1), φ = (6 + 1): nonlinear in both, with a direct term."""

    def __init__(self, estimator=None, inner: str = "momentum", dtype=torch.float64) -> None:
        self.theta = [randn(3, seed=4, dtype=dtype), randn(1, seed=5, dtype=dtype)[0]]
        self.phi = [randn(6, seed=6, dtype=dtype), torch.tensor(-1.0, dtype=dtype)]
        for t in [*self.theta, *self.phi]:
            t.requires_grad_()
        self.inner = INNER[inner](self.theta)
        self.outer = torch.optim.SGD(self.phi, lr=0.1)
        self.bo = BilevelOptimizer(self.inner, self.outer, estimator=estimator or Unrolled())

    def run(self, steps: int = 3) -> Loop:
        for batch in range(steps):
            self.bo.inner_step(lambda batch=batch: train_loss(self.theta, self.phi, batch))
        return self

    def val(self) -> Tensor:
        w, c = self.theta
        fit = ((X_VAL.to(w.dtype) @ w).tanh() + c - Y_VAL.to(w.dtype)).square().mean()
        return fit + 0.1 * self.phi[0].square().sum()

    def hypergradient(self) -> Tensor:
        return flat(self.bo.hypergradient(self.val()))

    def direct(self) -> Tensor:
        return flat([0.2 * self.phi[0].detach(), torch.zeros_like(self.phi[1])])

    def indirect(self) -> Tensor:
        return self.hypergradient() - self.direct()


def flat(tensors: Sequence[Tensor | None]) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors if t is not None])


def draw(estimator: PZOBO, phi: Sequence[Tensor], earlier: int = 0) -> Tensor:
    """The directions that ``estimator`` will use after ``earlier`` others; it forgets nothing."""
    fresh = copy.deepcopy(estimator)
    for _ in range(earlier):
        fresh._draw(FlatLayout(phi))
    return fresh._draw(FlatLayout(phi))


# --- the definition -----------------------------------------------------------------------------


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("directions", ["gaussian", "per_tensor"])
@pytest.mark.parametrize("antithetic", [False, True])
def test_the_definition(inner: str, directions: str, antithetic: bool):
    """Plain torch from copies; in the second stretch, where the optimizer has a state."""
    mu = 1e-2

    def make() -> PZOBO:
        return PZOBO(
            3,
            smoothing=mu,
            directions=directions,
            antithetic=antithetic,
            generator=generator(5),
        )

    loop = Loop(make(), inner).run()
    loop.bo.outer_step(loop.val())
    start = [t.detach().clone() for t in loop.theta]
    state = copy.deepcopy(loop.inner.state_dict())
    loop.run()
    phi = flat(loop.phi)

    def end(phi: Tensor) -> Tensor:
        theta = [t.clone().requires_grad_() for t in start]
        optimizer = INNER[inner](theta)
        optimizer.load_state_dict(copy.deepcopy(state))

        def closure(batch: int) -> Tensor:
            optimizer.zero_grad()
            loss = train_loss(theta, (phi[:6], phi[6]), batch)
            loss.backward()
            return loss

        for batch in range(3):
            optimizer.step(lambda batch=batch: closure(batch))
        return flat(theta)

    b = flat(torch.autograd.grad(loop.val(), loop.theta))
    expected = loop.direct()
    for u in draw(make(), loop.phi, earlier=1):
        if antithetic:
            delta = (end(phi + mu * u) - end(phi - mu * u)) / (2 * mu)
        else:
            delta = (end(phi + mu * u) - end(phi)) / mu
        expected += (delta @ b) * u / 3
    found = loop.hypergradient()
    assert (found - loop.direct()).norm() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_directions():
    phi = [torch.zeros(4, 5), torch.zeros(()), torch.zeros(3)]
    U = draw(PZOBO(2000, generator=generator(0)), phi)
    assert U.shape == (2000, 24)
    assert U.mean().abs() < 0.02
    assert (U.mT @ U / 2000 - torch.eye(24)).abs().max() < 0.15
    U = draw(PZOBO(7, directions="per_tensor"), phi)
    for part in U.split([20, 1, 3], dim=1):
        torch.testing.assert_close(part.norm(dim=1), torch.ones(7))


@pytest.mark.parametrize(
    ("estimator", "gradients"),
    [
        (PZOBO(2), 6),
        (PZOBO(2, antithetic=True), 12),
        (PZOBO(2, smoothing=0.0), 3),
        (PZOBO(2, smoothing=0.0, antithetic=True), 3),
    ],
)
def test_report(estimator: PZOBO, gradients: int):
    loop = Loop(estimator).run()
    loop.hypergradient()
    report = loop.bo.report
    assert (report.strategy, report.gradients) == (repr(estimator), gradients)
    b = flat(torch.autograd.grad(loop.val(), loop.theta))
    torch.testing.assert_close(report.rhs_norm, b.norm())
    assert report.trouble() == []


# --- the limit of the differences ---------------------------------------------------------------


@pytest.mark.parametrize("inner", DIFFERENTIABLE)
@pytest.mark.parametrize("directions", ["gaussian", "per_tensor"])
def test_exact_form_is_the_projected_hypergradient(inner: str, directions: str):
    """Q = 1, smoothing=0: direct + u ⟨u, indirect⟩, and Q = 3 the mean of three of these."""
    exact = Loop(Unrolled(), inner).run().indirect()
    for count in (1, 3):
        estimator = PZOBO(count, smoothing=0.0, directions=directions, generator=generator(3))
        loop = Loop(estimator, inner).run()
        U = draw(estimator, loop.phi)
        torch.testing.assert_close(loop.indirect(), (U @ exact) @ U / count, rtol=1e-9, atol=1e-12)


def test_exact_form_by_hand():
    """Momentum steps as one differentiable function, without the library's own Unrolled."""

    def end(phi: Tensor) -> Tensor:
        theta, velocity = [randn(3, seed=4), randn(1, seed=5)[0]], [0.0, 0.0]
        for t in theta:
            t.requires_grad_()
        for batch in range(3):
            loss = train_loss(theta, (phi[:6], phi[6]), batch)
            grads = torch.autograd.grad(loss, theta, create_graph=True)
            velocity = [0.9 * v + g for v, g in zip(velocity, grads, strict=True)]
            theta = [t - 0.3 * v for t, v in zip(theta, velocity, strict=True)]
        return torch.cat([t.reshape(-1) for t in theta])

    estimator = PZOBO(smoothing=0.0, generator=generator(3))
    loop = Loop(estimator).run()
    b = flat(torch.autograd.grad(loop.val(), loop.theta))
    (u,) = draw(estimator, loop.phi)
    _, delta = torch.autograd.functional.jvp(end, flat(loop.phi), u)
    torch.testing.assert_close(loop.indirect(), (delta @ b) * u, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("inner", DIFFERENTIABLE)
@pytest.mark.parametrize(("antithetic", "order"), [(False, 1), (True, 2)])
def test_order_of_the_differences(inner: str, antithetic: bool, order: int):
    def indirect(mu: float) -> Tensor:
        estimator = PZOBO(2, smoothing=mu, antithetic=antithetic, generator=generator(3))
        return Loop(estimator, inner).run().indirect()

    limit = indirect(0.0)
    radii = [4e-3, 2e-3, 1e-3]
    errors = [float((indirect(mu) - limit).norm() / limit.norm()) for mu in radii]
    slope = math.log(errors[0] / errors[-1]) / math.log(radii[0] / radii[-1])
    assert slope == pytest.approx(order, abs=0.1)
    assert errors[-1] < {1: 1e-2, 2: 1e-4}[order]


# --- the mean over directions -------------------------------------------------------------------


def estimates(count: int, runs: int, directions: str = "gaussian") -> Tensor:
    """(runs, h) indirect terms of fresh estimators."""
    found = []
    for seed in range(runs):
        estimator = PZOBO(
            count, smoothing=0.0, directions=directions, generator=generator(100 * count + seed)
        )
        found.append(Loop(estimator).run(2).indirect())
    return torch.stack(found)


def test_monte_carlo_rate():
    """The root mean square error is √((h + 1) / Q) of the indirect term."""
    exact, h = Loop().run(2).indirect(), 7
    for count in (4, 64):
        found = estimates(count, runs=16)
        error = (found - exact).square().sum(1).mean().sqrt() / exact.norm()
        expected = math.sqrt((h + 1) / count)
        assert expected / 2 < error < 2 * expected
        bias = (found.mean(0) - exact).norm() / exact.norm()
        assert bias < 2 * expected / 4


@pytest.mark.parametrize("count", [4, 16])
def test_expected_cosine(count: int):
    """About √(Q / (Q + h + 1)): by simulation, the true mean is 6 % above for Q = 4 and 4 % for
    Q = 16. The mean of 60 has itself a standard deviation of 4 % and 1 %."""
    exact = Loop().run(2).indirect()
    cosines = F.cosine_similarity(estimates(count, runs=60), exact[None], dim=1)
    assert cosines.mean().item() == pytest.approx(math.sqrt(count / (count + 7 + 1)), rel=0.15)


def test_per_tensor_shrinks_the_indirect_term():
    """By the size of the tensor: 6 and 1 here."""
    exact = Loop().run(2).indirect()
    found = estimates(150, runs=8, directions="per_tensor").mean(0)
    expected = exact / torch.tensor([6.0] * 6 + [1.0], dtype=torch.float64)
    assert (found - expected)[:6].norm() < 0.15 * expected.norm()
    assert (found - expected)[6].abs() < 0.15 * expected.norm()
    assert (found - exact)[:6].norm() > 0.5 * exact[:6].norm()


# --- PZOBO-S: mini-batches and random numbers ---------------------------------------------------

FORMS = {
    "forward": {},
    "antithetic": {"antithetic": True},
    "per_tensor": {"directions": "per_tensor"},
    "limit": {"smoothing": 0.0},
}


class Noisy:
    """Dropout and BatchNorm; φ enters the training loss times ``influence``."""

    def __init__(self, estimator, inner: str, influence: float) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.4), nn.Linear(4, 1)
        ).double()
        self.phi = randn(5, seed=6).requires_grad_()
        self.influence = influence
        inner_optimizer = INNER[inner](self.model.parameters())
        outer = torch.optim.SGD([self.phi], lr=0.1)
        self.bo = BilevelOptimizer(inner_optimizer, outer, estimator=estimator)

    def train(self, x: Tensor, y: Tensor) -> Tensor:
        scale = 1 + self.influence * self.phi.square().sum()
        return scale * (self.model(x)[:, 0] - y).square().mean()

    def val(self) -> Tensor:
        return (self.model(X_VAL)[:, 0] - Y_VAL).square().mean()

    def run(self, named: bool) -> Noisy:
        for x, y in zip(X, Y, strict=True):
            if named:
                self.bo.inner_step(lambda x=x, y=y: self.train(x, y))
            else:
                self.bo.inner_step(lambda: self.train(x, y))  # noqa: B023, rebound by the loop
        return self


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("form", FORMS)
def test_same_batches_and_masks_on_every_path(inner: str, form: str):
    """φ is in the graph, but times zero: δ is zero, not merely small."""
    if (inner, form) == ("lbfgs", "limit"):
        pytest.skip("has no such form")
    rig = Noisy(PZOBO(3, **FORMS[form]), inner, influence=0.0).run(named=False)
    (found,) = rig.bo.hypergradient(rig.val())
    assert torch.equal(found, torch.zeros(5, dtype=torch.float64))


@pytest.mark.parametrize("form", FORMS)
def test_variables_that_the_loop_rebinds(form: str):
    found = []
    for named in (True, False):
        estimator = PZOBO(2, generator=generator(1), **FORMS[form])
        rig = Noisy(estimator, "adam", influence=1.0).run(named)
        found.append(rig.bo.hypergradient(rig.val())[0])
    assert found[0].norm() > 0
    assert torch.equal(*found)


def test_differences_with_dropout_are_derivatives():
    """Another mask or batch on one path alone would make δ of the size 1 / μ."""
    found = []
    for form in ({"smoothing": 0.0}, {"smoothing": 1e-5}, {"antithetic": True}):
        rig = Noisy(PZOBO(2, generator=generator(1), **form), "momentum", 0.1).run(named=False)
        found.append(rig.bo.hypergradient(rig.val())[0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-2, atol=1e-5)
    torch.testing.assert_close(found[2], found[0], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("form", FORMS)
def test_a_closure_that_draws_its_own_batch(form: str):
    rig = Noisy(PZOBO(**FORMS[form]), "adam", influence=1.0)
    batches = iter(list(zip(X, Y, strict=True)) * 4)
    for _ in range(2):
        rig.bo.inner_step(lambda: rig.train(*next(batches)))
    with pytest.raises(RuntimeError, match="not repeatable"):
        rig.bo.outer_step(rig.val())


# --- which outer parameters it reaches ----------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_direct_term_or_none_where_no_step_depends(form: str):
    w, phi, seen, unseen = (randn(n, seed=n).requires_grad_() for n in (3, 4, 2, 5))
    outer = torch.optim.SGD([phi, seen, unseen], lr=0.1)
    inner = torch.optim.SGD([w], lr=0.1)
    bo = BilevelOptimizer(inner, outer, estimator=PZOBO(2, **FORMS[form]))
    for _ in range(2):
        bo.inner_step(lambda: (w - phi[:3]).square().sum() * phi[3].exp())
    reached, direct, none = bo.hypergradient(w.square().sum() + (seen**3).sum())
    assert reached.norm() > 0
    assert torch.equal(direct, 3 * seen.detach() ** 2)
    assert none is None
    bo.outer_step(w.square().sum() + (seen**3).sum())
    assert unseen.grad is None


@pytest.mark.parametrize("form", FORMS)
def test_only_a_later_step_depends(form: str):
    """φ enters the second of three steps alone."""
    w, phi = randn(3).requires_grad_(), randn(1, seed=1).requires_grad_()

    def plain() -> Tensor:
        return w.square().sum()

    def scaled() -> Tensor:
        return (phi.exp() * w.square().sum()).sum()

    inner, outer = torch.optim.SGD([w], lr=0.1), torch.optim.SGD([phi], lr=0.1)
    bo = BilevelOptimizer(inner, outer, estimator=PZOBO(1, **FORMS[form], generator=generator(0)))
    for loss in (plain, scaled, plain):
        bo.inner_step(loss)
    (u,) = draw(bo.estimator, [phi])
    (found,) = bo.hypergradient(w.square().sum())
    # w_3 = 0.8 · 0.8 · (1 - 0.2 e^φ) w_0
    w0 = randn(3)
    slope = -2 * 0.64**2 * (1 - 0.2 * phi.exp()) * 0.2 * phi.exp() * w0.square().sum()
    torch.testing.assert_close(found, (slope * u * u).detach(), rtol=1e-3, atol=0)


def learning_rate(estimator, transform: str = "log") -> tuple[float, Tensor]:
    """One learned learning rate over three steps of Adam: (dg/dφ, φ)."""
    w = randn(3, seed=4).requires_grad_()
    inner = torch.optim.Adam([w], lr=0.1)
    (phi,) = learn_hyperparameter(inner, "lr", transform)
    bo = BilevelOptimizer(inner, torch.optim.SGD([phi], lr=0.1), estimator=estimator)
    for batch in range(3):
        bo.inner_step(lambda k=batch: (X[k] @ w - Y[k]).square().mean())
    return bo.hypergradient((X_VAL @ w - Y_VAL).square().mean())[0].item(), phi


@pytest.mark.parametrize("transform", ["log", "sigmoid", "identity"])
@pytest.mark.parametrize("form", FORMS)
def test_learned_learning_rate(form: str, transform: str):
    """h = 1: the estimate is u² times the derivative. φ is in float32."""
    exact, phi = learning_rate(Unrolled(), transform)
    estimator = PZOBO(generator=generator(2), **FORMS[form])
    (u,) = draw(estimator, [phi])
    found, _ = learning_rate(estimator, transform)
    assert exact != 0
    tolerance = 1e-5 if form == "limit" else 2e-2
    assert found == pytest.approx(exact * u.item() ** 2, rel=tolerance)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("inner", DIFFERENTIABLE)
def test_starting_point(inner: str, form: str):
    """θ ← φ, the only way in which φ matters; beside one that has no influence at all."""

    def run(estimator) -> tuple[Tensor, BilevelOptimizer, Tensor]:
        w, phi = torch.zeros(3, dtype=torch.float64).requires_grad_(), randn(3).requires_grad_()
        other = randn(4).requires_grad_()
        outer = torch.optim.SGD([other, phi], lr=0.1)
        bo = BilevelOptimizer(INNER[inner]([w]), outer, estimator=estimator)
        bo.start_from([phi])
        for batch in range(3):
            bo.inner_step(lambda k=batch: (X[k] @ w - Y[k]).tanh().square().mean())
        none, found = bo.hypergradient((X_VAL @ w - Y_VAL).square().mean())
        assert none is None
        return found, [other, phi]

    exact, _ = run(Unrolled())
    estimator = PZOBO(generator=generator(2), **FORMS[form])
    found, outer = run(estimator)
    u = draw(estimator, outer)[0][4:]
    tolerance = 1e-9 if form == "limit" else 1e-3
    torch.testing.assert_close(found, (u @ exact) * u, rtol=tolerance, atol=1e-9)


def test_started_and_used():
    """φ is where θ starts and what it is drawn to, as in a proximal term."""

    def run(estimator) -> Tensor:
        w, phi = torch.zeros(3, dtype=torch.float64).requires_grad_(), randn(3).requires_grad_()
        bo = BilevelOptimizer(
            torch.optim.SGD([w], lr=0.1), torch.optim.SGD([phi], lr=0.1), estimator=estimator
        )
        bo.start_from([phi])
        for batch in range(3):
            bo.inner_step(
                lambda k=batch: (X[k] @ w - Y[k]).square().mean() + (w - phi).pow(4).sum()
            )
        return bo.hypergradient((X_VAL @ w - Y_VAL).square().mean())[0]

    exact = run(Unrolled())
    for smoothing, tolerance in ((0.0, 1e-9), (1e-6, 1e-4)):
        estimator = PZOBO(smoothing=smoothing, generator=generator(2))
        found = run(estimator)
        (u,) = draw(estimator, [torch.zeros(3, dtype=torch.float64)])
        torch.testing.assert_close(found, (u @ exact) * u, rtol=tolerance, atol=1e-9)


# --- a task without a direct term ---------------------------------------------------------------


def cleaned(estimator: PZOBO | None) -> tuple[float, Tensor]:
    """(accuracy on clean test data, φ, flipped) of logistic regression on noisy labels."""
    truth = randn(8, seed=1)
    x, x_val, x_test = randn(40, 8, seed=2), randn(40, 8, seed=3), randn(2000, 8, seed=4)
    y, y_val, y_test = ((part @ truth > 0).double() for part in (x, x_val, x_test))
    flipped = torch.arange(40) % 5 < 2
    y = torch.where(flipped, 1 - y, y)
    w, phi = torch.zeros(8, dtype=torch.float64), torch.zeros(40, dtype=torch.float64)
    w.requires_grad_()
    phi.requires_grad_()
    inner, outer = torch.optim.SGD([w], lr=1.0), torch.optim.Adam([phi], lr=0.2)
    bo = BilevelOptimizer(inner, outer, estimator=estimator or PZOBO())

    def train() -> Tensor:
        losses = F.binary_cross_entropy_with_logits(x @ w, y, reduction="none")
        return (phi.sigmoid() * losses).mean() + 0.01 * w.square().sum()

    for _ in range(40):
        for _ in range(5):
            bo.inner_step(train)
        if estimator is None:
            bo.reset()
        else:
            bo.outer_step(F.binary_cross_entropy_with_logits(x_val @ w, y_val))
    accuracy = ((x_test @ w > 0) == (y_test > 0.5)).double().mean().item()
    return accuracy, phi.detach().sigmoid()[flipped].mean() - phi.detach().sigmoid()[
        ~flipped
    ].mean()


def test_hyper_cleaning():
    """The outer loss has no direct term: all that the weights learn comes through the steps."""
    before, _ = cleaned(None)
    after, contrast = cleaned(PZOBO(10, antithetic=True, generator=generator(0)))
    assert after > before + 0.05
    assert contrast < -0.2


# --- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inner", "outer", "base"),
    [
        (torch.float64, torch.float64, 1e-5),
        (torch.float32, torch.float32, 1e-3),
        (torch.float64, torch.float32, 1e-3),
        (torch.float32, torch.float64, 1e-3),
        (torch.bfloat16, torch.float32, 3e-2),
        (torch.bfloat16, torch.bfloat16, 3e-2),
    ],
    ids=str,
)
def test_default_smoothing(inner: torch.dtype, outer: torch.dtype, base: float):
    """base · (1 + rms(φ)), base after the lowest precision: the same bits as if given."""

    def run(smoothing: float | None) -> Tensor:
        w = randn(3, seed=4).to(inner).requires_grad_()
        phi = (5 * randn(3, seed=6)).to(outer).requires_grad_()
        bo = BilevelOptimizer(
            torch.optim.SGD([w], lr=0.1),
            torch.optim.SGD([phi], lr=0.1),
            estimator=PZOBO(2, smoothing=smoothing, generator=generator(0)),
        )
        for _ in range(2):
            bo.inner_step(lambda: (w - phi.to(inner)).pow(4).sum())
        return bo.hypergradient(w.square().sum())[0]

    wide = torch.promote_types(outer, torch.float32)
    rms = (5 * randn(3, seed=6)).to(outer).to(wide).square().mean().sqrt()
    mu = (base * (1 + rms)).item()
    assert torch.equal(run(None), run(mu))
    assert not torch.equal(run(None), run(mu / 2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_directions": 0}, "num_directions: 0"),
        ({"num_directions": 1.5}, "num_directions: 1.5"),
        ({"num_directions": True}, "num_directions: True"),
        ({"smoothing": -1e-3}, "smoothing: -0.001"),
        ({"smoothing": math.inf}, "smoothing: inf"),
        ({"smoothing": math.nan}, "smoothing: nan"),
        ({"smoothing": "auto"}, "smoothing: 'auto'"),
        ({"directions": "sphere"}, "directions: 'sphere'"),
    ],
)
def test_invalid_settings(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        PZOBO(**settings)


def test_invalid_generator():
    with pytest.raises(TypeError, match="manual_seed"):
        PZOBO(generator=3)


def test_limit_needs_a_differentiable_form():
    with pytest.raises(ValueError, match="LBFGS has no `differentiable` form"):
        Loop(PZOBO(smoothing=0.0), "lbfgs")
    loop = Loop(PZOBO(smoothing=0.0))
    loop.inner.register_step_post_hook(lambda *_: None)
    loop.run()
    with pytest.raises(ValueError, match="hooks around its step"):
        loop.bo.outer_step(loop.val())


def test_no_step_on_record():
    loop = Loop(PZOBO())
    with pytest.raises(RuntimeError, match="call inner_step"):
        loop.bo.outer_step(loop.val())
    loop.run()
    loop.bo.outer_step(loop.val())
    with pytest.raises(RuntimeError, match="call inner_step"):
        loop.bo.outer_step(loop.val())
    with pytest.raises(RuntimeError, match="needs a closure"):
        loop.bo.inner_step(train_loss(loop.theta, loop.phi, 0))


# --- memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_resumed_run(form: str):
    """The same directions bit for bit, whatever the seed of the second process."""

    def make(seed: int) -> Loop:
        return Loop(PZOBO(2, generator=generator(seed), **FORMS[form]))

    def cycles(loop: Loop, count: int) -> Loop:
        for _ in range(count):
            loop.run().bo.outer_step(loop.val())
        return loop

    def tensors(loop: Loop) -> list[Tensor]:
        return [t.detach() for t in [*loop.theta, *loop.phi]]

    whole = cycles(make(1), 4)
    first = cycles(make(1), 2)
    file = io.BytesIO()
    torch.save({"bo": first.bo.state_dict(), "tensors": tensors(first)}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second = make(2)
    for t, value in zip(tensors(second), saved["tensors"], strict=True):
        t.copy_(value)
    second.bo.load_state_dict(saved["bo"])
    cycles(second, 2)
    assert all(map(torch.equal, tensors(whole), tensors(second)))
    assert not torch.equal(whole.phi[0], cycles(make(2), 4).phi[0])
    assert whole.bo.state_dict()["estimator"] == second.bo.state_dict()["estimator"]


@pytest.mark.parametrize("form", FORMS)
def test_queries_draw_nothing(form: str):
    loop = Loop(PZOBO(2, generator=generator(1), **FORMS[form])).run()
    before = loop.bo.state_dict()["estimator"]
    first, second = loop.hypergradient(), loop.hypergradient()
    assert torch.equal(first, second)
    assert loop.bo.state_dict()["estimator"] == before
    loop.bo.outer_step(loop.val())
    assert torch.equal(flat([p.grad for p in loop.phi]), first)
    assert loop.bo.state_dict()["estimator"] != before


def test_every_outer_step_has_new_directions():
    loop = Loop(PZOBO(generator=generator(1)))
    found = []
    for _ in range(2):
        loop.run().bo.outer_step(loop.val())
        found.append(flat([p.grad for p in loop.phi]) - loop.direct())
    assert F.cosine_similarity(*found, dim=0).abs() < 0.999
