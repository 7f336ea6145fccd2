"""HealthLog: what it keeps, when it reads, and when it says that hypergradients are noise."""

from __future__ import annotations

import gc
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence

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
    HypergradientWarning,
    Nystrom,
    Unrolled,
)
from hyperopt_torch.report import SolveReport

SGD = torch.optim.SGD
QUANTITIES = {"step", "residual", "cosine", "length", "products", "val_loss", "troubles"}


class Told:
    """What a HealthLog listens to: outer steps made by hand."""

    def on_outer_step(self, listener: Callable) -> None:
        self.listener = listener

    def tell(self, hypergradient: Sequence[Tensor | None], residual: float | None = 0.1, **more):
        given = {"residual": None if residual is None else torch.tensor(residual), **more}
        report = SolveReport("S", 3, torch.ones(()), hypergradient_norm=torch.ones(()), **given)
        self.listener(report, list(hypergradient), torch.tensor(0.5))


def follow(values: Sequence[Sequence[float] | Tensor], **settings) -> HealthLog:
    source = Told()
    log = HealthLog(source, **settings)
    for value in values:
        source.tell([torch.as_tensor(value)])
    return log


def same(found: Sequence[float], expected: Sequence[float]) -> bool:
    return found == pytest.approx(expected, nan_ok=True)


class Loop:
    """½ wᵀAw - φᵀw, A = diag(1..n); outer ½‖w - 2‖²."""

    def __init__(self, n: int = 3, **kwargs) -> None:
        self.A = torch.arange(1.0, n + 1, dtype=torch.float64)
        self.w = nn.Parameter(torch.zeros(n, dtype=torch.float64))
        self.phi = nn.Parameter(torch.ones(n, dtype=torch.float64))
        inner, outer = SGD([self.w], lr=0.1), SGD([self.phi], lr=0.1)
        self.bilevel = BilevelOptimizer(inner, outer, **kwargs)

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.bilevel.inner_step(lambda: self.A @ self.w.square() / 2 - self.phi @ self.w)
            self.bilevel.outer_step((self.w - 2).square().sum() / 2)


# --- what is kept -------------------------------------------------------------------------------


NONE = math.nan
COSINES = {
    "a direction": ([[1.0, 1.0], [2.0, 2.0], [0.5, 0.5]], [NONE, 1.0, 1.0]),
    "forth and back": ([[1.0], [-3.0], [2.0]], [NONE, -1.0, -1.0]),
    "a turn": ([[1.0, 0.1], [0.1, -1.0]], [NONE, 0.0]),
    "45 degrees": ([[1.0, 1.0], [1e-9, 1.0]], [NONE, 2**-0.5]),
    "tiny in half": (torch.tensor([[1e-7, 2e-7]] * 2, dtype=torch.float16), [NONE, 1.0]),
    "huge in half": (torch.tensor([[6e4, 5e4]] * 2, dtype=torch.float16), [NONE, 1.0]),
    "other samples": ([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]], [NONE, NONE, 1.0]),
    "some samples": ([[1.0, 2.0, 0.0], [0.0, 1.0, 5.0], [-1.0, 0.0, 5.0]], [NONE, 1.0, 24 / 26]),
    "a standstill": ([[1.0], [0.0], [1.0]], [NONE, NONE, 1.0]),
    "a bad step": ([[1.0, 1.0], [NONE, 1.0], [1.0, 1.0]], [NONE, NONE, 1.0]),
    "an infinite one": ([[1.0, 1.0], [math.inf, 1.0], [1.0, 1.0]], [NONE, NONE, 1.0]),
    "another shape": ([[1.0], [1.0, 1.0], [1.0, 1.0]], [NONE, NONE, 1.0]),
}


@pytest.mark.parametrize("case", COSINES)
def test_cosine(case: str):
    values, expected = COSINES[case]
    assert same(follow(values).history()["cosine"], expected)


def test_cosine_is_over_all_outer_parameters_and_leaves_none_out():
    source = Told()
    log = HealthLog(source)
    source.tell([torch.tensor([3.0]), None, torch.tensor([[4.0]])])
    source.tell([torch.tensor([4.0]), None, torch.tensor([[3.0]])])
    source.tell([None, None, None])
    assert same(log.history()["cosine"], [NONE, 0.96, NONE])


