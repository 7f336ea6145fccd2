"""What the inner optimizer does is found by probing a stand-in, not by its name.

The fact is a law: the optimizer rests exactly where sign·∇f + λθ = 0.
"""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from hyperopt_torch.inner_optimizer import Prober, needs_closure, unwrapped

OPTIM = torch.optim


class Counting(OPTIM.SGD):
    """A user's subclass that counts its steps."""

    count = 0

    def step(self, closure=None):
        self.count += 1
        return super().step(closure)


class Plain(Optimizer):
    """θ ← θ - η·direction(∇f, θ), as users write them."""

    def __init__(self, params, direction, **settings) -> None:
        super().__init__(params, settings)
        self.direction = direction

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * self.direction(p.grad, p, group))


class Sign(Plain):
    def __init__(self, params) -> None:
        super().__init__(params, lambda g, p, s: (g + s["l2"] * p).sign(), lr=0.1, l2=0.3)


class Holder(Optimizer):
    """A wrapper that is an optimizer itself, as accelerate's."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    state = property(lambda self: self.optimizer.state)
    param_groups = property(lambda self: self.optimizer.param_groups)
    defaults = property(lambda self: self.optimizer.defaults)

    def step(self, closure=None):
        return self.optimizer.step(closure)


def scheduled(p):
    optimizer = OPTIM.SGD(p, lr=0.1, weight_decay=0.2)
    OPTIM.lr_scheduler.StepLR(optimizer, 1)
    return optimizer


ROWS = {  # make, sign, λ
    "sgd": (lambda p: OPTIM.SGD(p, lr=0.1, weight_decay=0.2), 1, 0.2),
    "tiny": (lambda p: OPTIM.SGD(p, lr=0.1, weight_decay=1e-6), 1, 1e-6),
    "nesterov": (
        lambda p: OPTIM.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.2, nesterov=True),
        1,
        0.2,
    ),
    "maximize": (lambda p: OPTIM.SGD(p, lr=0.1, weight_decay=0.2, maximize=True), -1, 0.2),
    "warm-up": (lambda p: OPTIM.SGD(p, lr=0.0, weight_decay=0.2), 1, 0.2),
    "scheduled": (scheduled, 1, 0.2),
    "tensor-lr": (lambda p: OPTIM.Adam(p, lr=torch.tensor(0.1), weight_decay=0.2), 1, 0.2),
    "adam": (lambda p: OPTIM.Adam(p, weight_decay=0.2), 1, 0.2),
    "adam-none": (lambda p: OPTIM.Adam(p), 1, 0),
    "adam-maximize": (lambda p: OPTIM.Adam(p, weight_decay=0.3, maximize=True), -1, 0.3),
    "adam-fused": (lambda p: OPTIM.Adam(p, weight_decay=0.2, fused=True), 1, 0.2),
    "adam-differentiable": (lambda p: OPTIM.Adam(p, weight_decay=0.2, differentiable=True), 1, 0.2),
    "adamw": (lambda p: OPTIM.AdamW(p, weight_decay=0.2), 1, 0),
    "nadam": (lambda p: OPTIM.NAdam(p, weight_decay=0.2), 1, 0.2),
    "nadam-decoupled": (
        lambda p: OPTIM.NAdam(p, weight_decay=0.2, decoupled_weight_decay=True),
        1,
        0,
    ),
    "radam": (lambda p: OPTIM.RAdam(p, weight_decay=0.2), 1, 0.2),
    "radam-decoupled": (
        lambda p: OPTIM.RAdam(p, weight_decay=0.2, decoupled_weight_decay=True),
        1,
        0,
    ),
    "adamax": (lambda p: OPTIM.Adamax(p, weight_decay=0.2), 1, 0.2),
    "adagrad": (lambda p: OPTIM.Adagrad(p, weight_decay=0.2), 1, 0.2),
    "adadelta": (lambda p: OPTIM.Adadelta(p, weight_decay=0.2), 1, 0.2),
    "rmsprop": (lambda p: OPTIM.RMSprop(p, weight_decay=0.2, centered=True), 1, 0.2),
    "rprop": (lambda p: OPTIM.Rprop(p), 1, 0),
    "lbfgs": (lambda p: OPTIM.LBFGS(p), 1, 0),
    "sparse-adam": (lambda p: OPTIM.SparseAdam(p), 1, 0),
    "subclass": (lambda p: Counting(p, lr=0.1, weight_decay=0.2), 1, 0.2),
    # θ ← θ - 0.3 θ - η ∇f rests where ∇f + (0.3/η) θ = 0
    "own-rate": (lambda p: Plain(p, lambda g, w, s: g + w * 0.3 / s["lr"], lr=0.1), 1, 3.0),
    "own-name": (lambda p: Plain(p, lambda g, w, s: g + s["l2"] * w, lr=0.1, l2=0.3), 1, 0.3),
    "sign": (Sign, 1, 0.3),
    "ascent": (lambda p: Plain(p, lambda g, w, s: -g, lr=0.1), -1, 0),
}
for _name, _make in {
    "adafactor": lambda p: OPTIM.Adafactor(p, weight_decay=0.2),
    "muon": lambda p: OPTIM.Muon(p),
}.items():
    if hasattr(OPTIM, _name.capitalize()):  # newer than the oldest torch
        ROWS[_name] = (_make, 1, 0)


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(5, 2))]


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_facts(row):
    make, sign, decay = row
    p = parameters()
    found = Prober().facts(make(p), p)
    assert found.notes == ()
    assert found.sign == sign
    assert found.decay == pytest.approx([decay] * 2, rel=1e-6)


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_nothing_is_touched(row):
    p = parameters()
    optimizer = row[0](p)
    called: list[Optimizer] = []
    optimizer.register_step_pre_hook(lambda *_: called.append(optimizer))
    own = register_optimizer_step_pre_hook(lambda *_: called.append(optimizer))
    before = [t.detach().clone() for t in p], str(optimizer.state_dict())
    streams = torch.get_rng_state(), random.getstate()
    try:
        Prober().facts(optimizer, p)
    finally:
        own.remove()
    assert all(map(torch.equal, before[0], p))
    assert all(t.grad is None for t in p)
    assert str(optimizer.state_dict()) == before[1]
    assert torch.equal(streams[0], torch.get_rng_state())
    assert streams[1] == random.getstate()
    nested = isinstance(optimizer, Counting)  # its super().step() calls torch's global hooks
    assert nested or called == []
    assert getattr(optimizer, "count", 0) == 0


def test_groups_and_changes_are_noticed_and_nothing_else_takes_steps():
    p, steps = parameters(), []

    def direction(g: Tensor, w: Tensor, settings: dict) -> Tensor:
        steps.append(1)
        return g + settings["weight_decay"] * w

    groups = [{"params": [p[0]], "weight_decay": 0.1}, {"params": [p[1]]}]
    optimizer, prober = Plain(groups, direction, lr=0.1, weight_decay=0.4), Prober()
    assert prober.facts(optimizer, p).decay == pytest.approx([0.1, 0.4])
    assert steps
    steps.clear()
    for group in optimizer.param_groups:
        group["lr"] *= 0.5  # a scheduler changes no fact
    assert prober.facts(optimizer, p).decay == pytest.approx([0.1, 0.4])
    assert steps == []
    optimizer.param_groups[1]["weight_decay"] = 0.7
    assert prober.facts(optimizer, p).decay == pytest.approx([0.1, 0.7])


def test_both_signs_are_a_saddle_point():
    p = parameters()
    groups = [{"params": [p[0]], "maximize": True}, {"params": [p[1]]}]
    with pytest.raises(ValueError, match="saddle point"):
        Prober().facts(OPTIM.SGD(groups, lr=0.1), p)


def test_what_cannot_be_probed_is_said():
    def picky(g: Tensor, w: Tensor, settings: dict) -> Tensor:
        raise RuntimeError("tensors of size 4 only")

    p = parameters()
    found = Prober().facts(Plain(p, picky, lr=0.1, weight_decay=0.2), p)
    assert found.decay == [0, 0]
    assert "could not be found out" in found.notes[0]


def test_wrappers():
    p = parameters()
    real = OPTIM.LBFGS(p)
    assert unwrapped(real) is real
    assert unwrapped(Holder(real)) is real
    assert unwrapped(Holder(Holder(real))) is real
    assert needs_closure(Holder(real))
    other = OPTIM.SGD(parameters(), lr=0.1)
    real.optimizer = other  # of other parameters: it is not wrapped
    assert unwrapped(real) is real


def test_accelerate():
    accelerate = pytest.importorskip("accelerate")
    p = parameters()
    real = OPTIM.SGD(p, lr=0.1, weight_decay=0.2)
    assert unwrapped(accelerate.Accelerator(cpu=True).prepare(real)) is real
