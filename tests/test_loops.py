"""Loops as people write them: kind of model x idiom of the trainer x estimator.

The right value is that of plain PyTorch: for implicit differentiation the dense solve at the same
batch, for the trajectory estimators the same steps written by hand. θ is bit for bit that of the
plain loop, and a query leaves modes, buffers, gradients and random streams as they were.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from oracles import flat
from torch import Tensor, nn
from torch.func import functional_call

from hyperopt_torch import (
    PZOBO,
    BilevelOptimizer,
    ConjugateGradient,
    DenseSolve,
    Identity,
    Nystrom,
    PerSample,
    RecycledCG,
    Unrolled,
)
from hyperopt_torch.ihvp.base import InnerStep

LR, RHO, BATCH, STEPS = 0.05, 5.0, 8, 3  # H + ρI is positive definite


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(3, 12), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)[None, None].chunk(3, dim=-1)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v)[0, 0])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.b.weight = self.a.weight
        self.out = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.b(self.a(x).tanh()).tanh())


def compiled(model: nn.Module) -> nn.Module:
    torch._dynamo.reset()  # after eight models of one shape it gives up and runs them uncompiled
    return torch.compile(model, backend="aot_eager")


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(3, 1),
    "tanh": lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)),
    "batch-norm": lambda: nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)
    ),
    "dropout": lambda: nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 1)),
    "layer-norm": lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1)),
    "spectral": lambda: nn.Sequential(
        torch.nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 1)
    ),
    "attention": Attention,
    "tied": Tied,
    "compiled": lambda: compiled(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))),
}
ESTIMATORS = {
    "dense": lambda: {"ihvp": DenseSolve(damping=RHO)},
    "cg": lambda: {"ihvp": ConjugateGradient(300, tol=1e-13, damping=RHO)},
    "unrolled": lambda: {"estimator": Unrolled()},
}


class World:
    """A model, weights of its samples, data, and losses in plain PyTorch."""

    def __init__(self, kind: str) -> None:
        torch.manual_seed(1)
        self.model = MODELS[kind]().double()
        g = torch.Generator().manual_seed(2)
        like = {"generator": g, "dtype": torch.float64}
        self.x, self.y = torch.randn(STEPS, BATCH, 3, **like), torch.randn(STEPS, BATCH, **like)
        self.xv, self.yv = torch.randn(BATCH, 3, **like) + 1, torch.randn(BATCH, **like)
        self.phi = torch.zeros(BATCH, dtype=torch.float64, requires_grad=True)
        self.inner = [p for p in self.model.parameters() if p.requires_grad]
        torch.manual_seed(3), random.seed(3), np.random.seed(3)  # noqa: NPY002

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        parameters = sum(p.square().sum() for p in self.inner)
        fit = self.phi.exp() * (self.model(x).reshape(-1) - y).square()
        return fit.mean() + 0.1 * parameters

    def val(self) -> Tensor:
        self.model.eval()
        model = getattr(self.model, "_orig_mod", self.model)  # a compiled graph serves once only
        return (model(self.xv).reshape(-1) - self.yv).square().mean()


Idiom = Callable[[World, BilevelOptimizer], Callable[[], Tensor]]
IDIOMS: dict[str, Idiom] = {}


def idiom(function: Idiom) -> Idiom:
    """Takes one inner step with batch ``t``; ``plain`` is its loss once more in plain PyTorch."""
    IDIOMS[function.__name__] = function
    return function


@idiom
def names_rebound(w: World, bo: BilevelOptimizer) -> None:
    for t in range(STEPS):
        w.model.train()
        x, y = w.x[t], w.y[t]
        bo.inner_step(lambda: w.loss(x, y))  # noqa: B023 (that is the point)
        x, y = w.xv, w.yv


@idiom
def attribute(w: World, bo: BilevelOptimizer) -> None:
    class Trainer:
        def loss(self) -> Tensor:
            return w.loss(*self.batch)

    trainer = Trainer()
    for t in range(STEPS):
        w.model.train()
        trainer.batch = w.x[t], w.y[t]
        bo.inner_step(trainer.loss)
        trainer.batch = w.xv, w.yv


@idiom
def dictionary(w: World, bo: BilevelOptimizer) -> None:
    batch: dict[str, Tensor] = {}
    for t in range(STEPS):
        w.model.train()
        batch.update(x=w.x[t], y=w.y[t])
        bo.inner_step(lambda: w.loss(**batch))
        batch.update(x=w.xv, y=w.yv)


@idiom
def record(w: World, bo: BilevelOptimizer) -> None:
    for t in range(STEPS):
        w.model.train()
        bo.inner.zero_grad()
        bo.record(lambda t=t: w.loss(w.x[t], w.y[t])).backward()
        bo.inner.step()
        w.model.eval()


@idiom
def record_and_clip(w: World, bo: BilevelOptimizer) -> None:
    for t in range(STEPS):
        w.model.train()
        bo.inner.zero_grad()
        bo.record(lambda t=t: w.loss(w.x[t], w.y[t])).backward()
        nn.utils.clip_grad_norm_(w.inner, 0.3)
        bo.inner.step()


@idiom
def counter(w: World, bo: BilevelOptimizer) -> None:
    """Side effects of a closure happen once a step."""
    w.calls, seen = 0, []

    def closure() -> Tensor:
        w.calls += 1
        seen.append(w.calls)
        return w.loss(x, y)

    for t in range(STEPS):
        w.model.train()
        x, y = w.x[t], w.y[t]
        bo.inner_step(closure)
        bo.hypergradient(w.val())
        assert seen == list(range(1, t + 2))
        assert w.calls == t + 1


def streams() -> tuple:
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002


def by_hand(kind: str, clip: float | None) -> tuple[list[Tensor], Tensor, Tensor]:
    """θ, the dense implicit hypergradient at the last batch, and that through the steps."""
    w = World(kind)
    model = getattr(w.model, "_orig_mod", w.model)
    names = {id(p): n for n, p in model.named_parameters(remove_duplicate=True)}
    theta = {names[id(p)]: p.detach().clone().requires_grad_() for p in w.inner}
    start, state, buffers = dict(theta), None, None

    def loss(at: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        out = functional_call(model, at, (x,)).reshape(-1)
        penalty = sum(p.square().sum() for p in at.values())
        return (w.phi.exp() * (out - y).square()).mean() + 0.1 * penalty

    for t in range(STEPS):
        model.train()
        state = torch.get_rng_state()
        buffers = {n: b.clone() for n, b in model.named_buffers()}
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            f = loss(theta, w.x[t], w.y[t])
            grads = torch.autograd.grad(f, list(theta.values()), create_graph=True)
        if clip is not None:
            norm = torch.stack([g.norm() for g in grads]).norm()
            grads = [g * (clip / (norm + 1e-6)).clamp(max=1.0) for g in grads]
        pairs = zip(theta.items(), grads, strict=True)
        theta = {n: p - LR * g for (n, p), g in pairs}
    model.eval()
    out = functional_call(model, theta, (w.xv,)).reshape(-1)
    through = torch.autograd.grad((out - w.yv).square().mean(), w.phi, retain_graph=True)[0]
    at = {n: p.detach().requires_grad_() for n, p in theta.items()}
    out = functional_call(model, at, (w.xv,)).reshape(-1)
    b = flat(torch.autograd.grad((out - w.yv).square().mean(), list(at.values())))
    model.train()
    torch.set_rng_state(state)
    for n, buffer in model.named_buffers():
        buffer.copy_(buffers[n])
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        f = loss(at, w.x[-1], w.y[-1])
        g = flat(torch.autograd.grad(f, list(at.values()), create_graph=True))
    rows = [
        torch.autograd.grad(gi, [*at.values(), w.phi], retain_graph=True, allow_unused=True)
        for gi in g
    ]
    like = [*at.values(), w.phi]
    full = [
        [torch.zeros_like(p) if r is None else r for r, p in zip(row, like, strict=True)]
        for row in rows
    ]
    H = torch.stack([flat(row[:-1]) for row in full])
    J = torch.stack([row[-1] for row in full])
    implicit = -J.T @ torch.linalg.solve(H + RHO * torch.eye(len(H), dtype=H.dtype), b)
    assert start.keys() == theta.keys()
    return [p.detach() for p in theta.values()], implicit, through


def works(kind: str, estimator: str, name: str) -> bool:
    # A spectral norm goes on with its power iteration: the oracle's first step begins elsewhere.
    return kind != "spectral" or (estimator != "unrolled" and name != "record_and_clip")


ROWS = [
    (kind, estimator, name)
    for i, kind in enumerate(MODELS)
    for estimator in ESTIMATORS
    for j, name in enumerate(IDIOMS)
    if works(kind, estimator, name) and (kind in ("tanh", "dropout", "batch-norm") or (i + j) % 2)
]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("kind", "estimator", "name"), ROWS)
def test_loop(kind: str, estimator: str, name: str):
    theta, implicit, through = by_hand(kind, 0.3 if name == "record_and_clip" else None)
    w = World(kind)
    bo = BilevelOptimizer(
        torch.optim.SGD(w.inner, lr=LR), torch.optim.SGD([w.phi], lr=0.1), **ESTIMATORS[estimator]()
    )
    IDIOMS[name](w, bo)
    torch.testing.assert_close(w.inner, theta, rtol=1e-9, atol=1e-12)
    val = w.val()
    before = streams(), [m.training for m in w.model.modules()], [p.grad for p in w.inner]
    buffers = [(b, b.clone()) for b in w.model.buffers()]
    (found,) = bo.hypergradient(val)
    expected = through if estimator == "unrolled" else implicit
    # Clipping knows its length to 1e-6: torch adds that to the norm.
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    assert bo.report.astray is None or not bo.report.astray
    grads = [p.grad for p in w.inner]
    assert before[:2] == (streams(), [m.training for m in w.model.modules()])
    assert all(a is b for a, b in zip(before[2], grads, strict=True))
    now = list(w.model.buffers())
    assert all(b is a and torch.equal(a, c) for a, (b, c) in zip(now, buffers, strict=True))


def test_there_are_sixty_loops():
    assert len(ROWS) >= 60


# --- other idioms, each once ----------------------------------------------------------------------


def small(inner=None, **kwargs) -> tuple[World, BilevelOptimizer]:
    w = World("tanh")
    inner = torch.optim.SGD(w.inner, lr=LR) if inner is None else inner(w)
    kwargs = kwargs or {"ihvp": DenseSolve(damping=RHO)}
    return w, BilevelOptimizer(inner, torch.optim.SGD([w.phi], lr=0.1), **kwargs)


def dense(w: World, train: Callable[[], Tensor], val: Tensor) -> Tensor:
    b = flat(torch.autograd.grad(val, w.inner, retain_graph=True))
    g = flat(torch.autograd.grad(train(), w.inner, create_graph=True))
    rows = [torch.autograd.grad(gi, [*w.inner, w.phi], retain_graph=True) for gi in g]
    H, J = torch.stack([flat(r[:-1]) for r in rows]), torch.stack([r[-1] for r in rows])
    return -J.T @ torch.linalg.solve(H + RHO * torch.eye(len(H), dtype=H.dtype), b)


def close(found: Tensor, expected: Tensor, tol: float = 1e-8) -> None:
    assert float((found - expected).norm() / expected.norm()) < tol


@pytest.mark.parametrize("weights", [None, [0.1, 0.2, 0.3]])
def test_micro_batches(weights):
    """Their mean, or the weighted sum, is the inner problem; the step is the plain one."""
    w, bo = small()
    share = weights or [1 / 3] * 3
    for t, s in enumerate(share):
        loss = bo.record(lambda t=t: w.loss(w.x[t], w.y[t]), None if weights is None else s)
        (s * loss).backward()
    bo.inner.step()
    assert w.phi.grad is None  # what the trainer's backward left is taken away
    bo.inner.zero_grad()
    val = w.val()

    def whole() -> Tensor:
        return sum(s * w.loss(w.x[t], w.y[t]) for t, s in enumerate(share))

    close(bo.hypergradient(val)[0], dense(w, whole, val))


def test_micro_batches_unrolled():
    w, bo = small(estimator=Unrolled())
    at = [p.detach().clone().requires_grad_() for p in w.inner]
    names = [n for n, _ in w.model.named_parameters()]

    def loss(t: int) -> Tensor:
        out = functional_call(w.model, dict(zip(names, at, strict=True)), (w.x[t],)).reshape(-1)
        penalty = sum(p.square().sum() for p in at)
        return (w.phi.exp() * (out - w.y[t]).square()).mean() + 0.1 * penalty

    grads = torch.autograd.grad(sum(loss(t) / 3 for t in range(3)), at, create_graph=True)
    end = [p - LR * g for p, g in zip(at, grads, strict=True)]
    out = functional_call(w.model, dict(zip(names, end, strict=True)), (w.xv,)).reshape(-1)
    expected = torch.autograd.grad((out - w.yv).square().mean(), w.phi)[0]
    for t in range(3):
        (bo.record(lambda t=t: w.loss(w.x[t], w.y[t])) / 3).backward()
    bo.inner.step()
    close(bo.hypergradient(w.val())[0], expected)


def test_an_inner_step_that_does_not_step_is_an_error():
    class Accumulating(torch.optim.Optimizer):
        def __init__(self, optimizer) -> None:
            self.optimizer = optimizer

        state = property(lambda self: self.optimizer.state)
        param_groups = property(lambda self: self.optimizer.param_groups)

        def zero_grad(self, set_to_none: bool = True) -> None: ...

        def step(self, closure=None) -> None: ...

    w, bo = small(lambda w: Accumulating(torch.optim.SGD(w.inner, lr=LR)))
    with pytest.raises(RuntimeError, match="record"):
        bo.inner_step(lambda: w.loss(w.x[0], w.y[0]))


def test_several_inner_optimizers():
    """One inner problem: the off-diagonal blocks count."""
    w, bo = small(
        lambda w: [torch.optim.SGD(w.inner[:2], lr=LR), torch.optim.Adam(w.inner[2:], lr=LR)]
    )
    plain = World("tanh")
    both = [torch.optim.SGD(plain.inner[:2], lr=LR), torch.optim.Adam(plain.inner[2:], lr=LR)]
    for t in range(STEPS):
        bo.inner_step(lambda t=t: w.loss(w.x[t], w.y[t]))
        for o in both:
            o.zero_grad()
        plain.loss(plain.x[t], plain.y[t]).backward()
        for o in both:
            o.step()
    assert all(map(torch.equal, w.inner, plain.inner))
    val = w.val()
    close(bo.hypergradient(val)[0], dense(w, lambda: w.loss(w.x[-1], w.y[-1]), val))


def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=LR, momentum=0.9)


@pytest.mark.parametrize("estimator", [Unrolled, lambda: PZOBO(4, smoothing=0.0)])
def test_several_inner_optimizers_are_those_of_one_with_groups(estimator):
    found = []
    for several in (False, True):
        torch.manual_seed(5)
        w, bo = small(
            lambda w, several=several: (
                [make(w.inner[:2]), make(w.inner[2:])] if several else make(w.inner)
            ),
            estimator=estimator(),
        )
        for t in range(STEPS):
            bo.inner_step(lambda t=t, w=w: w.loss(w.x[t], w.y[t]))
        found.append(bo.hypergradient(w.val())[0])
    close(found[1], found[0], 1e-12)


def test_validation_through_an_average():
    """b is taken at the averaged copy, and stands for the gradient at θ."""
    w, bo = small()
    bo.inner_step(lambda: w.loss(w.x[0], w.y[0]))
    average = MODELS["tanh"]().double()
    average.load_state_dict(w.model.state_dict())
    val = (average(w.xv).reshape(-1) - w.yv).square().mean()
    expected = bo.hypergradient(w.val())[0]
    close(bo.hypergradient(val, averaged=average.parameters())[0], expected)
    with pytest.raises(RuntimeError, match="none of the inner parameters"):
        bo.hypergradient(val)


def test_the_hypergradient_is_clipped():
    w, bo = small(ihvp=DenseSolve(damping=RHO), max_grad_norm=1e-3)
    bo.inner_step(lambda: w.loss(w.x[0], w.y[0]))
    bo.outer_step(w.val())
    assert float(w.phi.grad.norm()) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("draw", ["iterator", "deep"])
def test_another_batch_at_the_door_is_an_error(draw: str):
    w, bo = small()
    batches = iter([(w.x[0], w.y[0]), (w.x[1], w.y[1])])
    deep = {"deep": {"batch": (w.x[0], w.y[0])}}

    def closure() -> Tensor:
        return w.loss(*(next(batches) if draw == "iterator" else deep["deep"]["batch"]))

    bo.inner_step(closure)
    deep["deep"]["batch"] = (w.x[1], w.y[1])
    with pytest.raises(RuntimeError, match=r"another batch.*outer_step\(val_loss, train_loss\)"):
        bo.outer_step(w.val())
    bo.outer_step(w.val(), lambda: w.loss(w.x[0], w.y[0]))  # said on purpose


@pytest.mark.parametrize("source", ["numpy", "random", "torch", "generator"])
def test_augmentation_is_that_of_the_step(source: str):
    """Noise from any stream is drawn again; drawn anew it would be another problem."""
    w, bo = small()
    g = torch.Generator().manual_seed(7)
    drawn: list[Tensor] = []

    def noise() -> Tensor:
        if source == "numpy":
            return torch.from_numpy(np.random.randn(BATCH, 3))  # noqa: NPY002
        if source == "random":
            return torch.tensor([[random.gauss(0, 1) for _ in range(3)] for _ in range(BATCH)])
        generator = g if source == "generator" else None
        return torch.randn(BATCH, 3, dtype=torch.float64, generator=generator)

    def closure() -> Tensor:
        x = w.x[0] + noise()
        kept.append(x)
        return w.loss(x, w.y[0])

    kept = drawn
    bo.inner_step(closure)
    before = streams(), g.get_state().tolist()
    val = w.val()
    found = bo.hypergradient(val)[0]
    assert before == (streams(), g.get_state().tolist())
    close(found, dense(w, lambda: w.loss(drawn[0], w.y[0]), val))


def test_a_teacher_that_the_closure_moves():
    """Its parameters are no buffers; they move once a step."""
    w, bo = small()
    teacher = MODELS["tanh"]().double().requires_grad_(False)

    def closure() -> Tensor:
        with torch.no_grad():
            for p, q in zip(teacher.parameters(), w.inner, strict=True):
                p.lerp_(q, 0.1)
        return w.loss(w.x[0], w.y[0]) + (w.model(w.x[0]) - teacher(w.x[0])).square().mean()

    bo.inner_step(closure)
    after = [p.clone() for p in teacher.parameters()]
    bo.outer_step(w.val())
    assert all(map(torch.equal, after, teacher.parameters()))


def test_static_tensors_that_a_loop_fills():
    w, bo = small()
    x, y = torch.zeros_like(w.x[0]), torch.zeros_like(w.y[0])

    def closure(batch: int) -> Tensor:
        x.copy_(w.x[batch])
        y.copy_(w.y[batch])
        return w.loss(x, y)

    bo.inner_step(lambda: closure(0))
    x.copy_(w.xv)
    val = w.val()
    found = bo.hypergradient(val)[0]
    assert torch.equal(x, w.xv)  # what the closure fills is put aside
    close(found, dense(w, lambda: w.loss(w.x[0], w.y[0]), val))
    x.copy_(w.x[1])
    bo.inner_step(lambda: w.loss(x, w.y[1]))
    x.copy_(w.xv)
    with pytest.raises(RuntimeError, match="filled anew"):
        bo.outer_step(w.val())


def test_clipping_after_the_step_is_noticed():
    w, bo = small()
    bo.inner_step(lambda: w.loss(w.x[0], w.y[0]))
    nn.utils.clip_grad_norm_(w.inner, 1e-3)
    with pytest.warns(UserWarning, match="record"):
        bo.inner_step(lambda: w.loss(w.x[1], w.y[1]))


def test_accumulate_after_the_trainers_backward():
    """What its backward pass leaves in the outer gradient does not count."""
    w, bo = small()
    bo.outer.zero_grad()
    bo.record(lambda: w.loss(w.x[0], w.y[0])).backward()
    bo.inner.step()
    val = w.val()
    expected = bo.hypergradient(val)[0]
    bo.accumulate(val)
    assert torch.equal(w.phi.grad, expected)


def test_accelerate_accumulates():
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    w = World("tanh")
    inner = accelerator.prepare(torch.optim.SGD(w.inner, lr=LR))
    bo = BilevelOptimizer(inner, torch.optim.SGD([w.phi], lr=0.1), DenseSolve(damping=RHO))
    for t in range(2):
        with accelerator.accumulate(w.model):
            loss = bo.record(lambda t=t: w.loss(w.x[t], w.y[t]))
            accelerator.backward(loss)
            inner.step()
            inner.zero_grad()
    plain = World("tanh")
    ((plain.loss(plain.x[0], plain.y[0]) + plain.loss(plain.x[1], plain.y[1])) / 2).backward()
    torch.optim.SGD(plain.inner, lr=LR).step()
    torch.testing.assert_close(w.inner, plain.inner, rtol=1e-12, atol=1e-14)
    val = w.val()

    def whole() -> Tensor:
        return (w.loss(w.x[0], w.y[0]) + w.loss(w.x[1], w.y[1])) / 2

    close(bo.hypergradient(val)[0], dense(w, whole, val))


def test_accumulation_that_ends_inside_of_the_step():
    """As Lightning's automatic optimization does it: only the last micro-batch is in the step."""
    w = World("tanh")
    inner = torch.optim.SGD(w.inner, lr=LR)
    bo = BilevelOptimizer(inner, torch.optim.SGD([w.phi], lr=0.1), DenseSolve(damping=RHO))

    def part(t: int) -> Tensor:
        loss = bo.record(lambda: w.loss(w.x[t], w.y[t]))
        (loss / 3).backward()
        return loss

    def whole() -> Tensor:
        return sum(w.loss(w.x[t], w.y[t]) for t in range(3)) / 3

    for _ in range(2):
        inner.zero_grad()
        part(0)
        part(1)
        inner.step(lambda: part(2))
        val = w.val()
        close(bo.hypergradient(val)[0], dense(w, whole, val))


