"""Taking inner steps again: the same steps bit for bit, no trace left, and nothing kept in vain.

outer_step, accumulate and hypergradient of trajectory estimators leave the inner level, buffers and
random streams bitwise as found, although the steps run again in the user's own tensors meanwhile.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from test_resume import live_tensors
from test_untouched import (
    QUERIES,
    ConvNet,
    Reassigning,
    Rig,
    changes,
    picture,
    streams,
)
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import StepLR

from hyperopt_torch import PZOBO, BilevelOptimizer, Unrolled, learn_hyperparameter
from hyperopt_torch.estimators import BilevelProblem
from hyperopt_torch.estimators._trajectory import (
    RecordedStep,
    TrajectoryEstimator,
    follow,
    world_of,
)
from hyperopt_torch.recording.world import BufferCopy

ESTIMATORS: dict[str, Callable[[], TrajectoryEstimator]] = {
    "unrolled": Unrolled,
    "pzobo": lambda: PZOBO(2),
    "pzobo-limit": lambda: PZOBO(2, smoothing=0.0),
    "pzobo-antithetic": lambda: PZOBO(antithetic=True),
}
EVERY = pytest.mark.parametrize("make", ESTIMATORS.values(), ids=ESTIMATORS.keys())


class SpectralNet(nn.Module):
    """Power iterations, whose vectors the forward pass reads and then updates in place."""

    def __init__(self) -> None:
        super().__init__()
        norm = torch.nn.utils.parametrizations.spectral_norm
        self.conv, self.norm = norm(nn.Conv2d(1, 2, 3)), nn.BatchNorm2d(2)
        self.drop, self.head = nn.Dropout(0.3), norm(nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.norm(self.conv(x)).relu()).flatten(1))


class Trajectory(Rig):
    """The same rig under an estimator that takes steps again, with any inner optimizer."""

    def __init__(self, estimator, inner="momentum", model=None, train=None, steps=3) -> None:
        named = isinstance(inner, str)
        super().__init__(None, inner if named else "momentum", model, train, steps=0)
        if not named:
            self.inner = inner(self.model.parameters())
        self.bo = BilevelOptimizer(self.inner, self.outer, estimator=estimator)
        self.go(steps)

    def go(self, steps: int = 3) -> Trajectory:
        for _ in range(steps):
            self.bo.inner_step(self.closure)
        return self


def places(rig: Rig) -> list[tuple[int, ...]]:
    """Where the parameters live, and how often they have been written to."""
    parameters = [*rig.model.parameters(), rig.weights, rig.log_decay]
    return [(id(p), p.data_ptr(), p._version, *p.stride()) for p in parameters]


def place_changes(before: list[tuple[int, ...]], rig: Rig, query: str) -> list[int]:
    """Which parameters have moved; outer_step does write to the last two, the outer ones."""
    after = places(rig)
    watched = len(after) - 2 if query == "outer_step" else len(after)
    return [i for i in range(watched) if before[i] != after[i]]


# --- no trace -----------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("inner", ["momentum", "adam"])
@pytest.mark.parametrize("model", [ConvNet, SpectralNet])
def test_inner_level_buffers_and_streams(make, inner: str, model: type[nn.Module]):
    rig = Trajectory(make(), inner, model())
    for query in QUERIES:
        val = rig.val()  # in train mode: moves the BatchNorm statistics, as in any loop
        before, random_before, place = picture(rig), streams(), places(rig)
        getattr(rig.bo, query)(val)
        assert (query, changes(before, picture(rig))) == (query, [])
        assert (query, place_changes(place, rig, query)) == (query, [])
        assert streams() == random_before
        rig.go(2)
    assert not torch_module._global_forward_pre_hooks
    assert not torch_module._global_forward_hooks


@EVERY
def test_parameters_and_gradients_alone(make):
    """The law above without the buffers, so that one failure does not hide another."""
    rig = Trajectory(make(), "adam", nn.Sequential(nn.Flatten(), nn.Dropout(0.3), nn.Linear(16, 2)))
    for query in QUERIES:
        val = rig.val()
        before, random_before, place = picture(rig), streams(), places(rig)
        getattr(rig.bo, query)(val)
        assert (query, changes(before, picture(rig))) == (query, [])
        assert (query, place_changes(place, rig, query)) == (query, [])
        assert streams() == random_before
        rig.go(2)


@EVERY
def test_hypergradient_is_a_pure_query(make):
    """Outer level, records, validation graph stay; asked again, it answers the same bits."""
    rig = Trajectory(make(), "adam")
    val = rig.val()
    before = picture(rig, outer=True)
    first, second = rig.bo.hypergradient(val), rig.bo.hypergradient(val)
    assert all(map(torch.equal, first, second))
    assert changes(before, picture(rig, outer=True)) == []
    rig.bo.outer_step(val)  # its graph is alive,
    assert torch.equal(rig.weights.grad, first[0])  # and what was foretold is done
    assert torch.equal(rig.log_decay.grad, first[1])


@EVERY
def test_validation_graph_survives(make):
    """Its own backward pass after the query: no tensor that it saved has been written to."""
    rig = Trajectory(make(), "adam")
    rig.model.eval()  # it then saves running statistics as well
    val = rig.val()
    rig.model.train()
    parameters = list(rig.model.parameters())
    expected = torch.autograd.grad(val, parameters, retain_graph=True)
    rig.bo.hypergradient(val)
    assert all(map(torch.equal, torch.autograd.grad(val, parameters), expected))


@EVERY
def test_under_no_grad(make):
    """Called where gradients are off (val_loss was not), the answer is the same."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    rig = Trajectory(make(), "momentum", model)
    val = rig.val()
    expected = rig.bo.hypergradient(val)
    with torch.no_grad():
        found = rig.bo.hypergradient(val)
        assert not torch.is_grad_enabled()
    assert all(map(torch.equal, found, expected))


