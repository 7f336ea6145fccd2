"""Unrolled: against optimizers by hand, plain autograd, and finite differences of real runs."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hand_written import (
    Step,
    adadelta,
    adagrad,
    adam,
    adamax,
    adamw,
    asgd,
    nadam,
    radam,
    rmsprop,
    rprop,
    sgd,
    unroll,
)
from oracles import flat
from oracles import hypergradient as implicit_by_hand
from problems import parameter, proximal, tensor
from torch import Tensor, nn
from torch.func import functional_call

from hyperopt_torch import (
    BilevelOptimizer,
    DenseSolve,
    ImplicitDifferentiation,
    PerSample,
    Unrolled,
    learn_hyperparameter,
)

OPTIM = torch.optim
Learn = tuple[str, str, int | None]  # name, transform, index


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    """ASGD and NAdam keep rates in the default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


# --- the problem --------------------------------------------------------------------------------

_G = torch.Generator().manual_seed(0)
A = torch.randn(6, 4, dtype=torch.float64, generator=_G)
Y = torch.randn(6, dtype=torch.float64, generator=_G)
START = [
    0.5 * torch.randn(4, dtype=torch.float64, generator=_G),
    torch.randn(6, dtype=torch.float64, generator=_G),
]
PHI = torch.linspace(-0.3, 0.3, 6, dtype=torch.float64)
TRANSFORM: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda phi: phi,
    "log": torch.exp,
    "sigmoid": torch.sigmoid,
}


def train_loss(theta: Sequence[Tensor], phi: Tensor) -> Tensor:
    w, v = theta
    return (phi.exp() * (torch.tanh(A @ w) * v - Y) ** 2).mean() + 0.1 * (w**4).sum()


def val_loss(theta: Sequence[Tensor], phi: Tensor) -> Tensor:
    w, v = theta
    return ((torch.tanh(A @ w) * v - Y.flip(0)) ** 2).mean() + 0.01 * phi.square().sum()


def fresh() -> list[nn.Parameter]:
    return [nn.Parameter(p.clone()) for p in START]


@dataclass(frozen=True)
class Case:
    """An inner optimizer with settings for each of two groups, and what of it can be learned."""

    name: str
    optimizer: type[OPTIM.Optimizer]
    step: Step
    groups: tuple[dict[str, Any], dict[str, Any]]
    learn: tuple[Learn, ...]
    steps: int = 5
    common: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    def make(self, theta: Sequence[Tensor], **common: Any) -> OPTIM.Optimizer:
        groups = [{"params": [p], **g} for p, g in zip(theta, self.groups, strict=True)]
        return self.optimizer(groups, **{**self.common, **common})


LR: Learn = ("lr", "log", None)
DECAY: Learn = ("weight_decay", "log", None)
MOMENTUM: Learn = ("momentum", "sigmoid", None)
BETA1: Learn = ("betas", "sigmoid", 0)
BETA2: Learn = ("betas", "sigmoid", 1)
LRS = ({"lr": 0.1}, {"lr": 0.07})
DECAYED = ({"lr": 0.1, "weight_decay": 0.02}, {"lr": 0.07, "weight_decay": 0.05})

CASES = [
    Case("sgd", OPTIM.SGD, sgd, LRS, (LR,)),
    Case("sgd-decay", OPTIM.SGD, sgd, DECAYED, (LR, DECAY)),
    Case(
        "sgd-momentum",
        OPTIM.SGD,
        sgd,
        (
            {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.05},
            {"lr": 0.2, "momentum": 0.5, "dampening": 0.1, "weight_decay": 0.01},
        ),
        (LR, MOMENTUM, ("dampening", "sigmoid", None), DECAY),
    ),
    Case(
        "sgd-nesterov",
        OPTIM.SGD,
        sgd,
        ({"lr": 0.1, "momentum": 0.9}, {"lr": 0.05, "momentum": 0.7}),
        (LR, MOMENTUM),
        common={"nesterov": True, "momentum": 0.9},
    ),
    Case("adam", OPTIM.Adam, adam, DECAYED, (LR, BETA1, BETA2, DECAY)),
    Case("adam-eps", OPTIM.Adam, adam, LRS, (("eps", "log", None),), common={"eps": 0.05}),
    Case("amsgrad", OPTIM.Adam, adam, LRS, (LR, BETA1, BETA2), common={"amsgrad": True}),
    Case("adamw", OPTIM.AdamW, adamw, DECAYED, (LR, BETA1, BETA2, DECAY)),
    Case(
        "adamw-amsgrad", OPTIM.AdamW, adamw, DECAYED, (LR, BETA2, DECAY), common={"amsgrad": True}
    ),
    Case(
        "rmsprop",
        OPTIM.RMSprop,
        rmsprop,
        LRS,
        (LR, ("alpha", "sigmoid", None)),
        common={"eps": 0.1},
    ),
    Case(
        "rmsprop-centered",
        OPTIM.RMSprop,
        rmsprop,
        (
            {"lr": 0.02, "momentum": 0.5, "weight_decay": 0.01},
            {"lr": 0.01, "momentum": 0.3, "weight_decay": 0.02},
        ),
        (LR, ("alpha", "sigmoid", None), MOMENTUM, DECAY),
        common={"centered": True, "alpha": 0.9},
    ),
    Case(
        "adagrad",
        OPTIM.Adagrad,
        adagrad,
        ({"lr": 0.1, "lr_decay": 0.1}, {"lr": 0.2, "lr_decay": 0.3, "weight_decay": 0.1}),
        (LR, ("lr_decay", "log", None)),
    ),
    Case("nadam", OPTIM.NAdam, nadam, DECAYED, (LR, BETA1, BETA2, ("momentum_decay", "log", None))),
    Case(  # rectification begins at step 6
        "radam", OPTIM.RAdam, radam, DECAYED, (LR, BETA1, BETA2), 9, {"betas": (0.9, 0.9)}
    ),
    Case("adamax", OPTIM.Adamax, adamax, DECAYED, (LR, BETA1, BETA2, DECAY)),
    Case(
        "asgd",
        OPTIM.ASGD,
        asgd,
        LRS,
        (LR, ("lambd", "log", None), ("alpha", "sigmoid", None)),
        common={"t0": 2, "lambd": 0.1},
    ),
    Case(
        "adadelta",
        OPTIM.Adadelta,
        adadelta,
        DECAYED,
        (LR, ("rho", "sigmoid", None), DECAY),
        common={"eps": 0.01},
    ),
    Case(
        "rprop",
        OPTIM.Rprop,
        rprop,
        ({"lr": 0.3}, {"lr": 0.4}),
        (LR, ("etas", "sigmoid", 0), ("etas", "log", 1)),
    ),
]
BY_NAME = {case.name: case for case in CASES}
CASE = pytest.mark.parametrize("case", CASES, ids=str)