class Steps(Identity):
    """Keeps what it is shown of the inner steps."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[InnerStep] = []

    def samples_wanted(self, batch_size: int) -> list[int]:
        return list(range(batch_size))

    def observe(self, step: InnerStep) -> None:
        self.seen.append(replace(step, gradient=step.gradient.clone()))


@pytest.mark.parametrize("inside", [0, 1, 2, 3])
def test_accumulation_that_ends_inside_of_the_step_is_one_observation(inside):
    """However many of the three micro-batches the closure of the step records: of all of them."""
    w, ihvp = World("tanh"), Steps()
    inner = torch.optim.SGD(w.inner, lr=LR)
    bo = BilevelOptimizer(inner, torch.optim.SGD([w.phi], lr=0.1), ihvp)

    def losses(t: int) -> Tensor:
        return (w.model(w.x[t]).reshape(-1) - w.y[t]).square()

    def part(t: int) -> Tensor:
        loss = bo.record(lambda: PerSample(losses(t), w.phi.exp()))
        (loss / 3).backward()
        return loss

    def last() -> Tensor:
        return torch.stack([part(t) for t in range(3 - inside, 3)]).sum() if inside else w.y.sum()

    for count in (1, 2):
        inner.zero_grad()
        parts = torch.cat([losses(t) for t in range(3)])
        rows = [flat(torch.autograd.grad(x, w.inner, retain_graph=True)) for x in parts]
        expected = flat(torch.autograd.grad((w.phi.exp().repeat(3) * parts).mean(), w.inner))
        for t in range(3 - inside):
            part(t)
        inner.step(last)
        assert len(ihvp.seen) == count
        step = ihvp.seen[-1]
        close(step.gradient, expected)
        assert step.batch_size == 3 * BATCH
        close(step.rows(step.chosen), w.phi.exp().sqrt().repeat(3)[:, None] * torch.stack(rows))
        assert w.phi.grad is None


def test_a_tensor_is_no_old_closure_where_a_wrapper_gives_the_step_one():
    """As Lightning's manual optimization does: what is on record is gone with the new step."""

    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

        def __getattr__(self, name: str):
            return getattr(self.__dict__["optimizer"], name)

        def step(self, closure=None):
            return self.optimizer.step(closure or (lambda: None))

        def zero_grad(self, set_to_none: bool = True) -> None:
            self.optimizer.zero_grad(set_to_none)

    w, ihvp = World("tanh"), Steps()
    inner = Wrapper(torch.optim.SGD(w.inner, lr=LR))
    bo = BilevelOptimizer(inner, torch.optim.SGD([w.phi], lr=0.1), ihvp)

    def train() -> Tensor:
        return w.phi.exp() * (w.model(w.x[0]).reshape(-1) - w.y[0]).square().mean()

    bo.inner_step(train)
    bo.inner_step(train())
    assert len(ihvp.seen) == 2
    with pytest.raises(RuntimeError, match="no training loss to differentiate"):
        bo.outer_step(w.model(w.x[1]).square().mean())