class Failing(nn.Module):
    """Raises in the middle of a forward pass, after as many calls as it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.left: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                torch.rand(3)
                raise ValueError("from the closure")
        return x


@EVERY
@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize("calls", [0, 2])
@pytest.mark.parametrize("model", [ConvNet, lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 2))])
def test_a_closure_that_raises(make, query: str, calls: int, model):
    """At the first step taken again, and further on; with buffers and without."""
    failing = Failing()
    rig = Trajectory(make(), "adam", nn.Sequential(failing, model()), steps=4)
    val = rig.val()
    before, random_before, place = picture(rig, outer=True), streams(), places(rig)
    failing.left = calls
    with pytest.raises(ValueError, match="from the closure"):
        getattr(rig.bo, query)(val)
    failing.left = None
    assert changes(before, picture(rig, outer=True)) == []
    assert place_changes(place, rig, "failed") == []
    assert streams() == random_before
    assert not torch_module._global_forward_pre_hooks
    assert not torch_module._global_forward_hooks
    rig.bo.outer_step(rig.val())  # and the loop goes on
    assert rig.weights.grad.norm() > 0


# --- the same steps -----------------------------------------------------------------------------


def gaps(rig: Rig) -> list[float]:
    """How far each inner parameter ends from where it is, its steps taken again as they were."""
    problem = BilevelProblem([rig.inner], rig.outer)
    steps = list(rig.bo.estimator._steps)
    with world_of(problem, steps) as world:
        end, _ = follow(problem, steps, world, [])
    pairs = zip(end, problem.inner_parameters, strict=True)
    return [0.0 if torch.equal(x, p) else float((x - p.detach()).abs().max()) for x, p in pairs]


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "foreach": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    "fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
    "wolfe": lambda p: torch.optim.LBFGS(p, max_iter=4, line_search_fn="strong_wolfe"),
    "tensor-lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01)),
}


@pytest.mark.parametrize("inner", OPTIMIZERS)
@pytest.mark.parametrize("model", [ConvNet, SpectralNet])
def test_zero_shift(inner: str, model: type[nn.Module]):
    """Dropout, BatchNorm and power iterations; in a stretch that starts with a state."""
    rig = Trajectory(PZOBO(), OPTIMIZERS[inner], model())
    rig.bo.estimator.restart()
    rig.go(4)
    rig.val()  # the buffers are further on by now
    place = places(rig)
    assert max(gaps(rig)) == 0
    assert place_changes(place, rig, "follow") == []


@pytest.mark.parametrize("inner", ["momentum", "adam", "tensor-lr"])
def test_zero_shift_with_a_scheduler(inner: str):
    """Each step at its own learning rate, also where that is a tensor, which schedulers fill."""
    rig = Trajectory(PZOBO(), OPTIMIZERS[inner], steps=0)
    scheduler = StepLR(rig.inner, 1, 0.5)
    for _ in range(4):
        rig.go(1)
        scheduler.step()
    assert max(gaps(rig)) == 0


def test_zero_shift_with_a_learned_learning_rate():
    rig = Trajectory(PZOBO(), "adam", steps=0)
    (phi,) = learn_hyperparameter(rig.inner, "lr")
    rig.outer.add_param_group({"params": [phi]})
    assert max(gaps(rig.go(3))) == 0
    rig.bo.outer_step(rig.val())
    assert max(gaps(rig.go(3))) == 0


@pytest.mark.parametrize("through", ["optimizer", "model"])
def test_zero_shift_with_hooks_around_the_step(through: str):
    """Clipping, by a hook that knows its optimizer or the model: PZOBO takes both again."""
    rig = Trajectory(PZOBO(), "momentum", steps=0)

    def clip(optimizer: torch.optim.Optimizer, *_) -> None:
        of_optimizer = [p for group in optimizer.param_groups for p in group["params"]]
        clip_grad_norm_(
            of_optimizer if through == "optimizer" else rig.model.parameters(), max_norm=0.1
        )

    rig.inner.register_step_pre_hook(clip)
    assert max(gaps(rig.go(3))) == 0


def test_hooks_around_the_step_leave_the_gradients():
    """In a run with another φ the clipping is another one, and not of the user's gradients."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    rig = Trajectory(PZOBO(2), "momentum", model, steps=0)

    def halve(*_) -> None:
        for p in rig.model.parameters():
            p.grad.mul_(0.5)

    rig.inner.register_step_pre_hook(halve)
    rig.go(3)
    val = rig.val()
    before = picture(rig)
    rig.bo.hypergradient(val)
    assert changes(before, picture(rig)) == []