def in_float64(etas: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    for eta in etas:
        eta.data = eta.data.double()
    return list(etas)


def learned_of(inner: OPTIM.Optimizer, learn: Sequence[Learn]) -> list[nn.Parameter]:
    found = [learn_hyperparameter(inner, name, how, index=i) for name, how, i in learn]
    return in_float64([eta for etas in found for eta in etas])


def setting(group: dict[str, Any], name: str, index: int | None, value: Any) -> None:
    if index is None:
        group[name] = value
    else:
        entries = list(group[name])
        entries[index] = value
        group[name] = tuple(entries)


def with_learned(
    groups: Sequence[dict[str, Any]], learn: Sequence[Learn], etas: Sequence[Tensor]
) -> list[dict[str, Any]]:
    """The settings of each group, where the transformed η stand."""
    found = [{k: v for k, v in g.items() if k != "params"} for g in groups]
    places = [(group, link) for link in learn for group in found]
    for (group, (name, how, index)), eta in zip(places, etas, strict=True):
        setting(group, name, index, TRANSFORM[how](eta))
    return found


def unrolled(
    case: Case, learn: Sequence[Learn] = (), window: int | None = None, **common: Any
) -> tuple[BilevelOptimizer, list[nn.Parameter], list[nn.Parameter]]:
    """(after the steps, θ, [φ, *η])."""
    theta, phi = fresh(), nn.Parameter(PHI.clone())
    inner = case.make(theta, **common)
    outer = [phi, *learned_of(inner, learn)]
    bilevel = BilevelOptimizer(inner, OPTIM.SGD(outer, lr=0.1), estimator=Unrolled(window))
    for _ in range(case.steps):
        bilevel.inner_step(lambda: train_loss(theta, phi))
    return bilevel, theta, outer


def by_hand(
    case: Case, learn: Sequence[Learn] = (), etas: Sequence[Tensor] = (), window: int | None = None
) -> list[Tensor]:
    """Plain autograd through the hand-written steps, or the last ``window`` of them."""
    outer = [q.detach().clone().requires_grad_() for q in [PHI, *etas]]
    phi = outer[0]
    hyper = with_learned(case.make(fresh()).param_groups, learn, outer[1:])
    loss = partial(train_loss, phi=phi)
    constant, tail = (0, case.steps) if window is None else (case.steps - window, window)
    theta, states = unroll(case.step, START, [loss] * constant, hyper)
    theta = [p.detach() for p in theta]
    states = [{k: v.detach() if isinstance(v, Tensor) else v for k, v in s.items()} for s in states]
    theta, _ = unroll(case.step, theta, [loss] * tail, hyper, states)
    grads = torch.autograd.grad(val_loss(theta, phi), outer, allow_unused=True)
    return [torch.zeros_like(q) if g is None else g for g, q in zip(grads, outer, strict=True)]


def real_run(case: Case, learn: Sequence[Learn], phi: Tensor, etas: Sequence[Tensor]) -> float:
    """The validation loss after training with torch's own optimizer, no bilevel code involved."""
    theta = fresh()
    inner = case.make(theta)
    known = with_learned(inner.param_groups, learn, etas)
    for group, values in zip(inner.param_groups, known, strict=True):
        for name, value in values.items():
            number = value.item() if isinstance(value, Tensor) else value
            if isinstance(number, tuple):
                number = tuple(v.item() if isinstance(v, Tensor) else v for v in number)
            group[name] = number
    for _ in range(case.steps):
        inner.zero_grad()
        train_loss(theta, phi).backward()
        inner.step()
    return val_loss(theta, phi).item()


def finite_differences(
    value: Callable[[list[Tensor]], float], at: Sequence[Tensor], h: float = 1e-3
) -> list[Tensor]:
    """Central differences of order 4."""
    found = []
    for i, q in enumerate(at):
        entries = []
        for j in range(q.numel()):

            def moved(t: float, i: int = i, j: int = j) -> float:
                point = [p.detach().clone() for p in at]
                point[i].view(-1)[j] += t
                return value(point)

            near, far = moved(h) - moved(-h), moved(2 * h) - moved(-2 * h)
            entries.append((8 * near - far) / (12 * h))
        found.append(torch.tensor(entries).reshape(q.shape))
    return found


def assert_close(
    found: Sequence[Tensor | None], expected: Sequence[Tensor], rtol: float, floor: float = 1e-4
) -> None:
    """Every tensor within ``rtol`` of its own norm, or of ``floor`` where that is larger."""
    for i, (x, y) in enumerate(zip(found, expected, strict=True)):
        assert x is not None, i
        scale = max(float(y.norm()), floor)
        assert float((x - y).norm()) <= rtol * scale, (i, x, y)


# --- every optimizer ----------------------------------------------------------------------------


@CASE
def test_hand_written_steps_are_those_of_torch(case: Case):
    """The oracle itself: the same θ, or it would prove nothing."""
    _, theta, _ = unrolled(case)
    hyper = with_learned(case.make(fresh()).param_groups, (), ())
    loss = partial(train_loss, phi=PHI)
    expected, _ = unroll(case.step, START, [loss] * case.steps, hyper)
    assert_close([p.detach() for p in theta], [p.detach() for p in expected], 1e-12)


@CASE
def test_hypergradient_through_every_optimizer(case: Case):
    bilevel, theta, (phi,) = unrolled(case)
    found = bilevel.hypergradient(val_loss(theta, phi))
    assert_close(found, by_hand(case), 1e-10)
    runs = finite_differences(lambda at: real_run(case, (), at[0], ()), [PHI])
    assert_close(found, runs, 1e-6)
    assert bilevel.report.trouble() == []


@CASE
def test_learned_hyperparameters_of_every_optimizer(case: Case):
    bilevel, theta, outer = unrolled(case, case.learn)
    found = bilevel.hypergradient(val_loss(theta, outer[0]))
    etas = [q.detach() for q in outer[1:]]
    assert_close(found, by_hand(case, case.learn, etas), 1e-10)
    runs = finite_differences(
        lambda at: real_run(case, case.learn, at[0], at[1:]), [PHI, *etas], h=5e-4
    )
    assert_close(found, runs, 1e-6, floor=1e-3)
    assert bilevel.report.trouble() == []


@CASE
@pytest.mark.parametrize("window", [1, 3])
def test_window_is_autograd_from_there_on(case: Case, window: int):
    bilevel, theta, outer = unrolled(case, case.learn, window)
    found = bilevel.hypergradient(val_loss(theta, outer[0]))
    etas = [q.detach() for q in outer[1:]]
    assert_close(found, by_hand(case, case.learn, etas, window), 1e-10)
    assert bilevel.report.gradients == window


@CASE
def test_window_as_long_as_the_run_is_the_whole(case: Case):
    whole, theta, (phi,) = unrolled(case)
    exact = whole.hypergradient(val_loss(theta, phi))
    for window in (case.steps, case.steps + 3):
        bilevel, theta, (phi,) = unrolled(case, window=window)
        assert torch.equal(bilevel.hypergradient(val_loss(theta, phi))[0], exact[0])


@pytest.mark.parametrize("name", ["sgd-momentum", "adam", "amsgrad", "adamw", "adagrad", "nadam"])
def test_foreach_is_the_same(name: str):
    case = BY_NAME[name]
    bilevel, theta, outer = unrolled(case, case.learn, foreach=True)
    found = bilevel.hypergradient(val_loss(theta, outer[0]))
    assert_close(found, by_hand(case, case.learn, [q.detach() for q in outer[1:]]), 1e-10)


@pytest.mark.parametrize("name", ["sgd-momentum", "adam", "adamw"])
def test_fused_is_the_same(name: str):
    case = BY_NAME[name]
    bilevel, theta, (phi,) = unrolled(case, fused=True)
    assert_close(bilevel.hypergradient(val_loss(theta, phi)), by_hand(case), 1e-10)


@pytest.mark.parametrize("name", ["sgd-momentum", "adam", "rmsprop", "radam"])
def test_maximize_is_descent_on_minus_the_loss(name: str):
    case = BY_NAME[name]
    theta, phi = fresh(), nn.Parameter(PHI.clone())
    bilevel = BilevelOptimizer(
        case.make(theta, maximize=True), OPTIM.SGD([phi], lr=0.1), estimator=Unrolled()
    )
    for _ in range(case.steps):
        bilevel.inner_step(lambda: -train_loss(theta, phi))
    found = bilevel.hypergradient(val_loss(theta, phi))
    assert_close(found, by_hand(case), 1e-10)


@pytest.mark.parametrize("name", ["nadam", "asgd"])
def test_float32_rates_beside_float64_parameters(name: str):
    """Under torch's usual default dtype these keep float32 rates: the result is that precise."""
    torch.set_default_dtype(torch.float32)
    case = BY_NAME[name]
    bilevel, theta, outer = unrolled(case, case.learn)
    found = bilevel.hypergradient(val_loss(theta, outer[0]))
    assert_close(found, by_hand(case, case.learn, [q.detach() for q in outer[1:]]), 1e-5, 1e-2)


@pytest.mark.parametrize("name", ["adam", "amsgrad", "adamw", "radam", "adamax", "sgd-momentum"])
def test_float64_parameters_under_the_usual_default_dtype(name: str):
    """The step counter is float32 then, but the bias corrections of the run are float64."""
    torch.set_default_dtype(torch.float32)
    bilevel, theta, (phi,) = unrolled(BY_NAME[name])
    found = bilevel.hypergradient(val_loss(theta, phi))
    assert_close(found, by_hand(BY_NAME[name]), 1e-10)


# --- hyperparameters as tensors -----------------------------------------------------------------


RAW = {
    "sgd": (OPTIM.SGD, sgd, {"lr": 0.1}),
    "sgd-momentum": (
        OPTIM.SGD,
        sgd,
        {"lr": 0.1, "momentum": 0.8, "dampening": 0.2, "weight_decay": 0.1},
    ),
    "adam": (OPTIM.Adam, adam, {"lr": 0.1, "weight_decay": 0.1}),
    "adam-betas": (OPTIM.Adam, adam, {"lr": 0.1, "betas": (0.8, 0.95)}),
    "adamw": (OPTIM.AdamW, adamw, {"lr": 0.1, "weight_decay": 0.1}),
    "rmsprop": (OPTIM.RMSprop, rmsprop, {"lr": 0.02, "alpha": 0.9, "eps": 0.1}),
    "adagrad": (OPTIM.Adagrad, adagrad, {"lr": 0.1}),
}


def _leaves(settings: dict[str, Any], make: Callable[[float], Tensor]) -> dict[str, Any]:
    return {
        name: tuple(map(make, value)) if isinstance(value, tuple) else make(value)
        for name, value in settings.items()
    }


def _listed(settings: dict[str, Any]) -> list[Any]:
    nested = (v if isinstance(v, tuple) else (v,) for v in settings.values())
    return list(itertools.chain.from_iterable(nested))


def _rebuilt(settings: dict[str, Any], values: Sequence[Any]) -> dict[str, Any]:
    found = iter(values)
    return {
        name: tuple(next(found) for _ in value) if isinstance(value, tuple) else next(found)
        for name, value in settings.items()
    }


@pytest.mark.parametrize("name", RAW)
def test_tensors_in_the_parameter_group(name: str):
    """One group, whose tensors are also in the outer optimizer."""
    optimizer, step, numbers = RAW[name]
    leaf = partial(torch.tensor, requires_grad=True)
    theta, phi = fresh(), nn.Parameter(PHI.clone())
    settings = _leaves(numbers, leaf)
    inner = optimizer(theta, **settings)
    outer = [phi, *_listed(settings)]
    bilevel = BilevelOptimizer(inner, OPTIM.SGD(outer, lr=0.1), estimator=Unrolled())
    for _ in range(5):
        bilevel.inner_step(lambda: train_loss(theta, phi))
    found = bilevel.hypergradient(val_loss(theta, phi))
    for key, value in settings.items():  # the user's tensors are back in their places
        assert inner.param_groups[0][key] is value or inner.param_groups[0][key] == value

    again, free = _leaves(numbers, leaf), PHI.clone().requires_grad_()
    hyper = {**optimizer(fresh(), **numbers).param_groups[0], **again}
    end, _ = unroll(step, START, [partial(train_loss, phi=free)] * 5, [hyper] * 2)
    expected = torch.autograd.grad(val_loss(end, free), [free, *_listed(again)])
    assert_close(found, expected, 1e-10)

    def run(at: list[Tensor]) -> float:
        p = fresh()
        plain = optimizer(p, **_rebuilt(numbers, [q.item() for q in at[1:]]))
        for _ in range(5):
            plain.zero_grad()
            train_loss(p, at[0]).backward()
            plain.step()
        return val_loss(p, at[0]).item()

    at = [PHI, *map(torch.tensor, _listed(numbers))]
    assert_close(found, finite_differences(run, at, 5e-4), 1e-6, 1e-2)


def test_one_tensor_as_a_rate_of_two_groups_and_in_the_loss():
    """Its derivative is the sum over all its places."""
    theta, shared = fresh(), parameter(0.1)
    shared = shared.detach().squeeze().requires_grad_()
    inner = OPTIM.SGD([{"params": [theta[0]]}, {"params": [theta[1]], "momentum": 0.5}], lr=shared)
    bilevel = BilevelOptimizer(inner, OPTIM.SGD([shared], lr=0.1), estimator=Unrolled())

    def loss(p: Sequence[Tensor], phi: Tensor) -> Tensor:
        return train_loss(p, PHI) + phi * p[0].square().sum()

    for _ in range(5):
        bilevel.inner_step(lambda: loss(theta, shared))
    (found,) = bilevel.hypergradient(val_loss(theta, PHI) * shared)
    again = shared.detach().clone().requires_grad_()
    hyper = [{"lr": again}, {"lr": again, "momentum": 0.5}]
    end, _ = unroll(sgd, START, [partial(loss, phi=again)] * 5, hyper)
    expected = torch.autograd.grad(val_loss(end, PHI) * again, again)
    assert_close([found], expected, 1e-10)


def test_a_tensor_that_is_not_in_the_outer_optimizer_is_a_constant():
    theta, phi = fresh(), nn.Parameter(PHI.clone())
    lr = torch.tensor(0.1, requires_grad=True)
    inner = OPTIM.SGD(theta, lr=lr)
    bilevel = BilevelOptimizer(inner, OPTIM.SGD([phi], lr=0.1), estimator=Unrolled())
    for _ in range(5):
        bilevel.inner_step(lambda: train_loss(theta, phi))
    case = Case("sgd", OPTIM.SGD, sgd, ({"lr": 0.1}, {"lr": 0.1}), ())
    assert_close(bilevel.hypergradient(val_loss(theta, phi)), by_hand(case), 1e-10)
    assert lr.grad is None


def test_learned_rates_follow_the_outer_steps():
    theta, phi = fresh(), nn.Parameter(PHI.clone())
    inner = BY_NAME["adam"].make(theta)
    logs = learn_hyperparameter(inner, "lr")
    betas = learn_hyperparameter(inner, "betas", "sigmoid", index=0)
    bilevel = BilevelOptimizer(inner, OPTIM.SGD([phi, *logs, *betas], lr=0.5), estimator=Unrolled())
    for _ in range(3):
        before = [q.item() for q in (*logs, *betas)]
        for _ in range(2):
            bilevel.inner_step(lambda: train_loss(theta, phi))
        for group, log, beta in zip(inner.param_groups, logs, betas, strict=True):
            assert group["lr"] == pytest.approx(log.exp().item(), rel=1e-6)
            assert group["betas"][0] == pytest.approx(beta.sigmoid().item(), rel=1e-6)
            assert group["betas"][1] == 0.999
        bilevel.outer_step(val_loss(theta, phi))
        assert all(q.item() != b for q, b in zip((*logs, *betas), before, strict=True))


# --- closed forms -------------------------------------------------------------------------------


def descent(window: int | None, learn: str | None = None) -> tuple[Tensor, ...]:
    """Five steps of gradient descent on the scalar ridge from 0."""
    w, phi = parameter(0.0), parameter(1.0)
    inner = OPTIM.SGD([w], lr=0.1)
    etas = in_float64(learn_hyperparameter(inner, "lr", learn)) if learn else []
    bilevel = BilevelOptimizer(inner, OPTIM.SGD([phi, *etas], lr=1.0), estimator=Unrolled(window))
    for _ in range(5):
        bilevel.inner_step(lambda: (w**2 - 3 * w + phi / 2 * w**2).sum())
    assert w.item() == pytest.approx(0.83193, abs=1e-7)  # a learned 0.1 went through float32
    return bilevel.hypergradient(((w - 2) ** 2 / 2).sum())


@pytest.mark.parametrize(("window", "value"), [(None, 0.1836906882), (2, 0.1424811786)])
def test_gradient_descent_on_the_scalar_ridge(window: int | None, value: float):
    assert descent(window)[0].item() == pytest.approx(value, abs=1e-10)


@pytest.mark.parametrize("how", ["identity", "log", "sigmoid"])
def test_learned_rate_on_the_scalar_ridge(how: str):
    """w_K = (b/A)(1 - (1-ηA)^K) with A = a + φ = 3, b = 3: dw_K/dη = b K (1-ηA)^(K-1)."""
    chain = {"identity": 1.0, "log": 0.1, "sigmoid": 0.1 * 0.9}[how]
    phi, eta = descent(None, how)
    assert phi.item() == pytest.approx(0.1836906882, abs=1e-7)
    expected = (0.83193 - 2) * 3 * 5 * 0.7**4 * chain
    assert eta.item() == pytest.approx(expected, rel=1e-6)


def test_learned_rate_in_a_window():
    """The last two steps, from w_3 = 1 - 0.7³: dw = (1-ηA) dw - (A w - b) at w_3 and w_4."""
    w3, w4 = 1 - 0.7**3, 1 - 0.7**4
    slope = 0.7 * (3 - 3 * w3) + (3 - 3 * w4)
    assert descent(2, "identity")[1].item() == pytest.approx((0.83193 - 2) * slope, rel=1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.3])
