"""Law: a hypergradient leaves no trace in what it does not own.

outer_step, accumulate and hypergradient leave the inner parameters, their .grad, the inner
optimizer's state, every module's buffers and the random streams bitwise as found, and the tensors
are the same objects. hypergradient leaves the outer level and the strategy's memory as well.
"""

from __future__ import annotations

import contextlib
import copy
import random
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import STRATEGIES, Case
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules import module as torch_module
from torch.utils.checkpoint import checkpoint

from hyperopt_torch import BilevelOptimizer, ConjugateGradient, Identity, Nystrom

INNER = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
}
QUERIES = ["outer_step", "accumulate", "hypergradient"]


class ConvNet(nn.Module):
    """Everything that an extra forward pass in train mode would move."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(2 * 2 * 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.norm(self.conv(x)).relu()).flatten(1))


class Rig:
    """Weighted samples and a weight decay over ``model``, two inner steps into the run."""

    def __init__(self, ihvp=None, inner="momentum", model=None, train=None, steps=2) -> None:
        self.model = model or ConvNet()
        self.x, self.y = torch.randn(6, 1, 4, 4), torch.randint(2, (6,))
        self.weights = torch.zeros(6, requires_grad=True)
        self.log_decay = torch.tensor(-2.0, requires_grad=True)
        self.inner = INNER[inner](self.model.parameters())
        self.outer = torch.optim.Adam([self.weights, self.log_decay], lr=0.1)
        self.bo = BilevelOptimizer(self.inner, self.outer, ihvp or ConjugateGradient(2))
        self.closure = (lambda: train(self)) if train else self.train
        for _ in range(steps):
            self.bo.inner_step(self.closure)

    def losses(self, outputs: Tensor) -> Tensor:
        return F.cross_entropy(outputs, self.y, reduction="none")

    def objective(self, outputs: Tensor) -> Tensor:
        penalty = sum(p.square().sum() for p in self.model.parameters())
        return (self.weights.exp() * self.losses(outputs)).mean() + self.log_decay.exp() * penalty

    def train(self) -> Tensor:
        return self.objective(self.model(self.x))

    def val(self) -> Tensor:
        return self.losses(self.model(self.x)).mean()


Picture = dict[str, tuple[object, object]]


def picture(rig: Rig, outer: bool = False) -> Picture:
    """Name -> (the object, a copy of what it holds), for all that must stay."""
    found: dict[str, object] = {}
    levels = [("inner", rig.inner)] + [("outer", rig.outer)] * outer
    for level, optimizer in levels:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for i, p in enumerate(parameters):
            found |= {f"{level}.{i}": p, f"{level}.{i}.grad": p.grad}
            state = optimizer.state.get(p, {})
            found |= {f"{level}.{i}.{name}": value for name, value in state.items()}
        for i, group in enumerate(optimizer.param_groups):
            found |= {f"{level}.group{i}.{k}": v for k, v in group.items() if k != "params"}
    helpers = enumerate(getattr(rig.model, "helpers", ()))
    for prefix, module in [*rig.model.named_modules(), *helpers]:
        found |= {f"buffer {prefix}.{name}": b for name, b in module._buffers.items()}
        found[f"training {prefix}"] = module.training
    return {name: (value, duplicate(value)) for name, value in found.items()}


def duplicate(value: object) -> object:
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def same_bits(a: object, b: object) -> bool:
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | (a != a)).all())
    return a == b


def changes(before: Picture, after: Picture) -> list[str]:
    wrong = list(before.keys() ^ after.keys())
    for name in before.keys() & after.keys():
        (was, bits), (now, _) = before[name], after[name]
        if (isinstance(was, Tensor) and now is not was) or not same_bits(bits, duplicate(now)):
            wrong.append(name)
    return sorted(wrong)


def streams() -> tuple[object, ...]:
    numpy_state = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state().tolist(), random.getstate(), numpy_state[1].tolist()


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("case", STRATEGIES, ids=str)
def test_inner_level_buffers_and_streams(case: Case, inner: str):
    rig = Rig(case.make(), inner)
    for query in QUERIES:  # from the second on with a memory, where the strategy has one
        val = rig.val()  # in train mode: moves the BatchNorm statistics, as in any loop
        before, random_before = picture(rig), streams()
        getattr(rig.bo, query)(val)
        assert (query, changes(before, picture(rig))) == (query, [])
        assert streams() == random_before
    assert not torch_module._global_forward_pre_hooks


@pytest.mark.parametrize("case", STRATEGIES, ids=str)
def test_hypergradient_is_a_pure_query(case: Case):
    """Outer level, strategy, validation graph stay; asked again, it answers the same bits."""
    rig = Rig(case.make())
    for _ in range(2):  # before and after the strategy has a memory
        val = rig.val()
        before, memory = picture(rig, outer=True), rig.bo.state_dict()["estimator"]
        first = rig.bo.hypergradient(val)
        second = rig.bo.hypergradient(val)
        assert all(map(torch.equal, first, second))
        assert changes(before, picture(rig, outer=True)) == []
        after = rig.bo.state_dict()["estimator"]
        assert str(after) == str(memory)
        rig.bo.outer_step(val)  # its graph is alive,
        assert torch.equal(rig.weights.grad, first[0])  # and what was foretold is done
        assert torch.equal(rig.log_decay.grad, first[1])


def test_hypergradient_moves_no_generator():
    """One seed serves all queries, also those before the first step."""
    generator = torch.Generator().manual_seed(3)
    rig = Rig(Nystrom(4, generator=generator))
    before = generator.get_state()
    val = rig.val()
    first = rig.bo.hypergradient(val)
    second = rig.bo.hypergradient(val)
    assert torch.equal(first[0], second[0])
    assert torch.equal(generator.get_state(), before)
    rig.bo.outer_step(val)
    assert torch.equal(rig.weights.grad, first[0])


def test_accumulate_adds_as_backward_does():
    rig = Rig(Identity())
    rig.outer.zero_grad()
    total = torch.zeros(6)
    for _ in range(3):
        val = rig.val()  # another dropout mask each time
        total = total + rig.bo.hypergradient(val)[0]
        rig.bo.accumulate(val)
        assert torch.equal(rig.weights.grad, total)
    assert torch.equal(rig.weights, torch.zeros(6))


@pytest.mark.parametrize("inner", INNER)
def test_inner_step_leaves_the_outer_level(inner: str):
    rig = Rig(Identity(), inner)
    rig.bo.outer_step(rig.val())
    rig.weights.grad, rig.log_decay.grad = torch.ones(6), None
    outer = {k: v for k, v in picture(rig, outer=True).items() if k.startswith("outer")}
    rig.bo.inner_step(rig.train)
    rig.bo.inner_step(rig.train())
    now = {k: v for k, v in picture(rig, outer=True).items() if k.startswith("outer")}
    assert changes(outer, now) == []


def test_dropout_is_that_of_the_inner_step():
    """Each extra evaluation draws the mask of the inner step; the next forward pass its own."""
    drawn = []

    class Spy(nn.Dropout):
        def forward(self, x: Tensor) -> Tensor:
            mask = super().forward(torch.ones_like(x))
            drawn.append(mask.detach())
            return mask * x

    model = ConvNet()
    model.drop = Spy(0.5)
    rig = Rig(model=model)
    original = drawn[-1]
    val = rig.val()
    state = torch.get_rng_state()
    drawn.clear()
    rig.bo.outer_step(val)
    extra = list(drawn)
    assert extra
    assert all(torch.equal(mask, original) for mask in extra)
    rig.train()
    torch.set_rng_state(state)
    rig.train()
    assert torch.equal(drawn[-1], drawn[-2])
    assert not torch.equal(original, torch.zeros_like(original))


# --- unusual modules and closures ---------------------------------------------------------------


class Reassigning(nn.Module):
    """Keeps its statistic as much code does: by assignment, not in place."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm2d(1), nn.Linear(16, 2)
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("count", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean()
            self.count = torch.ones(()) if self.count is None else self.count + 1
        return self.head((self.norm(x) - self.mean).flatten(1))


class Shared(nn.Module):
    """Two modules that hold one and the same buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.BatchNorm2d(1), nn.BatchNorm2d(1)
        for name, buffer in self.first._buffers.items():
            self.second._buffers[name] = buffer
        self.head = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x)).flatten(1))


class Unregistered(nn.Module):
    """Its helper is in a plain list, as frozen or shared ones often are: no submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.helpers, self.head = [nn.BatchNorm2d(1)], nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.helpers[0](x).flatten(1))


