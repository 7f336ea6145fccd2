"""What is said about a hypergradient: the report, the warnings, the self-check, the log, the check.

Each kind of trouble appears where it should, once, and nowhere else.
"""

from __future__ import annotations

import json
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperopt_torch import (
    PZOBO,
    BilevelOptimizer,
    ConjugateGradient,
    DenseSolve,
    HealthLog,
    HypergradientError,
    HypergradientWarning,
    Identity,
    Neumann,
    Nystrom,
    RecycledPairs,
    Unrolled,
    check_hypergradient,
)
from hyperopt_torch.report import SelfCheck, SolveReport

SGD = torch.optim.SGD


class Loop:
    """½ wᵀAw - φᵀw; outer ½‖w - 2‖²."""

    def __init__(self, A: Tensor, ihvp=None, **kwargs) -> None:
        self.A, n = A, len(A)
        self.w = nn.Parameter(torch.zeros(n, dtype=A.dtype))
        self.phi = nn.Parameter(torch.ones(n, dtype=A.dtype))
        inner, outer = SGD([self.w], lr=0.1), SGD([self.phi], lr=0.1)
        self.bo = BilevelOptimizer(inner, outer, ihvp, **kwargs)

    def train(self) -> Tensor:
        return self.w @ self.A @ self.w / 2 - self.phi @ self.w

    def val(self) -> Tensor:
        return (self.w - 2).square().sum() / 2

    def step(self) -> None:
        self.bo.inner_step(self.train)
        self.bo.outer_step(self.val())

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.before = self.phi.detach().clone()
            self.step()


def diagonal(*values: float) -> Tensor:
    return torch.diag(torch.tensor(values, dtype=torch.float64))


GOOD = diagonal(1.0, 2.0, 3.0)
TROUBLE = {  # kind -> a loop that has it
    "not_finite": lambda **k: Loop(diagonal(1.0, math.nan), DenseSolve(), **k),
    "negative_curvature": lambda **k: Loop(diagonal(1.0, -1.0, 0.5), ConjugateGradient(5), **k),
    "residual": lambda **k: Loop(diagonal(*range(1, 20)), Nystrom(2, damping=1e-4), **k),
    "not_converged": lambda **k: Loop(
        diagonal(*(10.0 ** (-i / 20) for i in range(120))),
        ConjugateGradient(2, tol=1e-12, preconditioner=RecycledPairs(4)),
        **k,
    ),
    "diverged": lambda **k: Loop(diagonal(1.0, 30.0), Neumann(20, scale=0.5), **k),
    "damping": lambda **k: Loop(diagonal(1e-3, 1e-3), DenseSolve(damping=1.0), **k),
    "astray": lambda **k: Astray(GOOD, estimator=Unrolled(), **k),
    "astray-pzobo": lambda **k: Astray(GOOD, estimator=PZOBO(), **k),
    "unstable": lambda **k: Steep(diagonal(1.0, 60.0), estimator=Unrolled(), **k),
}


class Astray(Loop):
    def step(self) -> None:
        self.bo.inner_step(self.train)
        self.w.data.add_(0.5)  # a projection, a swap for averaged weights
        self.bo.inner_step(self.train)
        self.bo.outer_step(self.val())


class Steep(Loop):
    def step(self) -> None:
        for _ in range(4):
            self.bo.inner_step(self.train)
        self.bo.outer_step(self.val())


@pytest.mark.parametrize("kind", TROUBLE)
def test_each_kind_is_said_once(kind: str):
    loop, name = TROUBLE[kind](self_check=False), kind.split("-")[0]
    with pytest.warns(HypergradientWarning) as caught:
        loop.steps(3)
    said = [str(w.message) for w in caught if f"[{name}:" in str(w.message)]
    assert len(said) == 1
    assert caught[0].filename == __file__
    assert name in [trouble.kind for trouble in loop.bo.report.troubles()]
    assert len(loop.bo.report.troubles()) == len(loop.bo.report.trouble())


@pytest.mark.parametrize("kind", TROUBLE)
def test_each_kind_can_be_an_error_before_anything_has_moved(kind: str):
    loop = TROUBLE[kind](self_check=False, on_trouble="raise")
    with pytest.raises(HypergradientError):
        loop.steps(3)
    assert torch.equal(loop.before, loop.phi)


@pytest.mark.parametrize("kind", TROUBLE)
def test_each_kind_can_be_ignored(kind: str):
    loop = TROUBLE[kind](self_check=False, on_trouble="ignore")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loop.step()