def test_from_an_optimum_many_steps_are_the_implicit_hypergradient(momentum: float):
    g = torch.Generator().manual_seed(3)
    X, y = torch.randn(12, 4, generator=g), torch.randn(12, generator=g)
    w = nn.Parameter(torch.zeros(4))
    phi = nn.Parameter(0.3 * torch.randn(12, generator=g))

    def inner_loss() -> Tensor:
        return (phi.exp() * F.softplus(-y * (X @ w))).mean() + w.square().sum()

    def outer_loss() -> Tensor:
        return (w - 1).square().sum() + (X @ w).cosh().mean() + 0.1 * phi.square().sum()

    solver = OPTIM.SGD([w], lr=0.3)
    for _ in range(200):
        solver.zero_grad()
        inner_loss().backward(inputs=[w])
        solver.step()
    outer = OPTIM.SGD([phi], lr=0.1)
    bilevel = BilevelOptimizer(
        OPTIM.SGD([w], lr=0.3, momentum=momentum), outer, estimator=Unrolled()
    )
    for _ in range(60):
        bilevel.inner_step(inner_loss)
    (found,) = bilevel.hypergradient(outer_loss())
    exact = BilevelOptimizer(
        OPTIM.SGD([w], lr=0.3), outer, estimator=ImplicitDifferentiation(DenseSolve())
    )
    (expected,) = exact.hypergradient(outer_loss(), inner_loss)
    assert_close([found], [expected], 1e-8)
    assert_close([expected], [implicit_by_hand(inner_loss, outer_loss, [w], [phi])], 1e-8)