class Meddling(nn.Module):
    """Reads and writes the buffers of a part that it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm2d(1), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.norm.running_mean.lerp_(x.detach().mean()[None], 0.1)
            self.norm.num_batches_tracked = self.norm.num_batches_tracked + 1
        return self.head((x - self.norm.running_mean).flatten(1))


class Recursive(nn.Module):
    """Calls itself, and has something to update after that."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm2d(1), nn.Linear(16, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, depth: int = 2) -> Tensor:
        y = self(x, depth - 1) if depth else self.head(self.norm(x).flatten(1))
        self.calls += 1
        self.norm(x)
        return y


class Caching(nn.Module):
    """Buffers that come into being in the first forward pass in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm2d(1), nn.Linear(16, 2)
        self.register_buffer("first", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.first is None:
            self.first = x.detach().mean()
            self.register_buffer("second", torch.ones(()))
        return self.head(self.norm(x).flatten(1))


def spectral() -> nn.Module:
    """Its power iteration updates buffers in place, inside a parametrization."""
    linear = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(16, 2))
    return nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), linear)


def scripted() -> nn.Module:
    """Its buffers live in C++, behind something that is almost a dict."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and still around
        return torch.jit.script(plain())


def plain() -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(16, 2))


def functional(rig: Rig) -> Tensor:
    return rig.objective(functional_call(rig.model, dict(rig.model.named_parameters()), (rig.x,)))


