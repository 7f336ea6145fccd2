"""Law: a wrong use fails at once, with the exception that fits, and the message says what to do.

Each `@wrong` function is one wrong use.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import LBFGS, SGD

import hyperopt_torch
from hyperopt_torch import (
    IHVP,
    BilevelOptimizer,
    ConjugateGradient,
    Curvature,
    DenseSolve,
    Hessian,
    HypergradientEstimator,
    Identity,
    ImplicitDifferentiation,
    Neumann,
    Nystrom,
)
from hyperopt_torch.errors import HypergradientWarning


class Rig:
    """A small regression with weighted samples, and the companion object over it."""

    def __init__(self, ihvp: IHVP | None = None, inner=SGD) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        self.phi = torch.zeros(6, requires_grad=True)
        self.x, self.y = torch.randn(6, 3), torch.randn(6, 1)
        self.inner = inner(self.model.parameters(), lr=0.1)
        self.outer = SGD([self.phi], lr=0.1)
        self.bo = BilevelOptimizer(self.inner, self.outer, ihvp or Identity())

    def losses(self, model: nn.Module | None = None):
        return ((model or self.model)(self.x) - self.y).square()[:, 0]

    def train(self):
        return (self.phi.exp() * self.losses()).mean()

    def val(self):
        return self.losses().mean()

    def after(self, train_loss):
        """The two calls of a loop."""
        self.bo.inner_step(train_loss)
        return self.bo.outer_step(self.val())


WRONG = []


def wrong(error: type[Exception], advice: str):
    def register(use):
        WRONG.append(pytest.param(use, error, advice, id=use.__name__))
        return use

    return register


# --- calls in the wrong order -------------------------------------------------------------------


@wrong(RuntimeError, "call inner_step(closure) with a closure before outer_step(val_loss)")
def outer_step_before_inner_step(r: Rig):
    r.bo.outer_step(r.val())


@wrong(RuntimeError, "call inner_step(closure)")
def accumulate_before_inner_step(r: Rig):
    r.bo.accumulate(r.val())


@wrong(RuntimeError, "call inner_step(closure)")
def hypergradient_before_inner_step(r: Rig):
    r.bo.hypergradient(r.val())


@wrong(RuntimeError, "pass the loss at the current parameters")
def loss_tensor_and_no_train_loss(r: Rig):
    r.after(r.train())


@wrong(RuntimeError, "pass the loss at the current parameters")
def closure_and_then_loss_tensor(r: Rig):
    r.bo.inner_step(r.train)
    r.after(r.train())


@wrong(RuntimeError, "pass the loss at the current parameters")
def reset_and_then_outer_step(r: Rig):
    r.bo.inner_step(r.train)
    r.bo.reset()
    r.bo.outer_step(r.val())


@wrong(RuntimeError, "the loss at the current parameters")
def train_loss_that_the_inner_step_has_used(r: Rig):
    loss = r.train()
    r.bo.inner_step(loss)
    r.bo.outer_step(r.val(), loss)


@wrong(RuntimeError, "the loss at the current parameters")
def train_loss_from_before_the_inner_step(r: Rig):
    loss = r.train()
    r.bo.inner_step(r.train)
    r.bo.outer_step(r.val(), loss)


@wrong(RuntimeError, "compute it after inner_step and before outer_step")
def validation_loss_from_before_the_inner_step(r: Rig):
    val = r.val()
    r.bo.inner_step(r.train)
    r.bo.outer_step(val)


@wrong(RuntimeError, "validation loss")
def validation_loss_used_twice(r: Rig):
    r.bo.inner_step(r.train)
    val = r.val()
    r.bo.outer_step(val)
    r.bo.outer_step(val)


@wrong(RuntimeError, "call outer_step(val_loss) first")
def report_before_any_solve(r: Rig):
    r.bo.inner_step(r.train)
    return r.bo.report


# --- validation losses --------------------------------------------------------------------------


def outer_step(r: Rig, val):
    r.bo.inner_step(r.train)
    r.bo.outer_step(val(r))


@wrong(ValueError, ".mean()")
def validation_loss_per_sample(r: Rig):
    outer_step(r, lambda r: r.losses())


@wrong(RuntimeError, "outside torch.no_grad()")
def validation_loss_detached(r: Rig):
    outer_step(r, lambda r: r.val().detach())


@wrong(RuntimeError, "outside torch.no_grad()")
@torch.no_grad()
def validation_loss_under_no_grad(r: Rig):
    outer_step(r, lambda r: r.val())


@wrong(TypeError, "expected a scalar tensor")
def validation_loss_number(r: Rig):
    outer_step(r, lambda r: r.val().item())


@wrong(TypeError, "outer_step(val_loss())")
def validation_loss_function(r: Rig):
    outer_step(r, lambda r: r.val)


@wrong(RuntimeError, "does the inner optimizer hold the parameters of the model")
def validation_loss_of_another_model(r: Rig):
    other = nn.Linear(3, 1)
    outer_step(r, lambda r: r.losses(other).mean())


@wrong(RuntimeError, "does the inner optimizer hold the parameters of the model")
def validation_loss_of_outer_parameters_only(r: Rig):
    outer_step(r, lambda r: r.phi.square().sum())


# --- training losses ----------------------------------------------------------------------------


@wrong(RuntimeError, "outside torch.no_grad()")
def training_loss_detached(r: Rig):
    r.bo.inner_step(lambda: r.train().detach())


@wrong(ValueError, "1-D tensor of per-sample losses")
def training_loss_matrix(r: Rig):
    r.bo.inner_step(lambda: r.phi[:, None] * r.losses()[:, None])


@wrong(ValueError, "1-D tensor of per-sample losses")
def training_loss_empty(r: Rig):
    r.bo.inner_step(lambda: r.losses()[:0])


@wrong(TypeError, "`return` missing?")
def training_loss_without_return(r: Rig):
    def closure():
        r.train()

    r.bo.inner_step(closure)


@wrong(TypeError, "must return the loss")
def training_loss_number(r: Rig):
    r.bo.inner_step(lambda: r.train().item())


@wrong(TypeError, "(loss, outputs)")
def training_loss_with_two_extras(r: Rig):
    r.bo.inner_step(lambda: (r.train(), 0, 0))


@wrong(RuntimeError, "does the inner optimizer hold the parameters of the model")
def training_loss_of_another_model(r: Rig):
    other = nn.Linear(3, 1)
    r.after(lambda: (r.phi.exp() * r.losses(other)).mean())


@wrong(RuntimeError, "Does the training closure use the parameters in the outer optimizer?")
def no_outer_parameter_has_influence(r: Rig):
    r.after(r.val)


def with_backward(r: Rig, **options):
    def closure():
        loss = r.train()
        loss.backward(**options)
        return loss

    return closure


@wrong(RuntimeError, "must only compute and return the loss")
def closure_that_calls_backward(r: Rig):
    r.bo.inner_step(with_backward(r))


@wrong(RuntimeError, "must only compute and return the loss")
def closure_that_calls_backward_and_keeps_the_graph(r: Rig):
    r.bo.inner_step(with_backward(r, retain_graph=True))  # would double every gradient


@wrong(RuntimeError, "must only compute and return the loss")
def closure_that_calls_backward_in_lbfgs(r: Rig):
    r = Rig(inner=LBFGS)
    r.bo.inner_step(with_backward(r))


@wrong(RuntimeError, "must only compute and return the loss")
def closure_that_calls_backward_in_outer_step(r: Rig):
    r.bo.outer_step(r.val(), with_backward(r))


@wrong(TypeError, "needs a closure: inner_step(lambda: train_loss(...))")
def lbfgs_with_a_loss_tensor(r: Rig):
    r = Rig(inner=LBFGS)
    r.bo.inner_step(r.train())


@wrong(ValueError, "LBFGS does not work with a grad_scaler")
def lbfgs_with_a_grad_scaler(r: Rig):
    inner = LBFGS(r.model.parameters())
    BilevelOptimizer(inner, r.outer, grad_scaler=torch.amp.GradScaler("cpu")).inner_step(r.train)


# --- what the constructor is given --------------------------------------------------------------


@wrong(TypeError, "torch.optim.SGD(model.parameters(), lr=0.1)")
def module_for_inner_optimizer(r: Rig):
    BilevelOptimizer(r.model, r.outer)


@wrong(TypeError, "inner must be a torch.optim.Optimizer; got generator")
def parameters_for_inner_optimizer(r: Rig):
    BilevelOptimizer(r.model.parameters(), r.outer)


@wrong(TypeError, "outer must be a torch.optim.Optimizer; got list")
def list_for_outer_optimizer(r: Rig):
    BilevelOptimizer(r.inner, [r.phi])


@wrong(TypeError, "inner must be a torch.optim.Optimizer; got type")
def class_for_inner_optimizer(r: Rig):
    BilevelOptimizer(SGD, r.outer)


@wrong(ValueError, "Use for example torch.optim.Adam")
def lbfgs_for_outer_optimizer(r: Rig):
    BilevelOptimizer(r.inner, LBFGS([r.phi]))


@wrong(TypeError, "a strategy object such as Nystrom()")
def class_for_strategy(r: Rig):
    BilevelOptimizer(r.inner, r.outer, ihvp=Nystrom)


@wrong(TypeError, "a strategy object such as Nystrom()")
def name_for_strategy(r: Rig):
    BilevelOptimizer(r.inner, r.outer, ihvp="nystrom")


@wrong(TypeError, "ihvp must be a strategy object")
def estimator_for_strategy(r: Rig):
    BilevelOptimizer(r.inner, r.outer, ihvp=ImplicitDifferentiation(Nystrom()))


@wrong(TypeError, "A strategy such as Nystrom() goes to ihvp=")
def strategy_for_estimator(r: Rig):
    BilevelOptimizer(r.inner, r.outer, estimator=Nystrom())


@wrong(TypeError, "estimator must be an object")
def class_for_estimator(r: Rig):
    BilevelOptimizer(r.inner, r.outer, estimator=ImplicitDifferentiation)


@wrong(TypeError, "curvature must be an object such as Hessian()")
def class_for_curvature(r: Rig):
    BilevelOptimizer(r.inner, r.outer, Nystrom(), curvature=Hessian)


@wrong(ValueError, "Give either estimator, or ihvp")
def strategy_and_estimator(r: Rig):
    BilevelOptimizer(r.inner, r.outer, Nystrom(), estimator=ImplicitDifferentiation(Nystrom()))


@wrong(ValueError, "Give either estimator, or ihvp (and curvature)")
def curvature_and_estimator(r: Rig):
    estimator = ImplicitDifferentiation(Nystrom())
    BilevelOptimizer(r.inner, r.outer, estimator=estimator, curvature=Hessian())


@wrong((TypeError, ValueError), "generator")
def seed_for_generator(r: Rig):
    Nystrom(generator=0)


# --- parameters ---------------------------------------------------------------------------------


@wrong(ValueError, "each parameter belongs to one level")
def parameter_on_both_levels(r: Rig):
    BilevelOptimizer(r.inner, SGD([r.phi, *r.model.parameters()], lr=0.1))


@wrong(ValueError, "move the model and the outer parameters to one")
def levels_on_two_devices(r: Rig):
    BilevelOptimizer(r.inner, SGD([torch.zeros(2, device="meta", requires_grad=True)], lr=0.1))


@wrong(ValueError, "several devices: cpu, meta")
def inner_level_on_two_devices(r: Rig):
    r.inner.add_param_group({"params": [torch.zeros(2, device="meta", requires_grad=True)]})
    BilevelOptimizer(r.inner, r.outer)


@wrong(ValueError, "The inner optimizer holds no parameter that requires a gradient")
def inner_level_frozen(r: Rig):
    r.model.requires_grad_(False)
    BilevelOptimizer(r.inner, r.outer)


@wrong(ValueError, "The outer optimizer holds no parameter that requires a gradient")
def outer_level_frozen(r: Rig):
    BilevelOptimizer(r.inner, SGD([torch.zeros(6)], lr=0.1))


@wrong(ValueError, "is everything frozen?")
def inner_level_frozen_later(r: Rig):
    r.model.requires_grad_(False)
    r.bo.inner_step(r.train)


@wrong(ValueError, "torch.view_as_real")
def complex_parameters(r: Rig):
    z = torch.zeros(2, dtype=torch.complex64, requires_grad=True)
    BilevelOptimizer(SGD([z], lr=0.1), r.outer)


@wrong(ValueError, "This state belongs to Nystrom, not to ConjugateGradient")
def state_of_another_strategy(r: Rig):
    saved = Rig(Nystrom())
    saved.after(saved.train)
    Rig(ConjugateGradient()).bo.load_state_dict(saved.bo.state_dict())


@pytest.mark.parametrize(("use", "error", "advice"), WRONG)
def test_wrong_use(use, error, advice):
    with pytest.raises(error, match=re.escape(advice)):
        use(Rig())


@pytest.mark.parametrize("query", ["outer_step", "accumulate", "hypergradient"])
def test_warns_where_only_the_direct_term_is_left(query):
    """The warning points at the user's line, and the direct term is what comes out."""
    r = Rig()
    r.bo.inner_step(r.val)
    with pytest.warns(UserWarning, match="does not enter the training loss") as caught:
        found = getattr(r.bo, query)(r.val() + 3 * r.phi.sum())
    about = [w for w in caught if not issubclass(w.category, HypergradientWarning)]
    assert [w.filename for w in about] == [__file__]
    found = found[0] if query == "hypergradient" else r.phi.grad
    assert torch.equal(found, torch.full((6,), 3.0))