def test_zero_shift_with_hooks_on_the_parameters():
    rig = Trajectory(PZOBO(), "adam", steps=0)
    for p in rig.model.parameters():
        p.register_hook(lambda g: g.clamp(-0.01, 0.01))
    assert max(gaps(rig.go(3))) == 0


def test_zero_shift_of_models_that_take_turns():
    """Each keeps a statistic of its own, and the second is first called in the second step."""
    models = nn.ModuleList([Reassigning(), Reassigning()])
    rig = Trajectory(PZOBO(), "momentum", models, steps=0)
    for step in range(4):
        rig.bo.inner_step(lambda k=step % 2: rig.objective(models[k](rig.x)))
    assert max(gaps(rig)) == 0


def test_zero_shift_from_a_given_start():
    rig = Trajectory(PZOBO(), "adam", steps=0)
    initial = [p.detach().clone().requires_grad_() for p in rig.model.parameters()]
    rig.outer.add_param_group({"params": initial})
    rig.bo.start_from(initial)
    assert max(gaps(rig.go(3))) == 0


@EVERY
def test_buffers_of_a_step_are_those_it_saw(make):
    """A step that is taken again finds the statistics of its own time, and moves them on."""
    rig = Trajectory(make(), steps=0)
    seen: list[Tensor] = []
    rig.model.register_forward_pre_hook(lambda *_: seen.append(rig.model.norm.running_mean.clone()))
    rig.go(3)
    val = rig.val()
    original = seen[:3]
    seen.clear()
    rig.bo.hypergradient(val)
    estimator = rig.bo.estimator
    if isinstance(estimator, Unrolled):
        assert all(map(torch.equal, seen, reversed(original)))
    elif estimator.smoothing == 0:  # at parameters that are the same to rounding
        torch.testing.assert_close(seen, original)
    else:  # the first loss again, and two runs with other φ
        assert all(torch.equal(seen[i], original[0]) for i in (0, 1, 4))
        torch.testing.assert_close(seen[1:], 2 * original, rtol=0.1, atol=1e-2)
        assert not torch.equal(seen[3], original[0])


# --- memory -------------------------------------------------------------------------------------


def storages(steps: list[RecordedStep]) -> dict[int, int]:
    """Address -> bytes of all memory that the records hold, the user's own buffers left out."""
    found: dict[int, int] = {}

    def add(value: object) -> None:
        if isinstance(value, BufferCopy):
            add(value.value)
        elif isinstance(value, Tensor):
            assert value.grad_fn is None
            storage = value.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict):
            for entry in value.values():
                add(entry)
        elif isinstance(value, (list, tuple)):
            for entry in value:
                add(entry)

    for step in steps:
        for name in ("settings", "parameters", "state"):
            add(getattr(step, name))
        for record in step.records:
            add([record.loss, record.streams.cpu])
            add([list(state.buffers.values()) for state in record.modules.values()])
    return found