def functional_with_buffers(rig: Rig) -> Tensor:
    tensors = {**dict(rig.model.named_parameters()), **dict(rig.model.named_buffers())}
    return rig.objective(functional_call(rig.model, tensors, (rig.x,)))


def ensemble(rig: Rig) -> Tensor:
    """One module, called on other tensors each time: each evaluation must see its own."""
    outputs = []
    for shift in (0.0, 10.0):
        buffers = {k: b + shift for k, b in rig.model.named_buffers()}
        tensors = {**dict(rig.model.named_parameters()), **buffers}
        outputs.append(functional_call(rig.model.eval(), tensors, (rig.x,)))
        rig.model.train()
        assert torch.equal(outputs[-1], reference(rig, shift))
    return rig.objective(outputs[0] + outputs[1])


def reference(rig: Rig, shift: float) -> Tensor:
    norm, _, head = rig.model
    mean, var = norm.running_mean + shift, norm.running_var + shift
    return head(F.batch_norm(rig.x, mean, var, norm.weight, norm.bias).flatten(1))


def called_then_functional(rig: Rig) -> Tensor:
    rig.model(rig.x)
    return functional_with_buffers(rig)


def checkpointed(rig: Rig) -> Tensor:
    """The backward pass runs the forward pass, and its BatchNorm, once more."""
    return rig.objective(checkpoint(rig.model, rig.x, use_reentrant=False))


def checkpointed_in_parts(rig: Rig) -> Tensor:
    """Recomputing stops a part in the middle, by an exception, and goes on with the next."""
    first, second = nn.Sequential(rig.model[0], nn.Tanh()), nn.Sequential(*rig.model[1:], nn.Tanh())
    x = checkpoint(first, rig.x, use_reentrant=False)
    return rig.objective(checkpoint(second, x, use_reentrant=False))


def gives_up_on_a_branch(rig: Rig) -> Tensor:
    """An exception in one module, which the closure handles itself."""

    def fail(*_) -> None:
        raise FloatingPointError

    broken = nn.Sequential(nn.BatchNorm2d(1), nn.Tanh())
    broken[1].register_forward_pre_hook(fail)
    with contextlib.suppress(FloatingPointError):
        broken(rig.x)
    return rig.train()


def gradient_penalty(rig: Rig) -> Tensor:
    """torch.func.grad through the model, and then the model once more."""
    rig.model.eval()

    def inner(parameters: dict[str, Tensor]) -> Tensor:
        return rig.objective(functional_call(rig.model, parameters, (rig.x,)))

    grads = torch.func.grad(inner)(dict(rig.model.named_parameters()))
    loss = rig.train() + sum(g.square().sum() for g in grads.values())
    rig.model.train()
    return loss


def per_sample(rig: Rig) -> Tensor:
    """vmap over samples: the statistics are read, in eval mode, and never written."""
    rig.model.eval()
    outputs = torch.func.vmap(lambda x: rig.model(x[None])[0])(rig.x)
    rig.model.train()
    return rig.objective(outputs)


@pytest.mark.parametrize(
    "model", [Reassigning, Shared, Unregistered, Meddling, Recursive, spectral, scripted, plain]
)
def test_unusual_modules(model):
    check_closure(Rig(model=model()))


@pytest.mark.parametrize(
    "train",
    [
        functional,
        functional_with_buffers,
        called_then_functional,
        ensemble,
        checkpointed,
        checkpointed_in_parts,
        gives_up_on_a_branch,
        gradient_penalty,
        per_sample,
    ],
)
def test_unusual_closures(train):
    check_closure(Rig(model=plain(), train=train))