# --- zero second moments ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["adam", "amsgrad", "adamw", "nadam", "radam", "adamax", "adagrad", "rmsprop-centered"]
)
def test_dead_inputs_are_no_nan(name: str):
    """Column 2 of the data is zero, so the gradient there is, and with it the second moment."""
    case = BY_NAME[name]
    X = A.clone()
    X[:, 2] = 0.0
    groups = [{k: v for k, v in g.items() if k != "weight_decay"} for g in case.groups]

    def loss(p: Sequence[Tensor], phi: Tensor) -> Tensor:
        return (phi.exp() * (torch.tanh(X @ p[0]) * p[1] - Y) ** 2).mean()

    def make(theta: Sequence[Tensor]) -> OPTIM.Optimizer:
        known = [{"params": [p], **g} for p, g in zip(theta, groups, strict=True)]
        return case.optimizer(known, **{**case.common, "weight_decay": 0.0})

    theta, phi = fresh(), nn.Parameter(PHI.clone())
    inner = make(theta)
    etas = learned_of(inner, [LR])
    bilevel = BilevelOptimizer(inner, OPTIM.SGD([phi, *etas], lr=0.1), estimator=Unrolled())
    for _ in range(case.steps):
        bilevel.inner_step(lambda: loss(theta, phi))
    assert theta[0][2] == START[0][2]
    found = bilevel.hypergradient(val_loss(theta, phi))

    def run(at: list[Tensor]) -> float:
        p = fresh()
        plain = make(p)
        for group, log in zip(plain.param_groups, at[1:], strict=True):
            group["lr"] = log.exp().item()
        for _ in range(case.steps):
            plain.zero_grad()
            loss(p, at[0]).backward()
            plain.step()
        return val_loss(p, at[0]).item()

    assert_close(
        found, finite_differences(run, [PHI, *(q.detach() for q in etas)], 5e-4), 1e-6, 1e-2
    )
    assert bilevel.report.trouble() == []


# --- starting points ----------------------------------------------------------------------------

STARTS = ["sgd", "sgd-momentum", "adam", "rmsprop", "adagrad", "rprop"]


def started(
    case: Case, window: int | None = None, steps: int | None = None
) -> tuple[BilevelOptimizer, list[nn.Parameter], list[nn.Parameter]]:
    """(after the steps, θ, [φ, *start]); θ held something else before."""
    theta = [nn.Parameter(torch.full_like(p, 9.0)) for p in START]
    phi, start = nn.Parameter(PHI.clone()), fresh()
    bilevel = BilevelOptimizer(
        case.make(theta), OPTIM.SGD([phi, *start], lr=0.1), estimator=Unrolled(window)
    )
    bilevel.inner_step(lambda: train_loss(theta, phi))  # forgotten, and its state with it
    bilevel.start_from(start)
    for _ in range(case.steps if steps is None else steps):
        bilevel.inner_step(lambda: train_loss(theta, phi))
    return bilevel, theta, [phi, *start]


@pytest.mark.parametrize("name", STARTS)
def test_hypergradient_in_the_starting_point(name: str):
    case = BY_NAME[name]
    bilevel, theta, outer = started(case)
    found = bilevel.hypergradient(val_loss(theta, outer[0]))
    phi, *start = (q.detach().clone().requires_grad_() for q in outer)
    hyper = with_learned(case.make(fresh()).param_groups, (), ())
    end, _ = unroll(case.step, start, [partial(train_loss, phi=phi)] * case.steps, hyper)
    assert_close([p.detach() for p in theta], [p.detach() for p in end], 1e-12)
    assert_close(found, torch.autograd.grad(val_loss(end, phi), [phi, *start]), 1e-10)

    def run(at: list[Tensor]) -> float:
        p = [nn.Parameter(q.clone()) for q in at[1:]]
        plain = case.make(p)
        for _ in range(case.steps):
            plain.zero_grad()
            train_loss(p, at[0]).backward()
            plain.step()
        return val_loss(p, at[0]).item()

    assert_close(found, finite_differences(run, [q.detach() for q in outer], 5e-4), 1e-6, 1e-2)


@pytest.mark.parametrize("window", [1, 4])
def test_a_window_that_is_too_short_loses_the_starting_point(window: int):
    bilevel, theta, (phi, *_) = started(BY_NAME["adam"], window)
    first, *start = bilevel.hypergradient(val_loss(theta, phi))
    assert first is not None
    assert all(g is None or not g.any() for g in start)


def test_a_window_that_just_reaches_keeps_the_starting_point():
    whole, theta, (phi, *_) = started(BY_NAME["adam"])
    expected = whole.hypergradient(val_loss(theta, phi))
    bilevel, theta, (phi, *_) = started(BY_NAME["adam"], window=5)
    found = bilevel.hypergradient(val_loss(theta, phi))
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_tasks_accumulate():
    """MAML over two tasks: each starts anew, and the sum is that of the single ones."""
    theta, start = fresh(), fresh()
    phis = [PHI, -PHI]
    bilevel = BilevelOptimizer(
        OPTIM.SGD(theta, lr=0.1), OPTIM.SGD(start, lr=0.1), estimator=Unrolled()
    )
    bilevel.outer.zero_grad()
    expected = [torch.zeros_like(p) for p in START]
    for phi in phis:
        bilevel.start_from(start)
        for _ in range(3):
            bilevel.inner_step(lambda phi=phi: train_loss(theta, phi))
        bilevel.accumulate(val_loss(theta, phi))
        again = [p.detach().clone().requires_grad_() for p in start]
        end, _ = unroll(sgd, again, [partial(train_loss, phi=phi)] * 3, [{"lr": 0.1}] * 2)
        parts = torch.autograd.grad(val_loss(end, phi), again)
        expected = [e + g for e, g in zip(expected, parts, strict=True)]
    assert_close([p.grad for p in start], expected, 1e-10)
    assert_close([p.detach() for p in start], START, 1e-15)


def test_after_an_outer_step_the_starting_point_is_constant():
    bilevel, theta, (phi, *_) = started(BY_NAME["sgd"])
    bilevel.outer_step(val_loss(theta, phi))
    bilevel.inner_step(lambda: train_loss(theta, phi))
    _, *start = bilevel.hypergradient(val_loss(theta, phi))
    assert all(g is None or not g.any() for g in start)


def test_implicit_with_a_proximal_term():
    """λ (H + λI)⁻¹ b, where the training loss without the term has the Hessian H."""
    problem = proximal()
    w, phi = problem.inner[0], problem.outer[0]
    bilevel = BilevelOptimizer(OPTIM.SGD([w], lr=0.2), OPTIM.SGD([phi], lr=0.1), ihvp=DenseSolve())
    bilevel.start_from([phi])
    for _ in range(200):
        bilevel.inner_step(problem.train_loss)
    (found,) = bilevel.hypergradient(problem.val_loss())
    H, b = torch.diag(tensor(1.0, 3.0)), w.detach() - tensor(1.0, 0.0)
    expected = 2.0 * torch.linalg.solve(H + 2.0 * torch.eye(2), b)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0.0)
    torch.testing.assert_close(found, tensor(-4 / 9, 6 / 25), rtol=1e-10, atol=0.0)


def test_unrolled_with_a_proximal_term_tends_to_the_implicit_one():
    problem = proximal()
    w, phi = problem.inner[0], problem.outer[0]
    bilevel = BilevelOptimizer(
        OPTIM.SGD([w], lr=0.2), OPTIM.SGD([phi], lr=0.1), estimator=Unrolled()
    )
    bilevel.start_from([phi])
    for _ in range(100):
        bilevel.inner_step(problem.train_loss)
    (found,) = bilevel.hypergradient(problem.val_loss())
    torch.testing.assert_close(found, tensor(-4 / 9, 6 / 25), rtol=1e-10, atol=0.0)


# --- modules with buffers and randomness --------------------------------------------------------