def size(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("inner", ["momentum", "adam"])
def test_bytes_on_record(inner: str, train: bool):
    """Parameters, state and buffers a step; random streams where they change."""
    rig = Trajectory(Unrolled(), inner, steps=0)
    rig.model.train(train)
    rig.go(100)
    state = [v for s in rig.inner.state.values() for v in s.values() if isinstance(v, Tensor)]
    each = size(rig.model.parameters()) + size(state) + 4  # the loss
    each += size(rig.model.buffers())  # small ones, a copy a step
    random = size([torch.get_rng_state()])
    limit = 100 * (each + random) if train else 100 * each + random
    steps = list(rig.bo.estimator._steps)
    assert len(steps) == 100
    assert 0.9 * limit < sum(storages(steps).values()) <= limit


def test_bytes_on_record_of_pzobo():
    """Parameters and state once."""
    rig = Trajectory(PZOBO(), "adam", steps=0)
    rig.model.eval()
    rig.go(2)
    before = sum(storages(list(rig.bo.estimator._steps)).values())
    rig.go(98)
    assert sum(storages(list(rig.bo.estimator._steps)).values()) == before + 98 * (
        4 + size(rig.model.buffers())
    )


class Marked(torch.autograd.Function):
    """The identity, whose graph node can be watched."""

    nodes: list[weakref.ref] = []  # noqa: RUF012

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        Marked.nodes.append(weakref.ref(ctx))
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad.clone()


@EVERY
@pytest.mark.parametrize("query", QUERIES)
def test_no_graph_is_kept(make, query: str):
    """Neither by the records nor by a hypergradient."""

    def alive() -> int:
        gc.collect()
        return sum(node() is not None for node in Marked.nodes)

    def train(rig: Rig) -> Tensor:
        return Marked.apply(rig.objective(rig.model(rig.x)))

    Marked.nodes.clear()
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    rig = Trajectory(make(), "momentum", model, train, steps=5)
    assert (len(Marked.nodes), alive()) == (5, 0)
    getattr(rig.bo, query)(rig.val())
    assert len(Marked.nodes) > 5
    assert alive() == 0


def test_the_watch_on_graphs_works():
    Marked.nodes.clear()
    y = Marked.apply(torch.ones(1, requires_grad=True)) * 2
    gc.collect()
    assert Marked.nodes[0]() is not None
    del y
    gc.collect()
    assert Marked.nodes[0]() is None


@pytest.fixture
def _only_new_objects() -> Iterator[None]:
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("_only_new_objects")
@EVERY
def test_nothing_accumulates(make):
    w, phi = torch.ones(2, requires_grad=True), torch.ones((), requires_grad=True)
    inner, outer = torch.optim.SGD([w], lr=0.1, momentum=0.5), torch.optim.SGD([phi], lr=1e-3)
    bo = BilevelOptimizer(inner, outer, estimator=make())

    def run(outer_steps: int) -> None:
        for _ in range(outer_steps):
            for target in (1.0, 2.0):
                bo.inner_step(lambda t=target: (w - t).square().sum() + phi * w.square().sum())
            bo.outer_step((w - 1).square().sum())

    run(10)
    before = live_tensors()
    run(200)
    assert live_tensors() <= before
    assert bo.state_dict()["steps"] == {"inner": 420, "outer": 210}


@pytest.mark.usefixtures("_only_new_objects")
@pytest.mark.parametrize("window", [1, 3])
def test_a_window_keeps_so_many_records(window: int):
    rig = Trajectory(Unrolled(window), "adam", steps=window + 1)
    before, held = live_tensors(), sum(storages(list(rig.bo.estimator._steps)).values())
    rig.go(20)
    steps = list(rig.bo.estimator._steps)
    assert len(steps) == window
    assert live_tensors() <= before
    assert sum(storages(steps).values()) == held
    rig.bo.hypergradient(rig.val())
    assert rig.bo.report.gradients == window
    rig.bo.outer_step(rig.val())
    with pytest.raises(RuntimeError, match="no inner step on record"):
        rig.bo.hypergradient(rig.val())


def test_a_window_keeps_the_last_records():
    losses = []
    rig = Trajectory(Unrolled(3), "adam", steps=0)
    for _ in range(8):
        losses.append(rig.bo.inner_step(rig.closure))
    recorded = [step.records[0].loss for step in list(rig.bo.estimator._steps)]
    assert all(map(torch.equal, recorded, losses[-3:]))