def test_no_warning_in_the_right_use():
    r = Rig()
    r.after(r.train)
    assert r.phi.grad.norm() > 0


# --- arguments ----------------------------------------------------------------------------------

NUMBERS = [-1.0, -math.inf, math.nan, math.inf, True, "x", None, [1]]
BAD = {
    "int": [0, -1, 2.0, math.nan, math.inf, True, "3", None, [1]],
    "float": NUMBERS,
    "str": ["", "nonsense", None, 1],
    "str | float": NUMBERS,
}
BAD["float | str"] = BAD["str | float"]
for kind in ("int", "float"):
    BAD[f"{kind} | None"] = [value for value in BAD[kind] if value is not None]
POSITIVE = {("Nystrom", "damping"), ("Neumann", "scale"), ("Identity", "scale")}

CLASSES = [
    cls
    for cls in vars(hyperopt_torch).values()
    if inspect.isclass(cls)
    and issubclass(cls, (IHVP, Curvature, HypergradientEstimator))
    and not inspect.isabstract(cls)
]


def bad_arguments() -> Iterator:
    """Every argument that is a number or a word, of every class a user configures."""
    for cls in dict.fromkeys(CLASSES):
        for name, parameter in inspect.signature(cls).parameters.items():
            values = list(BAD.get(str(parameter.annotation), ()))
            if (cls.__name__, name) in POSITIVE:
                values.append(0.0)
            for value in values:
                yield pytest.param(cls, name, value, id=f"{cls.__name__}-{name}={value!r}")