@pytest.mark.parametrize("estimator", [None, Unrolled(), PZOBO(antithetic=True)], ids=str)
def test_history_of_a_run(estimator):
    loop = Loop(estimator=estimator)
    log = HealthLog(loop.bilevel)
    lengths, losses = [], []
    loop.bilevel.on_outer_step(lambda report, h, loss: lengths.append(float(h[0].norm())))
    loop.bilevel.on_outer_step(lambda report, h, loss: losses.append(float(loss)))
    loop.steps(6)
    history = log.history()
    assert history.keys() == QUANTITIES
    assert history["step"] == [1, 2, 3, 4, 5, 6]
    assert history["length"] == pytest.approx(lengths)
    assert history["val_loss"] == losses
    assert history["products"][-1] == loop.bilevel.report.matvecs
    if estimator is None:
        assert history["residual"][-1] == pytest.approx(float(loop.bilevel.report.residual))
    else:
        assert all(map(math.isnan, history["residual"]))
    assert all(same(log.history()[name], history[name]) for name in QUANTITIES)  # reads no more
    assert log.steps == 6
    assert "steps=6" in repr(log)


def test_scalars_are_those_of_the_last_step():
    loop = Loop(ihvp=DenseSolve())
    log = HealthLog(loop.bilevel)
    assert log.scalars() == {}
    loop.steps(1)
    assert log.scalars().keys() == {f"bilevel/{name}" for name in QUANTITIES - {"step", "cosine"}}
    loop.steps(1)
    history = log.history()
    assert log.scalars() == {f"bilevel/{k}": history[k][-1] for k in QUANTITIES - {"step"}}


def test_scalars_show_nan_but_not_what_is_unknown():
    source = Told()
    log = HealthLog(source)
    source.tell([torch.ones(1)], residual=None)
    assert "bilevel/residual" not in log.scalars()
    source.tell([torch.ones(1)], residual=NONE)
    assert math.isnan(log.scalars()["bilevel/residual"])


def test_troubles_of_each_step():
    source = Told()
    log = HealthLog(source)
    source.tell([torch.ones(1)], 0.1)
    source.tell([torch.ones(1)], 2.0, negative_curvature=torch.tensor(True))
    source.tell([torch.full((1,), NONE)], NONE, finite=torch.tensor(False))
    assert log.troubles() == [(), ("negative_curvature", "residual"), ("not_finite",)]
    assert log.history()["troubles"] == [0, 2, 1]


@pytest.mark.parametrize(("keep", "window"), [(5, 50), (5, 2), (1, 3), (7, 7)])
def test_only_the_last_steps_are_kept(keep: int, window: int):
    log = follow([[float(i)] for i in range(1, 24)], keep=keep, window=window)
    assert log.history()["step"] == list(range(24 - keep, 24))
    assert len(log.troubles()) == keep


@pytest.mark.parametrize(
    ("setting", "value"), [("window", 1), ("window", 2.5), ("keep", 0), ("keep", True)]
)
def test_settings_are_checked(setting: str, value):
    with pytest.raises(ValueError, match=f"Invalid {setting}"):
        HealthLog(Told(), **{setting: value})


# --- when it reads, and what it holds -----------------------------------------------------------


def test_the_device_is_read_once_a_window_or_when_asked(monkeypatch):
    reads, tolist = [], Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda t: reads.append(1) or tolist(t))
    for name in ("item", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        monkeypatch.setattr(Tensor, name, None)
    source = Told()
    log = HealthLog(source, window=10)

    def walk(count: int) -> int:
        reads.clear()
        for _ in range(count):
            source.tell([torch.ones(2)])
        return len(reads)

    assert walk(9) == 0
    assert walk(1) == 1
    assert walk(10) == 1
    walk(3)
    reads.clear()
    log.history(), log.scalars(), log.troubles(), log.verdict()
    assert len(reads) == 1


def tensors_alive() -> int:
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())


def test_memory_is_one_hypergradient_and_a_window_of_numbers():
    source = Told()
    log = HealthLog(source, window=5, keep=10_000)
    for _ in range(5):
        source.tell([torch.ones(3, dtype=torch.bfloat16)])
    before = tensors_alive()
    for _ in range(50):
        source.tell([torch.ones(3, dtype=torch.bfloat16)])
    assert tensors_alive() <= before
    held = [t for t in vars(log).values() if isinstance(t, Tensor)]
    assert [(t.shape, t.dtype) for t in held] == [((3,), torch.bfloat16)]


