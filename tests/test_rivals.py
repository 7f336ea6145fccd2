"""The rivals of the LancBiO examples on quadratics of known optimum."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hyperopt_torch import Neumann
from hyperopt_torch.operators import Dense

A = torch.diag(torch.tensor([1.0, 1.5, 0.8], dtype=torch.float64))
A[0, 1] = A[1, 0] = 0.2
TARGET = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)


@pytest.fixture
def shared(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "examples"))
    from _shared import rivals, single_loop

    return rivals, single_loop


class Quadratic:
    """Inner ½θᵀAθ - θᵀφ, outer ½‖θ - t‖²: θ* = A⁻¹φ, hypergradient A⁻¹(θ* - t), optimum φ = At."""

    inner_lr, noisy = 0.5, False

    def __init__(self, scale, outer_lr=0.2):
        self.inner, self.outer = (
            torch.zeros(3, dtype=torch.float64, requires_grad=True) for _ in range(2)
        )
        self.scale, self.outer_lr = scale, outer_lr

    def draw(self):
        pass

    def train_loss(self):
        return 0.5 * self.inner @ A @ self.inner - self.inner @ self.outer

    def val_loss(self):
        return 0.5 * (self.inner - TARGET).square().sum()

    def optimizer(self):
        return torch.optim.SGD([self.outer], lr=self.outer_lr)


def scale_of(single_loop, **more):
    return single_loop.Scale(subspace=3, growth=(1.3, 5), step=0.7, subbio=0.7, damping=0.1, **more)


@pytest.mark.parametrize(
    ("method", "steps"),
    [("ttsa", 200), ("bsa", 150), ("f2sa", 250), ("soba", 150), ("amigo", 150)],
)
def test_reaches_the_optimum(shared, method, steps):
    _, single_loop = shared
    rates = {"ttsa": 2.5, "bsa": 1.0, "f2sa": 4.0}
    problem = Quadratic(scale_of(single_loop, rates=rates, penalty=2.0))
    torch.manual_seed(0)
    cost, curve = single_loop.run(problem, method, steps, dict)
    assert (problem.outer - A @ TARGET).norm() < 1e-3 * (A @ TARGET).norm()
    assert (cost["products"] == 0) is (method == "f2sa")
    assert curve[-1]["step"] == cost["outer_steps"]


def test_random_terms_are_the_series_in_the_mean(shared):
    rivals, _ = shared
    strategy, series = rivals.RandomTerm(5, 0.7), Neumann(4, scale=0.7)
    found = torch.stack([strategy.solve(Dense(A), TARGET).x for _ in range(400)])
    terms = found.unique(dim=0)
    assert len(terms) == 5  # p = 0, ..., 4
    assert (terms.mean(0) - series.solution(Dense(A), TARGET).x).norm() < 1e-12


@pytest.mark.parametrize("lam", [10.0, 1e4])
def test_f2sa_tends_to_the_hypergradient(shared, lam):
    """From exact minimizers its error is as in the closed form, of order 1/λ."""
    rivals, single_loop = shared
    problem = Quadratic(scale_of(single_loop))
    problem.outer.data.copy_(torch.tensor([0.3, 1.0, -1.0]))
    phi = problem.outer.detach()
    level = rivals.F2SA(problem, inner_steps=1)
    level.z = torch.linalg.solve(A, phi)
    level.y = torch.linalg.solve(lam * A + torch.eye(3), lam * phi + TARGET)
    true = torch.linalg.solve(A, level.z - TARGET)
    error = (level.hypergradient(lam) - true).norm() / true.norm()
    assert 0.1 / lam < error < 2 / lam


def test_the_subspace_grows(shared):
    """m is 1, from the fourth solve on 2, from the eighth on 3."""
    rivals, _ = shared
    strategy, starts = rivals.GrowingLancBiO(3, 1.3, 4, safeguard=False), []
    for _ in range(11):
        strategy.solve(Dense(A), TARGET)
        starts.append(strategy.state["step"] == 3)
    assert starts == [True, True, True, False, True, False, True, False, False, True, False]


@pytest.mark.parametrize("safeguard", [True, False])
def test_the_growing_subspace_solves(shared, safeguard):
    """To the letter it gets there, and may leave again: a residual of rounding starts it anew."""
    rivals, _ = shared
    strategy = rivals.GrowingLancBiO(3, 1.3, 4, safeguard)
    exact = torch.linalg.solve(A, TARGET)
    errors = [(strategy.solution(Dense(A), TARGET).x - exact).norm() for _ in range(20)]
    assert (errors[-1] if safeguard else min(errors)) < 1e-8


def test_newsgroups_are_read(shared, monkeypatch):
    """As scikit-learn hands them over; the real ones have to be fetched."""
    texts = {"train": ["cats purr", "dogs bark", "cats sleep", "dogs purr"], "test": ["dogs sleep"]}
    topics = {"train": [0, 1, 0, 1], "test": [1]}

    def fetch(subset, remove):
        assert remove == ("headers", "footers", "quotes")
        return SimpleNamespace(data=texts[subset], target=topics[subset])

    monkeypatch.setattr("sklearn.datasets.fetch_20newsgroups", fetch)
    import lancbio_text

    x, y, tested = lancbio_text.newsgroups()
    assert x.shape == (5, 5)  # bark, cats, dogs, purr, sleep
    assert y.tolist() == [0, 1, 0, 1, 1]
    assert tested.tolist() == [False, False, False, False, True]
    problem = lancbio_text.Penalties(lancbio_text.Settings(download=True), seed=0)
    assert len(problem.test_set[1]) == 1