@pytest.mark.parametrize(("cls", "name", "value"), list(bad_arguments()))
def test_bad_argument(cls, name, value):
    """The message names the argument, shows the value, and says what is expected instead."""
    required = {
        other: 1
        for other, parameter in inspect.signature(cls).parameters.items()
        if parameter.default is inspect.Parameter.empty
    }
    message = re.escape(f"Invalid {name}: {value!r}; expected ")
    with pytest.raises(ValueError, match=message):
        cls(**(required | {name: value}))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Nystrom(1, 1e-9, chunk_size=1, sketch="gaussian", solver="woodbury"),
        lambda: ConjugateGradient(1, tol=0, damping=0),
        lambda: Neumann(1, scale=1, damping=0),
        lambda: DenseSolve(0),
        lambda: Identity(1),
        lambda: Hessian(1),
    ],
)
def test_the_least_values_are_accepted(make):
    make()


def test_rank_larger_than_n_is_clamped_and_reported():
    r = Rig(Nystrom(rank=1000, damping=1.0))
    r.after(r.train)
    n = sum(p.numel() for p in r.model.parameters())
    assert r.bo.report.notes == (f"rank 1000 clamped to n = {n}",)
    assert f"clamped to n = {n}" in str(r.bo.report)
    assert r.bo.report.matvecs == n + 1