class Weighted(nn.Module):
    """Batch normalisation and dropout in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x).squeeze(-1)
        return out


def weighted_loss(outputs: Tensor, phi: Tensor) -> Tensor:
    return (phi.exp() * (outputs - Y) ** 2).mean()


@pytest.mark.parametrize("evaluation", [True, False])
def test_dropout_and_batch_norm(evaluation: bool):
    """The masks of the steps come back, and so do the running averages."""
    model, phi = Weighted(), nn.Parameter(PHI.clone())
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    inner = OPTIM.Adam(model.parameters(), lr=0.05, eps=1e-2)
    etas = in_float64(learn_hyperparameter(inner, "lr"))
    bilevel = BilevelOptimizer(inner, OPTIM.SGD([phi, *etas], lr=0.1), estimator=Unrolled())

    torch.manual_seed(5)
    for _ in range(4):
        bilevel.inner_step(lambda: weighted_loss(model(A), phi))
    model.train(not evaluation)
    loss = ((model(A.flip(0)) - Y) ** 2).mean()
    model.train()
    random, running = torch.get_rng_state(), [b.clone() for b in model.buffers()]
    found = bilevel.hypergradient(loss)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(map(torch.equal, model.buffers(), running))

    free, log = (q.detach().clone().requires_grad_() for q in (phi, *etas))
    hyper = {**inner.defaults, "lr": log.exp()}

    def forward(theta: Sequence[Tensor], x: Tensor) -> Tensor:
        used = {name: b.clone() for name, b in buffers.items()}
        out: Tensor = functional_call(model, {**dict(zip(weights, theta, strict=True)), **used}, x)
        buffers.update({name: b.detach() for name, b in used.items()})
        return out

    torch.manual_seed(5)
    losses = [lambda theta: weighted_loss(forward(theta, A), free)] * 4
    end, _ = unroll(adam, list(weights.values()), losses, [hyper] * len(weights))
    model.train(not evaluation)
    expected = torch.autograd.grad(((forward(end, A.flip(0)) - Y) ** 2).mean(), [free, log])
    assert_close(found, expected, 1e-10)
    assert bilevel.report.trouble() == []


def test_dropout_and_batch_norm_by_finite_differences():
    def run(at: list[Tensor], bilevel: bool = False) -> Any:
        torch.manual_seed(7)
        model, phi = Weighted(), nn.Parameter(at[0].clone())
        inner = OPTIM.Adam(model.parameters(), lr=0.05, eps=1e-2)
        both = BilevelOptimizer(inner, OPTIM.SGD([phi], lr=0.1), estimator=Unrolled())
        for _ in range(4):
            both.inner_step(lambda: weighted_loss(model(A), phi))
        loss = ((model(A.flip(0)) - Y) ** 2).mean()
        return both.hypergradient(loss) if bilevel else loss.item()

    assert_close(run([PHI], bilevel=True), finite_differences(run, [PHI]), 1e-6)


# --- closures -----------------------------------------------------------------------------------


def quadratic(w: Tensor, x: Tensor, y: Tensor, phi: Tensor) -> Tensor:
    return ((phi * x) @ w - y).square().mean()


def batches() -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(2)
    return [(torch.randn(3, 4, generator=g), torch.randn(3, generator=g)) for _ in range(4)]


def over_batches() -> tuple[Tensor, Tensor]:
    """(θ, hypergradient) over the batches in order, by plain autograd."""
    phi = torch.ones(4, requires_grad=True)
    losses = [
        lambda theta, x=x, y=y: quadratic(theta[0], x, y, phi) + theta[0].pow(4).sum() / 10
        for x, y in batches()
    ]
    (end,), _ = unroll(sgd, [START[0]], losses, [{"lr": 0.1, "momentum": 0.5}])
    return end.detach(), torch.autograd.grad((end - 1).square().sum(), phi)[0]


class Loop:
    def __init__(self) -> None:
        self.w = nn.Parameter(START[0].clone())
        self.phi = nn.Parameter(torch.ones(4))
        self.bilevel = BilevelOptimizer(
            OPTIM.SGD([self.w], lr=0.1, momentum=0.5),
            OPTIM.SGD([self.phi], lr=0.1),
            estimator=Unrolled(),
        )

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return quadratic(self.w, x, y, self.phi) + self.w.pow(4).sum() / 10

    def hypergradient(self) -> Tensor:
        (found,) = self.bilevel.hypergradient((self.w - 1).square().sum())
        assert found is not None
        return found

    def check(self) -> None:
        end, expected = over_batches()
        torch.testing.assert_close(self.w.detach(), end, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(self.hypergradient(), expected, rtol=1e-10, atol=1e-12)


class Batch:
    """A closure as a bound method, or as an object."""

    def __init__(self, loop: Loop, x: Tensor, y: Tensor) -> None:
        self.loop, self.x, self.y = loop, x, y

    def loss(self) -> Tensor:
        return self.loop.loss(self.x, self.y)

    __call__ = loss


def test_loop_that_rebinds_local_variables():
    loop = Loop()
    for x, y in batches():
        loop.bilevel.inner_step(lambda: loop.loss(x, y))  # noqa: B023
    loop.check()


def test_loop_that_rebinds_globals():
    """As in a script, where x and y are variables of the module."""
    loop = Loop()
    scope = {"loop": loop, "batches": batches}
    script = "for x, y in batches():\n    loop.bilevel.inner_step(lambda: loop.loss(x, y))\n"
    exec(script, scope)
    loop.check()


def test_loop_that_defines_its_closure_inside():
    loop = Loop()
    for x, y in batches():
        scale = 1.0

        def closure() -> Tensor:
            return scale * loop.loss(x, y)  # noqa: B023, F821

        loop.bilevel.inner_step(closure)
        del scale, closure
    loop.check()


def test_closure_with_an_inner_function():
    loop = Loop()
    for x, y in batches():

        def closure() -> Tensor:
            return sum((loop.loss(a, b) for a, b in [(x, y)]), torch.zeros(()))  # noqa: B023

        loop.bilevel.inner_step(closure)
    loop.check()


def test_defaults_partials_methods_and_objects():
    makers: list[Callable[[Loop, Tensor, Tensor], Callable[[], Tensor]]] = [
        lambda loop, x, y: lambda a=x, b=y: loop.loss(a, b),
        lambda loop, x, y: partial(loop.loss, x, y=y),
        lambda loop, x, y: Batch(loop, x, y).loss,
        lambda loop, x, y: Batch(loop, x, y),
    ]
    for make in makers:
        loop = Loop()
        for x, y in batches():
            loop.bilevel.inner_step(make(loop, x, y))
        loop.check()


def test_keyword_only_defaults():
    loop = Loop()
    for x, y in batches():
        loop.bilevel.inner_step(lambda *, a=x, b=y: loop.loss(a, b))
    loop.check()


def test_loss_with_outputs_and_per_sample_losses():
    loops = [Loop(), Loop()]
    for x, y in batches():
        a, b = loops

        def rows(x: Tensor = x, y: Tensor = y, a: Loop = a) -> PerSample:
            return PerSample(((a.phi * x) @ a.w - y).square(), None, a.w.pow(4).sum() / 10)

        a.bilevel.inner_step(rows)
        b.bilevel.inner_step(lambda x=x, y=y, b=b: (b.loss(x, y), x @ b.w))
    for loop in loops:
        loop.check()


def test_closure_that_draws_its_own_batch():
    loop, stream = Loop(), itertools.cycle(batches())
    for _ in range(3):
        loop.bilevel.inner_step(lambda: loop.loss(*next(stream)))
    with pytest.raises(RuntimeError, match="repeatable"):
        loop.hypergradient()


def test_closure_whose_stream_has_ended():
    """Called again it raises: the user should still read what is wrong with it."""
    loop, stream = Loop(), iter(batches())
    for _ in range(4):
        loop.bilevel.inner_step(lambda: loop.loss(*next(stream)))
    with pytest.raises(RuntimeError, match="repeatable"):
        loop.hypergradient()


def test_function_that_reads_what_the_loop_changes():
    """A dict among its variables is one of them, and as it was then."""
    loop, current = Loop(), {}
    expected = Loop()
    for x, y in batches():
        current.update(x=x, y=y)
        loop.bilevel.inner_step(lambda: loop.loss(**current))
        expected.bilevel.inner_step(lambda x=x, y=y: expected.loss(x, y))
    for found, known in zip(loop.hypergradient(), expected.hypergradient(), strict=True):
        assert torch.equal(found, known)


def test_function_that_reads_deeper_what_the_loop_changes():
    loop, current = Loop(), {"batch": {}}
    for x, y in batches():
        current["batch"].update(x=x, y=y)
        loop.bilevel.inner_step(lambda: loop.loss(**current["batch"]))
    with pytest.raises(RuntimeError, match="repeatable"):
        loop.hypergradient()


def test_batch_drawn_from_torchs_stream_is_drawn_again():
    loop, data = Loop(), batches()

    def closure() -> Tensor:
        return loop.loss(*data[int(torch.randint(4, ()))])

    for _ in range(4):
        loop.bilevel.inner_step(closure)
    found = loop.hypergradient()
    torch.manual_seed(0)
    picks = [data[int(torch.randint(4, ()))] for _ in range(4)]
    phi = torch.ones(4, requires_grad=True)
    losses = [
        lambda theta, x=x, y=y: quadratic(theta[0], x, y, phi) + theta[0].pow(4).sum() / 10
        for x, y in picks
    ]
    (end,), _ = unroll(sgd, [START[0]], losses, [{"lr": 0.1, "momentum": 0.5}])
    expected = torch.autograd.grad((end - 1).square().sum(), phi)[0]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_without_steps_or_closures():
    loop = Loop()
    with pytest.raises(RuntimeError, match="no inner step on record"):
        loop.hypergradient()
    x, y = batches()[0]
    with pytest.raises(RuntimeError, match="closure"):
        loop.bilevel.inner_step(loop.loss(x, y))


# --- settings that change, and parameters of every kind -------------------------------------------


def scheduled(lr: float | Tensor, momentum: bool = False) -> tuple[BilevelOptimizer, Any, Any]:
    theta, phi = fresh(), nn.Parameter(PHI.clone())
    inner = OPTIM.SGD(theta, lr=lr, momentum=0.9)
    bilevel = BilevelOptimizer(inner, OPTIM.SGD([phi], lr=0.1), estimator=Unrolled())
    schedule = OPTIM.lr_scheduler.ExponentialLR(inner, 0.5)
    for _ in range(5):
        bilevel.inner_step(lambda: train_loss(theta, phi))
        schedule.step()
    return bilevel, theta, phi


def by_schedule() -> tuple[Tensor, ...]:
    phi = PHI.clone().requires_grad_()
    hyper = [{"lr": 0.2 * 0.5**t, "momentum": 0.9} for t in range(5)]
    end, _ = unroll(sgd, START, [partial(train_loss, phi=phi)] * 5, [hyper] * 2)
    return torch.autograd.grad(val_loss(end, phi), phi)


def test_scheduled_rates():
    bilevel, theta, phi = scheduled(0.2)
    assert_close(bilevel.hypergradient(val_loss(theta, phi)), by_schedule(), 1e-10)
    assert bilevel.report.trouble() == []


def test_scheduled_rate_that_is_a_tensor():
    """A scheduler fills it in place: each step had its own value."""
    bilevel, theta, phi = scheduled(torch.tensor(0.2))
    assert_close(bilevel.hypergradient(val_loss(theta, phi)), by_schedule(), 1e-10)
    assert bilevel.report.trouble() == []


def test_cycled_momentum():
    theta, phi = fresh(), nn.Parameter(PHI.clone())
    inner = OPTIM.SGD(theta, lr=0.1, momentum=0.9)
    schedule = OPTIM.lr_scheduler.OneCycleLR(inner, max_lr=0.2, total_steps=6)
    bilevel = BilevelOptimizer(inner, OPTIM.SGD([phi], lr=0.1), estimator=Unrolled())
    hyper = []
    for _ in range(5):
        group = inner.param_groups[0]
        hyper.append({"lr": group["lr"], "momentum": group["momentum"]})
        bilevel.inner_step(lambda: train_loss(theta, phi))
        schedule.step()
    found = bilevel.hypergradient(val_loss(theta, phi))
    free = PHI.clone().requires_grad_()
    end, _ = unroll(sgd, START, [partial(train_loss, phi=free)] * 5, [hyper] * 2)
    assert_close(found, torch.autograd.grad(val_loss(end, free), free), 1e-10)


def test_a_rate_beside_a_learned_one_may_be_scheduled():
    """learn_hyperparameter owns weight_decay; the scheduler owns lr."""
    theta, phi = fresh(), nn.Parameter(PHI.clone())
    inner = OPTIM.SGD(theta, lr=0.2, weight_decay=0.1)
    (log,) = in_float64(learn_hyperparameter(inner, "weight_decay"))
    bilevel = BilevelOptimizer(inner, OPTIM.SGD([phi, log], lr=0.1), estimator=Unrolled())
    schedule = OPTIM.lr_scheduler.ExponentialLR(inner, 0.5)
    for _ in range(5):
        bilevel.inner_step(lambda: train_loss(theta, phi))
        schedule.step()
    found = bilevel.hypergradient(val_loss(theta, phi))
    free, again = (q.detach().clone().requires_grad_() for q in (phi, log))
    hyper = [{"lr": 0.2 * 0.5**t, "weight_decay": again.exp()} for t in range(5)]
    end, _ = unroll(sgd, START, [partial(train_loss, phi=free)] * 5, [hyper] * 2)
    assert_close(found, torch.autograd.grad(val_loss(end, free), [free, again]), 1e-10)


@pytest.mark.parametrize("name", ["sgd-momentum", "adam", "adagrad", "rmsprop-centered"])
def test_frozen_and_unused_parameters(name: str):
    """They stay where they are, and the rest is as without them."""
    case = BY_NAME[name]
    theta, phi = fresh(), nn.Parameter(PHI.clone())
    frozen, unused = nn.Parameter(torch.ones(2), requires_grad=False), nn.Parameter(torch.ones(3))
    groups = [
        {"params": [frozen, theta[0]], **case.groups[0]},
        {"params": [theta[1], unused], **case.groups[1]},
    ]
    inner = case.optimizer(groups, **case.common)
    etas = learned_of(inner, case.learn)
    bilevel = BilevelOptimizer(inner, OPTIM.SGD([phi, *etas], lr=0.1), estimator=Unrolled())
    for _ in range(case.steps):
        bilevel.inner_step(lambda: train_loss(theta, phi) + frozen.sum())
    found = bilevel.hypergradient(val_loss(theta, phi) + unused.sum())
    assert_close(found, by_hand(case, case.learn, [q.detach() for q in etas]), 1e-10)
    assert torch.equal(unused, torch.ones(3))


@pytest.mark.parametrize("name", ["sgd-momentum", "adam", "rmsprop"])
def test_parameters_used_every_other_step(name: str):
    """The optimizer leaves a parameter without gradient alone, its state included."""
    case = BY_NAME[name]
    theta, phi = fresh(), nn.Parameter(PHI.clone())
    inner = case.make(theta)
    etas = learned_of(inner, case.learn)
    bilevel = BilevelOptimizer(inner, OPTIM.SGD([phi, *etas], lr=0.1), estimator=Unrolled())

    def without(p: Sequence[Tensor], phi: Tensor) -> Tensor:
        return (phi.exp() * (p[0].sum() - Y) ** 2).mean() / 10

    kinds = [train_loss, without, train_loss, without, train_loss]
    for kind in kinds:
        bilevel.inner_step(lambda kind=kind: kind(theta, phi))
    found = bilevel.hypergradient(val_loss(theta, phi))
    outer = [q.detach().clone().requires_grad_() for q in (phi, *etas)]
    hyper = with_learned(case.make(fresh()).param_groups, case.learn, outer[1:])
    end, _ = unroll(case.step, START, [partial(k, phi=outer[0]) for k in kinds], hyper)
    assert_close(found, torch.autograd.grad(val_loss(end, outer[0]), outer), 1e-10)


def test_tied_parameters():
    """A tensor that the model uses twice is one parameter."""
    first, second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    second.weight = first.weight
    model = nn.Sequential(first, nn.Tanh(), second)
    phi = nn.Parameter(torch.zeros(6))
    x, start = A[:, :3], first.weight.detach().clone()
    bilevel = BilevelOptimizer(
        OPTIM.Adam(model.parameters(), lr=0.1), OPTIM.SGD([phi], lr=0.1), estimator=Unrolled()
    )
    for _ in range(5):
        bilevel.inner_step(lambda: (phi.exp() * (model(x) - 1).square().mean(1)).mean())
    found = bilevel.hypergradient(model(x.flip(1)).square().mean())

    def out(w: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(x @ w.mT) @ w.mT

    free = torch.zeros(6, requires_grad=True)
    loss = lambda theta: (free.exp() * (out(theta[0], x) - 1).square().mean(1)).mean()  # noqa: E731
    (end,), _ = unroll(adam, [start], [loss] * 5, [OPTIM.Adam([start], lr=0.1).defaults])
    assert_close(found, torch.autograd.grad(out(end, x.flip(1)).square().mean(), free), 1e-10)


@pytest.mark.parametrize("name", [c.name for c in CASES if c.name != "rprop"])
def test_bfloat16_parameters_run(name: str):
    torch.set_default_dtype(torch.float32)
    case = BY_NAME[name]
    theta = [nn.Parameter(p.detach().bfloat16()) for p in START]
    phi = nn.Parameter(PHI.float())
    inner = case.make(theta)
    etas = learn_hyperparameter(inner, "lr")
    bilevel = BilevelOptimizer(inner, OPTIM.SGD([phi, *etas], lr=0.1), estimator=Unrolled())
    x, y = A.bfloat16(), Y.bfloat16()

    def loss(target: Tensor) -> Tensor:
        return (phi.exp() * (torch.tanh(x @ theta[0]) * theta[1] - target).float() ** 2).mean()

    for _ in range(case.steps):
        bilevel.inner_step(lambda: loss(y))
    found = bilevel.hypergradient(loss(y.flip(0)))
    for q, g in zip([phi, *etas], found, strict=True):
        assert g is not None
        assert g.dtype == q.dtype
        assert g.isfinite().all()
    exact_theta, exact = fresh(), nn.Parameter(PHI.float().double())
    float64 = BilevelOptimizer(
        case.make(exact_theta), OPTIM.SGD([exact], lr=0.1), estimator=Unrolled()
    )

    def reference(target: Tensor) -> Tensor:
        out = torch.tanh(A @ exact_theta[0]) * exact_theta[1]
        return (exact.exp() * (out - target) ** 2).mean()

    for _ in range(case.steps):
        float64.inner_step(lambda: reference(Y))
    (expected,) = float64.hypergradient(reference(Y.flip(0)))
    assert F.cosine_similarity(found[0].double(), expected, 0) > 0.9


def test_grad_scaler_changes_nothing():
    case = BY_NAME["sgd-momentum"]
    theta, phi = fresh(), nn.Parameter(PHI.clone())
    bilevel = BilevelOptimizer(
        case.make(theta),
        OPTIM.SGD([phi], lr=0.1),
        estimator=Unrolled(),
        grad_scaler=torch.amp.GradScaler("cpu", init_scale=8.0),
    )
    for _ in range(case.steps):
        bilevel.inner_step(lambda: train_loss(theta, phi))
    assert_close(bilevel.hypergradient(val_loss(theta, phi)), by_hand(case), 1e-10)


def test_a_step_that_a_grad_scaler_skips_is_no_step():
    """The first one overflows in float32 once scaled, and the scale falls."""

    def run(scaler: torch.amp.GradScaler | None, steps: int) -> tuple[Tensor, list[str]]:
        w, phi = torch.ones(2, dtype=torch.float32, requires_grad=True), parameter(0.0)
        bilevel = BilevelOptimizer(
            OPTIM.SGD([w], lr=1e-12),
            OPTIM.SGD([phi], lr=0.1),
            estimator=Unrolled(),
            grad_scaler=scaler,
        )
        for t in range(steps):
            bilevel.inner_step(lambda: 1e10 * (w.square().sum() + (phi * w).sum()))
            assert bool((w == 1).all()) == (t == 0 and scaler is not None)
        (found,) = bilevel.hypergradient(w.square().sum())
        return found, bilevel.report.trouble()

    scaler = torch.amp.GradScaler("cpu", init_scale=1e30, backoff_factor=1e-28)
    (found, trouble), (expected, _) = run(scaler, 3), run(None, 2)
    assert trouble == []
    torch.testing.assert_close(found, expected)


def test_steps_that_a_grad_scaler_skips_all():
    w, phi = torch.ones(2, dtype=torch.float32, requires_grad=True), parameter(0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1e38, backoff_factor=0.99)
    bilevel = BilevelOptimizer(
        OPTIM.SGD([w], lr=1e-12),
        OPTIM.SGD([phi], lr=0.1),
        estimator=Unrolled(),
        grad_scaler=scaler,
    )
    bilevel.inner_step(lambda: 1e10 * (w.square().sum() + (phi * w).sum()))
    bilevel.outer_step(w.square().sum())
    assert phi.grad == 0


# --- what is refused ----------------------------------------------------------------------------


class Plain(OPTIM.Optimizer):
    """An optimizer of the user's, without a ``differentiable`` form."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.data -= group["lr"] * p.grad