@pytest.mark.parametrize(
    "ihvp",
    [None, DenseSolve(), ConjugateGradient(5), Nystrom(3, damping=1e-6)],
    ids=str,
)
def test_nothing_is_said_where_all_is_well(ihvp):
    loop = Loop(GOOD, None if ihvp is None else ihvp.fresh(), on_trouble="raise")
    for _ in range(5):
        loop.step()


def test_zero_gradients_are_no_trouble():
    """b = 0: the solution is zero."""
    for ihvp in (None, DenseSolve(damping=1.0), ConjugateGradient(3), Neumann(3)):
        loop = Loop(GOOD, ihvp, on_trouble="raise")
        loop.bo.inner_step(loop.train)
        loop.bo.outer_step(0 * loop.w.sum())
        assert not loop.phi.grad.any()


@pytest.mark.parametrize("query", ["outer_step", "accumulate"])
@pytest.mark.parametrize("where", ["train", "val", "theta"])
@pytest.mark.parametrize("ihvp", [None, ConjugateGradient(3), Nystrom(2), Identity()], ids=str)
def test_what_is_not_finite_moves_nothing(query: str, where: str, ihvp):
    """Never a finite hypergradient, never a raw error; afterwards the run goes on."""
    loop = Loop(GOOD, None if ihvp is None else ihvp.fresh())
    loop.bo.outer.param_groups[0]["momentum"] = 0.9
    for _ in range(2):
        loop.step()
    phi, state = loop.phi.detach().clone(), str(loop.bo.outer.state_dict())
    loop.bo.inner_step(loop.train)
    theta = loop.w.detach().clone()
    train, val = loop.train, loop.val()
    if where == "train":
        train = lambda: loop.train() * math.inf  # noqa: E731
    elif where == "val":
        val = val * math.nan
    else:
        loop.w.data[1] = math.nan
        val = loop.val()
    loop.bo.outer.zero_grad()
    with pytest.warns(HypergradientWarning, match="not finite"):
        getattr(loop.bo, query)(val, train)
    assert not loop.phi.grad.isfinite().any()
    assert torch.equal(phi, loop.phi)
    assert str(loop.bo.outer.state_dict()) == state
    loop.w.data.copy_(theta)
    loop.step()
    assert loop.phi.grad.isfinite().all()
    assert not torch.equal(phi, loop.phi)


def test_plain_numbers_for_loggers():
    loop = Loop(GOOD)
    loop.step()
    found = loop.bo.report.as_dict()
    assert json.loads(json.dumps(found)) == found
    assert found["finite"] is True
    assert found["converged"] is None
    assert isinstance(found["matvecs"], int)
    assert found["loss"] == pytest.approx(float(loop.train()), abs=1)
    for word in ("matvecs", "residual", "self_check_product"):
        assert word in str(loop.bo.report)


def test_the_report_is_read_in_one_transfer(monkeypatch):
    loop = Loop(GOOD, DenseSolve())
    loop.step()
    reads, tolist = [], Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda t: reads.append(1) or tolist(t))
    monkeypatch.setattr(Tensor, "item", None)
    loop.bo.report.trouble()
    assert len(reads) == 1


# --- the self-check -----------------------------------------------------------------------------