# --- graphs without a second derivative: the remedy is named, and it works ------------------------


@pytest.mark.filterwarnings("ignore:.*global hooks on modules:UserWarning")
def test_compiled_module():
    r = Rig(DenseSolve(1.0))
    compiled = torch.compile(r.model, backend="aot_eager")
    r.bo.inner_step(lambda: (r.phi.exp() * r.losses(compiled)).mean())
    (expected,) = r.bo.hypergradient(r.val(), r.train)
    r.bo.outer_step(r.losses(compiled).mean())  # both stay compiled: the closure runs eager once
    assert expected.norm() > 0
    torch.testing.assert_close(r.phi.grad, expected)
    with pytest.raises(RuntimeError, match=r"torch\.compile"):  # a loss cannot be evaluated anew
        r.bo.outer_step(r.val(), (r.phi.exp() * r.losses(compiled)).mean())


def test_fused_attention():
    q = torch.randn(1, 2, 5, 4)
    net = nn.Linear(4, 4)
    phi = torch.zeros((), requires_grad=True)
    bo = BilevelOptimizer(SGD(net.parameters(), lr=0.1), SGD([phi], lr=0.1), DenseSolve(1.0))

    def attention(q):
        return F.scaled_dot_product_attention(q, q, q)

    def by_hand(q):
        return ((q @ q.mT) / math.sqrt(q.shape[-1])).softmax(-1) @ q

    def math_backend(q):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return attention(q)

    def loss(attend):
        return lambda: phi.exp() * attend(net(q)).square().mean()

    bo.inner_step(loss(attention))
    (expected,) = bo.hypergradient(by_hand(net(q)).mean(), loss(by_hand))
    assert expected.abs() > 0
    for train in (None, loss(attention), loss(math_backend), loss(math_backend)()):
        (found,) = bo.hypergradient(attention(net(q)).mean(), train)  # evaluated without fusing
        torch.testing.assert_close(found, expected)
    with pytest.raises(RuntimeError, match="MATH"):  # a loss cannot be evaluated anew
        bo.outer_step(attention(net(q)).mean(), loss(attention)())