@pytest.mark.parametrize("estimator", [None, Unrolled(), PZOBO(antithetic=True)], ids=str)
def test_no_graph_is_held(estimator):
    loop = Loop(estimator=estimator)
    log = HealthLog(loop.bilevel)
    loop.steps(2)
    held = [v for row in log._unread for v in row.values() if isinstance(v, Tensor)]
    assert held
    assert all(v.grad_fn is None and not v.requires_grad and v.ndim == 0 for v in held)
    assert max(v.untyped_storage().nbytes() for v in held) <= 8


def test_what_it_holds_is_its_own():
    """Hypergradients become .grad, and validation losses live in buffers that a loop fills."""
    source, g, loss = Told(), torch.tensor([1.0, 1.0]), torch.tensor(0.5)
    log = HealthLog(source)
    report = SolveReport("S", 3, torch.ones(()))
    source.listener(report, [g], loss)
    g.copy_(torch.tensor([1.0, -1.0]))
    source.listener(report, [g], loss.fill_(2.0))
    assert same(log.history()["cosine"], [NONE, 0.0])
    assert log.history()["val_loss"] == [0.5, 2.0]


def test_a_run_is_bit_for_bit_the_same_with_a_log():
    results = []
    for logged in (False, True):
        torch.manual_seed(0)
        loop = Loop(ihvp=Nystrom(2, damping=1.0))
        if logged:
            HealthLog(loop.bilevel, window=2)
        loop.steps(7)
        results.append((loop.w.detach().clone(), loop.phi.detach().clone(), torch.rand(1)))
    assert all(map(torch.equal, *results))


# --- the verdict --------------------------------------------------------------------------------


def noise(count: int, n: int = 400, seed: int = 0) -> Iterator[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(n, generator=g) for _ in range(count))


def signs(count: int) -> Iterator[Tensor]:
    """Of one parameter: as often the same direction as not, so that the median cosine is ±1."""
    for i in range(count):
        yield torch.ones(1) if i % 4 < 2 else -torch.ones(1)


def direction(count: int, share: float = 1.0) -> Iterator[Tensor]:
    """A cosine of about share² / (1 + share²)."""
    return (share + x for x in noise(count))


def samples(count: int, share: float = 0.0, seed: int = 1) -> Iterator[Tensor]:
    """40 of 400 samples a step: consecutive hypergradients have next to no entry in common."""
    g = torch.Generator().manual_seed(seed)
    for x in direction(count, share):
        yield torch.where(torch.rand(400, generator=g) < 0.1, x, 0.0)


RUNS = {  # (hypergradients, residual) -> whether it is noise
    "noise": (noise, 2.0, True),
    "a scalar, whose cosine is one or minus one": (signs, 2.0, False),
    "noise in samples": (samples, 2.0, True),
    "a residual of NaN": (noise, NONE, True),
    "noise, solved well": (noise, 0.9, False),
    "no residual": (noise, None, False),
    "a direction, solved badly": (direction, 2.0, False),
    "a faint direction": (lambda n: direction(n, 0.75), 2.0, False),
    "a direction in samples": (lambda n: samples(n, 1.0), 2.0, False),
    "nothing moves": (lambda n: (torch.zeros(4) for _ in range(n)), 2.0, False),
}


def judged(parts: Sequence[tuple[Iterator[Tensor], float | None]], **settings):
    source = Told()
    log = HealthLog(source, **{"window": 20, **settings})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for hypergradients, residual in parts:
            for x in hypergradients:
                source.tell([x], residual)
    assert all(w.category is HypergradientWarning for w in caught)
    return log, [str(w.message) for w in caught]


@pytest.mark.parametrize("name", RUNS)
def test_noise_is_said_once_and_nothing_else_is(name: str):
    make, residual, bad = RUNS[name]
    log, said = judged([(make(100), residual)])
    assert len(said) == bad
    assert (log.verdict() is not None) == bad


def test_noise_in_part_of_the_steps_needs_more_than_half():
    def run(bad: int) -> list[str]:
        g, source = noise(20), Told()
        HealthLog(source, window=20)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for i, x in enumerate(g):
                source.tell([x], 2.0 if i < bad else 0.5)
        return [str(w.message) for w in caught]

    assert run(10) == []
    (words,) = run(11)
    assert "55% of the last 20" in words


def test_a_run_that_came_to_rest_is_not_blamed():
    """Near the end of a good run hypergradients are small, and noise: 12 of 120 runs measured."""
    log, said = judged([(direction(20), 0.5), (noise(80), 2.0)])
    assert said == []
    assert log.verdict() is None


