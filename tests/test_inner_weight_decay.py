"""Law: weight decay in the inner optimizer is the same problem as the penalty in the loss."""

import pytest
import torch
from cases import EXACT, Case
from torch import Tensor, nn

from hyperopt_torch import NHGD, BilevelOptimizer, DenseSolve, GaussNewton, PerSample

DECAY = 0.5


class Ridge:
    """‖Xw - y‖²/(2n) with weighted samples; the penalty is in the loss or in the optimizer."""

    def __init__(self, make, in_loss: bool, decays=(DECAY, DECAY), ihvp=None) -> None:
        g = torch.Generator().manual_seed(0)
        self.X = torch.randn(7, 5, generator=g, dtype=torch.float64)
        self.y = torch.randn(7, generator=g, dtype=torch.float64)
        self.w = [nn.Parameter(torch.full((n,), 0.3, dtype=torch.float64)) for n in (2, 3)]
        self.phi = nn.Parameter(torch.zeros(7, dtype=torch.float64))
        self.decays, self.in_loss = decays, in_loss
        groups = [
            {"params": [w], "weight_decay": 0.0 if in_loss else decay}
            for w, decay in zip(self.w, decays, strict=True)
        ]
        self.bilevel = BilevelOptimizer(
            make(groups), torch.optim.SGD([self.phi], lr=1.0), ihvp or DenseSolve()
        )

    def train(self) -> Tensor:
        loss = (self.phi.exp() * (self.X @ torch.cat(self.w) - self.y).square()).mean() / 2
        if self.in_loss:
            parts = zip(self.decays, self.w, strict=True)
            loss = loss + sum(d * w.square().sum() / 2 for d, w in parts)
        return loss

    def hypergradient(self) -> Tensor:
        val = (torch.cat(self.w) - 1).square().sum()
        (found,) = self.bilevel.hypergradient(val, self.train)
        return found


COUPLED = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1),
    "tensor": lambda p: torch.optim.SGD(p, lr=torch.tensor(0.1)),
}


@pytest.mark.parametrize("decays", [(DECAY, DECAY), (0.2, 0.7), (0.0, 0.4)])
@pytest.mark.parametrize("make", COUPLED.values(), ids=COUPLED)
def test_equals_the_penalty(make, decays):
    in_loss, in_optimizer = (Ridge(make, where, decays) for where in (True, False))
    assert torch.allclose(in_loss.hypergradient(), in_optimizer.hypergradient(), rtol=1e-12)
    norms = [r.bilevel.report.inner_gradient_norm for r in (in_loss, in_optimizer)]
    assert torch.allclose(*norms, rtol=1e-12)


@pytest.mark.parametrize("case", EXACT, ids=str)
def test_for_every_strategy(case: Case):
    make = COUPLED["sgd"]
    strategies = [case.exact(5, 0.0 if "nystrom" not in case.name else 1e-9) for _ in range(2)]
    found = [
        Ridge(make, where, (0.2, 0.7), s).hypergradient()
        for where, s in zip((True, False), strategies, strict=True)
    ]
    assert torch.allclose(*found, rtol=1e-5)


def test_closed_form():
    """f = (w - φ)²/2 with weight decay λ: w* = φ/(1 + λ), so dg/dφ = g'(w*)/(1 + λ)."""
    w = nn.Parameter(torch.tensor(2.0 / (1 + DECAY), dtype=torch.float64))
    phi = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    bilevel = BilevelOptimizer(
        torch.optim.SGD([w], lr=0.1, weight_decay=DECAY),
        torch.optim.SGD([phi], lr=1.0),
        DenseSolve(),
    )
    (found,) = bilevel.hypergradient(w.square() / 2, lambda: (w - phi) ** 2 / 2)
    assert found.item() == pytest.approx(w.item() / (1 + DECAY), rel=1e-12)
    assert bilevel.report.inner_gradient_norm.item() == pytest.approx(0, abs=1e-12)


def test_decoupled_decay_is_no_part_of_the_objective():
    with_decay, without = (
        Ridge(lambda p: torch.optim.AdamW(p, lr=0.1), False, d) for d in ((0.2, 0.7), (0.0, 0.0))
    )
    assert torch.equal(with_decay.hypergradient(), without.hypergradient())


def test_gauss_newton_has_it_too():
    model = nn.Linear(3, 2, dtype=torch.float64)
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.randint(2, (6,))
    phi = nn.Parameter(torch.zeros(6, dtype=torch.float64))

    def train() -> tuple[Tensor, Tensor]:
        outputs = model(x)
        losses = nn.functional.cross_entropy(outputs, y, reduction="none")
        return (phi.exp() * losses).mean(), outputs

    found = []
    for curvature in (None, GaussNewton()):
        bilevel = BilevelOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=DECAY),
            torch.optim.SGD([phi], lr=1.0),
            DenseSolve(),
            curvature=curvature,
        )
        found.append(bilevel.hypergradient(model(x).square().mean(), train)[0])
    assert torch.allclose(*found, rtol=1e-8)


def test_nhgd_adds_it_to_the_fisher_matrix():
    """As it adds the curvature of a penalty that the closure tells apart."""
    found = []
    for in_loss in (True, False):
        w = nn.Parameter(torch.tensor([0.3, -0.2], dtype=torch.float64))
        phi = nn.Parameter(torch.zeros(4, dtype=torch.float64))
        X = torch.arange(8, dtype=torch.float64).reshape(4, 2) / 8
        bilevel = BilevelOptimizer(
            torch.optim.SGD([w], lr=0.0, weight_decay=0.0 if in_loss else DECAY),
            torch.optim.SGD([phi], lr=1.0),
            NHGD(8, rows="per_sample"),
        )

        def train(w=w, phi=phi, X=X, in_loss=in_loss) -> PerSample:
            penalty = DECAY * w.square().sum() / 2 if in_loss else None
            return PerSample((X @ w - 1).square(), phi.exp(), penalty)

        for _ in range(3):
            bilevel.inner_step(train)
        found.append(bilevel.hypergradient(w.sum())[0])
    assert torch.allclose(*found, rtol=1e-10)