@pytest.mark.parametrize("optimizer", [OPTIM.LBFGS, OPTIM.SparseAdam, Plain])
def test_optimizers_without_a_differentiable_form(optimizer: type[OPTIM.Optimizer]):
    w, phi = parameter(1.0), parameter(1.0)
    with pytest.raises(ValueError, match=f"{optimizer.__name__}.*PZOBO"):
        BilevelOptimizer(optimizer([w]), OPTIM.SGD([phi], lr=0.1), estimator=Unrolled())


@pytest.mark.parametrize("kind", ["pre", "post"])
def test_hooks_around_the_step(kind: str):
    loop = Loop()
    for x, y in batches()[:2]:
        loop.bilevel.inner_step(lambda x=x, y=y: loop.loss(x, y))
    register = getattr(loop.bilevel.inner, f"register_step_{kind}_hook")
    handle = register(lambda *_: None)
    with pytest.raises(ValueError, match=r"hooks.*PZOBO"):
        loop.hypergradient()
    with pytest.raises(ValueError, match=r"hooks.*PZOBO"):
        BilevelOptimizer(loop.bilevel.inner, loop.bilevel.outer, estimator=Unrolled())
    handle.remove()
    loop.hypergradient()


@pytest.mark.parametrize("window", [0, -1, 1.5, True, "2"])
def test_windows_that_are_no_counts(window: Any):
    with pytest.raises((ValueError, TypeError), match="window"):
        Unrolled(window)