def test_a_bad_start_is_said_where_it_ends():
    assert len(judged([(noise(20), 2.0), (direction(40), 0.5)])[1]) == 1
    assert judged([(noise(19), 2.0)])[1] == []


def test_what_is_said_does_not_depend_on_who_reads():
    def run(read: bool) -> list[int]:
        source, when = Told(), []
        log = HealthLog(source, window=20)
        for i, x in enumerate(noise(60)):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                source.tell([x], 2.0)
                if read:
                    log.scalars(), log.verdict(), log.history()
            when += [i] * len(caught)
        return when

    assert run(True) == run(False) == [19]


def test_a_verdict_on_a_short_run_needs_half_a_window():
    log, _ = judged([(noise(10), 2.0)])  # nine cosines
    assert log.verdict() is None
    log, said = judged([(noise(11), 2.0)])
    assert "noise" in log.verdict()
    assert said == []


def test_the_warning_points_at_the_line_of_the_loop_and_names_a_remedy():
    """A residual of 30: 2 directions of 40, and a damping that blows up the rest."""
    loop = Loop(40, ihvp=Nystrom(2, damping=1e-4), on_trouble="ignore")
    HealthLog(loop.bilevel, window=4)
    g = torch.Generator().manual_seed(0)
    with pytest.warns(HypergradientWarning, match="GaussNewton") as caught:  # noqa: PT031
        for _ in range(8):
            loop.steps(0)
            loop.bilevel.inner_step(lambda: loop.A @ loop.w.square() / 2 - loop.phi @ loop.w)
            b = torch.randn(40, generator=g, dtype=torch.float64)
            loop.bilevel.outer_step(b @ loop.w)
    assert [w.filename for w in caught] == [__file__]


# --- plots --------------------------------------------------------------------------------------


def test_plot_has_a_panel_for_what_is_known(tmp_path):
    pytest.importorskip("matplotlib")
    loop = Loop()
    log = HealthLog(loop.bilevel, keep=4)
    loop.steps(6)
    figure = log.plot(tmp_path / "health.png")
    labels = [axis.get_ylabel() for axis in figure.axes]
    assert labels == ["residual", "cosine", "length", "val_loss"]
    x, y = figure.axes[3].lines[0].get_data()
    assert list(x) == [3, 4, 5, 6]
    assert list(y) == log.history()["val_loss"]
    assert (tmp_path / "health.png").stat().st_size > 5000


@pytest.mark.parametrize("count", [0, 1, 3])
def test_plot_of_next_to_nothing(count: int, tmp_path):
    pytest.importorskip("matplotlib")
    loop = Loop(estimator=Unrolled())
    log = HealthLog(loop.bilevel)
    loop.steps(count)
    log.plot(tmp_path / "health.pdf")
    assert (tmp_path / "health.pdf").exists()


def test_plot_without_matplotlib_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        follow([[1.0]]).plot()


# --- on a network -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ihvp", "bad"),
    [(Nystrom(5, damping=1e-3), True), (ConjugateGradient(5, damping=1.0), False)],
    ids=str,
)
def test_verdict_on_a_small_network(ihvp, bad: bool):
    """A strength of input noise for each of 64 pixels; half of them are noisy in the validation."""
    sklearn = pytest.importorskip("sklearn.datasets")
    data = sklearn.load_digits()
    x, y = torch.tensor(data.data / 16).float(), torch.tensor(data.target)
    noisy = torch.cat([torch.full((4,), 0.7), torch.zeros(4)]).repeat(8)
    xv, yv = x[400:700] + noisy * torch.randn(300, 64), y[400:700]
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    phi = torch.full((64,), -2.3, requires_grad=True)
    inner = SGD(model.parameters(), lr=0.05, momentum=0.9)
    bilevel = BilevelOptimizer(
        inner, torch.optim.Adam([phi], lr=0.03), ihvp.fresh(), on_trouble="ignore"
    )
    log = HealthLog(bilevel)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(600):
            i, e = torch.randint(400, (100,)), torch.randn(100, 64)
            bilevel.inner_step(lambda: F.cross_entropy(model(x[i] + phi.exp() * e), y[i]))  # noqa: B023
            if step % 10 == 9:
                bilevel.outer_step(F.cross_entropy(model(xv), yv))
    assert (log.verdict() is not None) == bad