def test_a_line_search_of_the_trainer_shows_its_first_evaluation():
    w, ihvp = World("tanh"), Steps()
    inner = torch.optim.LBFGS(w.inner, lr=LR, max_iter=4)
    bo = BilevelOptimizer(inner, torch.optim.SGD([w.phi], lr=0.1), ihvp)

    def closure() -> Tensor:
        inner.zero_grad()
        loss = bo.record(lambda: (w.model(w.x[0]).reshape(-1) - w.y[0]).square())
        loss.backward()
        return loss

    for count in (1, 2):
        inner.step(closure)
        assert len(ihvp.seen) == count
        assert ihvp.seen[-1].batch_size == BATCH


def test_a_record_without_a_step_is_no_micro_batch_of_the_next_inner_step():
    w, ihvp = World("tanh"), Steps()
    bo = BilevelOptimizer(torch.optim.SGD(w.inner, lr=LR), torch.optim.SGD([w.phi], lr=0.1), ihvp)

    def train() -> Tensor:
        return (w.model(w.x[0]).reshape(-1) - w.y[0]).square()

    bo.record(train)  # and nothing comes of it
    bo.inner_step(train)
    assert ihvp.seen[-1].batch_size == BATCH


@pytest.mark.parametrize("ihvp", [RecycledCG, lambda: Nystrom(5, damping=RHO)])
def test_half_precision_with_the_trainers_own_scaler(ihvp):
    found = []
    for half in (False, True):
        torch.manual_seed(0)
        model, phi = nn.Linear(3, 1), torch.zeros(BATCH, requires_grad=True)
        x, y = torch.randn(BATCH, 3), torch.randn(BATCH)
        inner = torch.optim.SGD(model.parameters(), lr=LR)
        bo = BilevelOptimizer(
            inner, torch.optim.SGD([phi], lr=0.1), ihvp().fresh(), on_trouble="ignore"
        )
        scaler = torch.amp.GradScaler("cpu", enabled=half)

        def closure(half=half, model=model, phi=phi, x=x, y=y) -> Tensor:
            with torch.autocast("cpu", dtype=torch.float16, enabled=half):
                out = model(x)[:, 0].float()
            return (phi.exp() * (out - y).square()).mean() + 0.05 * model.weight.square().sum()

        scaler.scale(bo.record(closure)).backward()
        scaler.step(inner)
        scaler.update()
        found.append(bo.hypergradient(model(x).square().mean())[0])
    close(found[1], found[0], 0.02)