@pytest.mark.parametrize("raw", [True, False])
def test_implicit_estimators_refuse_a_learned_rate(raw: bool):
    w, phi = parameter(1.0), parameter(1.0)
    lr = torch.tensor(0.1, requires_grad=True)
    inner = OPTIM.SGD([w], lr=lr if raw else 0.1)
    etas = [lr] if raw else learn_hyperparameter(inner, "lr")
    for outer in ([phi, *etas], etas):
        for extra in ({}, {"ihvp": DenseSolve()}):
            with pytest.raises(ValueError, match=r"(?s)Unrolled.*PZOBO|PZOBO.*Unrolled"):
                BilevelOptimizer(inner, OPTIM.SGD(outer, lr=0.1), **extra)


def test_what_cannot_be_learned():
    w = parameter(1.0)
    inner = OPTIM.SGD([w], lr=0.1, momentum=0.0)
    with pytest.raises(ValueError, match="nesterov"):
        learn_hyperparameter(inner, "nesterov")
    with pytest.raises(ValueError, match="'lr'"):
        learn_hyperparameter(inner, "rate")
    for how in ("log", "sigmoid"):
        with pytest.raises(ValueError, match=r"momentum = 0\.0"):
            learn_hyperparameter(inner, "momentum", how)
    with pytest.raises(ValueError, match="transform"):
        learn_hyperparameter(inner, "lr", "exp")
    for index in (None, 2, -1):
        with pytest.raises(ValueError, match="betas"):
            learn_hyperparameter(OPTIM.Adam([w]), "betas", "sigmoid", index=index)


ZERO_DECAY = [
    Case("sgd", OPTIM.SGD, sgd, LRS, ()),
    Case("adam", OPTIM.Adam, adam, LRS, (), common={"weight_decay": 0.0}),
    Case("adamw", OPTIM.AdamW, adamw, LRS, (), common={"weight_decay": 0.0}),
    Case("rmsprop", OPTIM.RMSprop, rmsprop, LRS, (), common={"eps": 0.1}),
]
ZERO_MOMENTUM = [ZERO_DECAY[0], ZERO_DECAY[3]]


def learned_from_zero(case: Case, name: str) -> tuple[Sequence[Any], list[Tensor], list[Tensor]]:
    """(found, by hand, η): at 0 torch skips the term, whose derivative is not zero there."""
    learn = ((name, "identity", None),)
    bilevel, theta, outer = unrolled(case, learn)
    found = bilevel.hypergradient(val_loss(theta, outer[0]))
    etas = [q.detach() for q in outer[1:]]
    return found, by_hand(case, learn, etas), etas


@pytest.mark.parametrize("case", ZERO_DECAY, ids=str)
def test_decay_learned_from_zero(case: Case):
    found, expected, etas = learned_from_zero(case, "weight_decay")
    learn = (("weight_decay", "identity", None),)
    runs = finite_differences(lambda at: real_run(case, learn, at[0], at[1:]), [PHI, *etas], 5e-4)
    assert_close(expected, runs, 1e-6, 1e-3)
    assert_close(found, expected, 1e-10)


@pytest.mark.parametrize("case", ZERO_MOMENTUM, ids=str)
def test_momentum_learned_from_zero_is_refused(case: Case):
    """At zero the real run keeps no buffer, so the derivative is not on record."""
    with pytest.raises(ValueError, match="Start it above zero"):
        learned_from_zero(case, "momentum")