def check_closure(rig: Rig) -> None:
    val = rig.val()
    before, random_before = picture(rig), streams()
    rig.bo.outer_step(val)
    assert changes(before, picture(rig)) == []
    assert streams() == random_before
    assert rig.weights.grad.norm() > 0
    rig.train()  # an ordinary evaluation does move them
    assert any(name.startswith("buffer") for name in changes(before, picture(rig)))


def test_buffers_that_the_extra_evaluation_creates():
    rig = Rig(model=Caching(), steps=0)
    rig.model.eval()
    val = rig.val()
    rig.model.train()
    before = picture(rig)
    rig.bo.outer_step(val, rig.train)
    assert changes(before, picture(rig)) == []
    rig.bo.inner_step(rig.train)
    assert {"buffer .first", "buffer .second"} <= set(changes(before, picture(rig)))


def test_functional_call_on_the_users_own_dict():
    """functional_call writes updated buffers back into the dict that it was given."""
    model = plain()
    tensors = {**dict(model.named_parameters()), **{k: b.clone() for k, b in model.named_buffers()}}
    rig = Rig(model=model, train=lambda r: r.objective(functional_call(model, tensors, (r.x,))))
    val = rig.val()
    before = {name: (t, duplicate(t)) for name, t in tensors.items()}
    rig.bo.outer_step(val)
    assert changes(before, {name: (t, duplicate(t)) for name, t in tensors.items()}) == []


def test_extra_evaluations_see_the_buffers_as_they_are():
    """In eval mode BatchNorm reads its statistics: the clones must hold the same values."""
    rig = Rig(Identity(), model=plain())
    rig.model.eval()
    seen = []
    rig.model[0].register_forward_pre_hook(
        lambda module, _: seen.append((module.running_mean.clone(), module.running_mean))
    )
    rig.bo.inner_step(rig.train)
    mean = rig.model[0].running_mean
    rig.bo.outer_step(rig.val())
    assert mean.abs().max() > 0
    assert all(torch.equal(values, mean) for values, _ in seen)
    assert seen[-1][1] is not mean  # a clone


def test_validation_graph_that_holds_the_buffers():
    """val in eval mode saves running_mean; the closure then runs in train mode. In-place copying
    would bump its version and make val's own backward pass, here after the query, impossible."""
    rig = Rig(Identity())
    rig.model.eval()
    val = rig.val()
    rig.model.train()
    expected = torch.autograd.grad(val, rig.model.conv.weight, retain_graph=True)[0]
    rig.bo.hypergradient(val)
    assert torch.equal(torch.autograd.grad(val, rig.model.conv.weight)[0], expected)


@pytest.mark.parametrize("query", ["outer_step", "accumulate", "hypergradient"])
def test_a_closure_that_raises(query: str):
    rig = Rig(Nystrom(4))

    def closure() -> Tensor:
        rig.train()
        torch.rand(3)
        raise ValueError("from the closure")

    val = rig.val()
    before, random_before = picture(rig, outer=True), streams()
    memory = str(rig.bo.state_dict()["estimator"])
    with pytest.raises(ValueError, match="from the closure"):
        getattr(rig.bo, query)(val, closure)
    assert changes(before, picture(rig, outer=True)) == []
    assert streams() == random_before
    assert str(rig.bo.state_dict()["estimator"]) == memory
    assert not torch_module._global_forward_pre_hooks
    rig.bo.outer_step(rig.val())  # and the loop goes on


def test_a_strategy_that_raises():
    """A query that fails half-way leaves the memory of the strategy as it was."""

    class Failing(ConjugateGradient):
        def solve(self, operator, rhs):
            self.state["x"] = rhs + 1
            raise FloatingPointError("from the strategy")

    rig = Rig(Failing())
    before = picture(rig, outer=True)
    with pytest.raises(FloatingPointError):
        rig.bo.hypergradient(rig.val())
    assert rig.bo.estimator.ihvp.state == {}
    moved = changes(before, picture(rig, outer=True))
    assert all(name.startswith("buffer") for name in moved)  # by val itself


def test_under_no_grad():
    """Called where gradients are off (val_loss was not), the answer is the same."""
    rig = Rig(ConjugateGradient(3))
    val = rig.val()
    expected = rig.bo.hypergradient(val)
    with torch.no_grad():
        found = rig.bo.hypergradient(val)
        assert not torch.is_grad_enabled()
    assert all(map(torch.equal, found, expected))
    assert not any(g.requires_grad for g in found)