class WrongBackward(torch.autograd.Function):
    """x³ whose second derivative is wrong: the factor is a constant for autograd."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.factor = 3 * x.detach().square()
        return x**3

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad * ctx.factor


def network(act: type[nn.Module], dtype=torch.float32) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), act(), nn.Linear(16, 8), act(), nn.Linear(8, 3)).to(
        dtype
    )


def checked(model: nn.Module, losses, dtype=torch.float32, rate=0.1) -> SelfCheck | None:
    g = torch.Generator().manual_seed(2)
    x, y = torch.randn(40, 6, generator=g, dtype=dtype), torch.randint(3, (40,), generator=g)
    phi = torch.zeros(40, dtype=dtype, requires_grad=True)
    inner, outer = SGD(model.parameters(), lr=rate), SGD([phi], lr=rate)
    bo = BilevelOptimizer(inner, outer, on_trouble="ignore")
    bo.inner_step(lambda: (phi.exp() * losses(model(x), y)).mean())
    bo.outer_step(F.cross_entropy(model(x[:5]), y[:5]))
    first = bo.report.self_check
    bo.inner_step(lambda: (phi.exp() * losses(model(x), y)).mean())
    bo.outer_step(F.cross_entropy(model(x[:5]), y[:5]))
    assert bo.report.self_check is None  # once
    return first


def cross_entropy(outputs: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(outputs, y, reduction="none")


@pytest.mark.parametrize("act", [nn.Tanh, nn.GELU, nn.SiLU, nn.Softplus, nn.ELU])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_smooth_networks_are_quiet(act, scale: float):
    rate = 0.1 / max(scale, 1.0)  # θ stays where it is not saturated
    found = checked(network(act), lambda o, y: scale * cross_entropy(o, y), rate=rate)
    assert found.product < 0.01
    assert found.cross < 0.01
    found = checked(network(act, torch.float64), cross_entropy, torch.float64)
    assert found.product < 1e-4


@pytest.mark.parametrize("form", ["function", "weight_norm"])
def test_a_wrong_second_derivative_is_found(form: str):
    if form == "function":
        found = checked(network(nn.Tanh), lambda o, y: WrongBackward.apply(o).square().sum(1))
    else:
        model = network(nn.Tanh)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            nn.utils.weight_norm(model[0])
        found = checked(model, cross_entropy)
    assert max(found.product, found.cross) > found.tolerance
    report = SolveReport("", 0, torch.ones(()), self_check=found)
    assert [trouble.kind for trouble in report.troubles()] == ["self_check"]


def test_a_wrong_cross_derivative_alone_is_found():
    w, phi = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    bo = BilevelOptimizer(SGD([w], lr=0.1), SGD([phi], lr=0.1), DenseSolve())

    def train() -> Tensor:
        return (w - 1).square().sum() + (WrongBackward.apply(phi * w)).sum()

    bo.inner_step(train)
    with pytest.warns(HypergradientWarning, match="second derivatives"):
        bo.outer_step(w.sum())


def test_corners_leave_it_undecided_and_quiet():
    found = checked(network(nn.ReLU), cross_entropy)
    assert found.undecided or found.product < found.tolerance
    report = SolveReport("", 0, torch.ones(()), self_check=found)
    assert report.troubles() == []


# --- the log ------------------------------------------------------------------------------------


class Told:
    """What a HealthLog listens to."""

    def on_outer_step(self, listener) -> None:
        self.tell = listener


def told(residual: float, hypergradient: Tensor) -> tuple[SolveReport, list[Tensor], Tensor]:
    report = SolveReport(
        "S", 3, torch.ones(()), residual=torch.tensor(residual), hypergradient_norm=torch.ones(())
    )
    return report, [hypergradient], torch.tensor(0.5)


def test_noise_is_said_once_and_a_direction_is_not():
    for noisy in (True, False):
        source, g = Told(), torch.Generator().manual_seed(0)
        log = HealthLog(source, window=20)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(60):
                noise = torch.randn(500, generator=g)
                source.tell(*told(2.0 if noisy else 0.3, noise if noisy else 1 + noise))
        assert len(caught) == noisy
        assert (log.verdict() is not None) == noisy


def test_history_and_scalars_and_a_bound_on_memory():
    loop = Loop(GOOD)
    log = HealthLog(loop.bo, keep=5)
    for _ in range(8):
        loop.step()
    history = log.history()
    assert all(len(values) == 5 for values in history.values())
    assert history["val_loss"][-1] < history["val_loss"][0]
    assert min(history["cosine"]) > 0.5
    assert log.scalars()["bilevel/products"] == history["products"][-1]
    assert "steps=8" in repr(log)


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    loop = Loop(GOOD)
    log = HealthLog(loop.bo)
    for _ in range(5):
        loop.step()
    log.plot(tmp_path / "health.png")
    assert (tmp_path / "health.png").stat().st_size > 5000


# --- against the inner problem solved again -----------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_check_hypergradient(decay: float):
    torch.manual_seed(0)
    x, y = torch.randn(20, 3, dtype=torch.float64), torch.randn(20, dtype=torch.float64)
    model = nn.Linear(3, 1).double()
    phi = torch.zeros(20, dtype=torch.float64, requires_grad=True)

    def losses() -> Tensor:
        return (model(x)[:, 0] - y).square()

    def run(ihvp) -> float:
        inner = SGD(model.parameters(), lr=0.1, weight_decay=decay)
        bo = BilevelOptimizer(inner, SGD([phi], lr=0.1), ihvp)
        before = [t.detach().clone() for t in (*model.parameters(), phi)]
        found = check_hypergradient(
            bo, lambda: (phi.exp() * losses()).mean(), lambda: losses()[:5].mean()
        )
        assert all(map(torch.equal, before, (*model.parameters(), phi)))
        assert found.stationarity < 1e-4
        return found.error

    assert run(DenseSolve()) < 1e-4
    assert run(Identity(3.0)) > 0.05  # it can fail