# --- trouble ------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", range(5))
def test_parameters_moved_between_steps(when: int):
    theta, phi = fresh(), nn.Parameter(PHI.clone())
    bilevel = BilevelOptimizer(
        OPTIM.SGD(theta, lr=0.1), OPTIM.SGD([phi], lr=0.1), estimator=Unrolled()
    )
    for t in range(5):
        bilevel.inner_step(lambda: train_loss(theta, phi))
        if t == when:
            with torch.no_grad():
                theta[1].clamp_(-0.2, 0.2)
    bilevel.hypergradient(val_loss(theta, phi))
    assert int(bilevel.report.astray) == 1
    (words,) = bilevel.report.trouble()
    assert "after 1 inner step(s)" in words


def test_a_projection_that_does_nothing_is_no_trouble():
    theta, phi = fresh(), nn.Parameter(PHI.clone())
    bilevel = BilevelOptimizer(
        OPTIM.Adam(theta, lr=0.1), OPTIM.SGD([phi], lr=0.1), estimator=Unrolled()
    )
    for _ in range(5):
        bilevel.inner_step(lambda: train_loss(theta, phi))
        with torch.no_grad():
            theta[1].clamp_(-100.0, 100.0)
    bilevel.hypergradient(val_loss(theta, phi))
    assert bilevel.report.trouble() == []


def test_float32_run_is_no_trouble():
    torch.set_default_dtype(torch.float32)
    model, phi = (
        nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)),
        nn.Parameter(PHI.float()),
    )
    x, y = A.float(), Y.float()
    bilevel = BilevelOptimizer(
        OPTIM.Adam(model.parameters(), lr=1e-2), OPTIM.SGD([phi], lr=0.1), estimator=Unrolled()
    )
    for _ in range(20):
        bilevel.inner_step(lambda: (phi.exp() * (model(x)[:, 0] - y) ** 2).mean())
    bilevel.outer_step(((model(x)[:, 0] - y.flip(0)) ** 2).mean())
    assert bilevel.report.trouble() == []


def test_growth_in_an_unstable_loop():
    """Each step multiplies by 1 - 0.5 · 8 = -3: in ten steps 3^10."""
    w, phi = parameter(1.0), parameter(1.0)
    bilevel = BilevelOptimizer(
        OPTIM.SGD([w], lr=0.5), OPTIM.SGD([phi], lr=0.1), estimator=Unrolled()
    )
    for _ in range(10):
        bilevel.inner_step(lambda: (4 * (w - phi) ** 2 + 0.1 * w).sum())
    bilevel.hypergradient(w.square().sum())
    assert float(bilevel.report.growth) == pytest.approx(3.0**10)
    (words,) = bilevel.report.trouble()
    assert "unstable" in words


def test_report():
    bilevel, theta, (phi,) = unrolled(BY_NAME["adam"])
    bilevel.outer_step(val_loss(theta, phi))
    report = bilevel.report
    assert report.strategy == "Unrolled(window=None)"
    assert (report.matvecs, report.gradients) == (5, 5)
    theta_grads = torch.autograd.grad(val_loss(theta, PHI), theta)
    assert float(report.rhs_norm) == pytest.approx(float(flat(theta_grads).norm()))
    assert int(report.astray) == 0
    assert "growth" in str(report)


# --- memory -------------------------------------------------------------------------------------


@dataclass
class Run:
    """A bilevel run with a learned rate and a learned momentum."""

    lr: float = 0.1
    theta: list[nn.Parameter] = field(default_factory=fresh)
    phi: nn.Parameter = field(default_factory=lambda: nn.Parameter(PHI.clone()))

    def __post_init__(self) -> None:
        self.inner = OPTIM.SGD(self.theta, lr=self.lr, momentum=0.5)
        self.etas = [
            *learn_hyperparameter(self.inner, "lr"),
            *learn_hyperparameter(self.inner, "momentum", "sigmoid"),
        ]
        outer = OPTIM.Adam([self.phi, *self.etas], lr=0.05)
        self.bilevel = BilevelOptimizer(self.inner, outer, estimator=Unrolled(3))

    def outer_steps(self, count: int, query: bool = False) -> None:
        for _ in range(count):
            for _ in range(4):
                self.bilevel.inner_step(lambda: train_loss(self.theta, self.phi))
            if query:
                self.bilevel.hypergradient(val_loss(self.theta, self.phi))
            self.bilevel.outer_step(val_loss(self.theta, self.phi))

    def everything(self) -> list[Tensor]:
        return [t.detach().clone() for t in (*self.theta, self.phi, *self.etas)]


def saved_and_loaded(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_resumed_run_continues_bit_for_bit():
    run = Run()
    run.outer_steps(2)
    state = saved_and_loaded(
        {"bilevel": run.bilevel.state_dict(), "theta": run.theta, "phi": run.phi}
    )
    run.outer_steps(3)
    other = Run(lr=0.3)
    with torch.no_grad():
        for mine, theirs in zip([*other.theta, other.phi], [*state["theta"], state["phi"]]):  # noqa: B905
            mine.copy_(theirs)
    other.bilevel.load_state_dict(state["bilevel"])
    other.outer_steps(3)
    assert all(map(torch.equal, run.everything(), other.everything()))
    assert run.inner.param_groups[0]["lr"] == other.inner.param_groups[0]["lr"]


def test_resumed_run_with_a_tensor_in_the_group():
    def make(value: float) -> tuple[BilevelOptimizer, list[nn.Parameter], Tensor]:
        theta, lr = fresh(), torch.tensor(value, requires_grad=True)
        outer = OPTIM.Adam([lr], lr=0.01)
        return BilevelOptimizer(OPTIM.Adam(theta, lr=lr), outer, estimator=Unrolled()), theta, lr

    def go(bilevel: BilevelOptimizer, theta: list[nn.Parameter]) -> None:
        for _ in range(2):
            for _ in range(3):
                bilevel.inner_step(lambda: train_loss(theta, PHI))
            bilevel.outer_step(val_loss(theta, PHI))

    bilevel, theta, lr = make(0.1)
    go(bilevel, theta)
    state = saved_and_loaded({"bilevel": bilevel.state_dict(), "theta": theta})
    go(bilevel, theta)
    again, other, rate = make(0.3)
    with torch.no_grad():
        for mine, theirs in zip(other, state["theta"], strict=True):
            mine.copy_(theirs)
    again.load_state_dict(state["bilevel"])
    go(again, other)
    assert torch.equal(lr, rate)
    assert all(map(torch.equal, theta, other))
    assert again.inner.param_groups[0]["lr"] is rate


def test_loading_forgets_steps_on_record():
    run = Run()
    run.outer_steps(1)
    state = run.bilevel.state_dict()
    run.bilevel.inner_step(lambda: train_loss(run.theta, run.phi))
    run.bilevel.load_state_dict(state)
    with pytest.raises(RuntimeError, match="no inner step on record"):
        run.bilevel.outer_step(val_loss(run.theta, run.phi))


def test_hypergradient_is_a_pure_query():
    run, other = Run(), Run()
    run.outer_steps(3)
    other.outer_steps(3, query=True)
    assert all(map(torch.equal, run.everything(), other.everything()))
    for _ in range(4):
        run.bilevel.inner_step(lambda: train_loss(run.theta, run.phi))
    loss = val_loss(run.theta, run.phi)
    before, grads = run.everything(), [p.grad.clone() for p in run.theta]
    momenta = [run.inner.state[p]["momentum_buffer"].clone() for p in run.theta]
    first, second = run.bilevel.hypergradient(loss), run.bilevel.hypergradient(loss)
    assert all(map(torch.equal, first, second))
    assert all(map(torch.equal, before, run.everything()))
    assert all(map(torch.equal, grads, (p.grad for p in run.theta)))
    assert all(
        torch.equal(run.inner.state[p]["momentum_buffer"], m)
        for p, m in zip(run.theta, momenta, strict=True)
    )
    run.bilevel.outer_step(loss)
    outer = [run.phi, *run.etas]
    assert all(torch.equal(q.grad, g) for q, g in zip(outer, first, strict=True))


def test_each_outer_step_starts_a_new_record():
    """The second hypergradient goes through the steps since the first outer step alone."""
    theta, phi = fresh(), nn.Parameter(PHI.clone())
    bilevel = BilevelOptimizer(
        OPTIM.SGD(theta, lr=0.1), OPTIM.SGD([phi], lr=0.0), estimator=Unrolled()
    )
    for _ in range(2):
        start = [p.detach().clone() for p in theta]
        for _ in range(3):
            bilevel.inner_step(lambda: train_loss(theta, phi))
        bilevel.outer_step(val_loss(theta, phi))
    free = PHI.clone().requires_grad_()
    end, _ = unroll(sgd, start, [partial(train_loss, phi=free)] * 3, [{"lr": 0.1}] * 2)
    assert_close([phi.grad], torch.autograd.grad(val_loss(end, free), free), 1e-10)
