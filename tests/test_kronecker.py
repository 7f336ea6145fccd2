"""NHGD(structure="kronecker"): blocks L ⊗ R / tr L by hand, and where they are exact."""

from __future__ import annotations

import itertools
from functools import partial

import oracles
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from hyperopt_torch import NHGD, BilevelOptimizer, PerSample
from hyperopt_torch.ihvp import _kronecker
from hyperopt_torch.ihvp.base import InnerStep
from hyperopt_torch.operators import Dense

kronecker = partial(NHGD, structure="kronecker", rows="per_sample", samples=99)


def run(model: nn.Module, strategy: NHGD, x: Tensor, y: Tensor, steps: int = 1) -> Tensor:
    """(steps · B, n) rows √w ∇ℓ by hand, of inner steps that do not move."""
    phi = torch.linspace(-1, 1, len(x), dtype=torch.float64, requires_grad=True)
    parameters = list(model.parameters())
    bo = BilevelOptimizer(SGD(parameters, lr=0.0), SGD([phi], lr=0.1), strategy)
    rows = []
    for step in range(steps):
        at = x * (1 + step)

        def train(at: Tensor = at) -> PerSample:
            losses = F.cross_entropy(model(at), y, reduction="none")
            return PerSample(losses, phi.exp())

        losses, weights = train()[:2]
        for loss, weight in zip(losses, weights.detach(), strict=True):
            row = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            like = zip(row, parameters, strict=True)
            row = [torch.zeros_like(p) if g is None else g for g, p in like]
            rows.append(weight.sqrt() * oracles.flat(row))
        bo.inner_step(train)
    return torch.stack(rows)


def data(*shape: int, classes: int = 3) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(7, *shape, dtype=torch.float64, generator=g)
    return x, torch.randint(classes, (7,), generator=g)


def matrices(model: nn.Module, bias_of: dict[str, str]) -> list[Tensor]:
    """For each block the numbers of the entries of θ, as a matrix."""
    at, found = 0, {}
    for name, p in model.named_parameters():
        found[name] = torch.arange(at, at + p.numel()).reshape(len(p), -1)
        at += p.numel()
    for weight, bias in bias_of.items():
        found[weight] = torch.cat([found[weight], found.pop(bias)], dim=1)
    return list(found.values())


def by_hand(rows: Tensor, blocks: list[Tensor], weights: Tensor | None = None) -> Tensor:
    """Σ over blocks of L ⊗ R / tr L, entry by entry of θ."""
    n = rows.shape[1]
    weights = rows.new_full((len(rows),), 1 / len(rows)) if weights is None else weights
    whole = torch.zeros(n, n, dtype=rows.dtype)
    for index in blocks:
        M = rows[:, index.flatten()].reshape(-1, *index.shape)
        L = sum(w * m @ m.mT for w, m in zip(weights, M, strict=True))
        R = sum(w * m.mT @ m for w, m in zip(weights, M, strict=True))
        order = index.flatten()
        whole[order[:, None], order] = torch.kron(L, R) / L.trace()
    return whole


def assert_inverts(strategy: NHGD, matrix: Tensor) -> None:
    n = len(matrix)
    eye = torch.eye(n, dtype=torch.float64)
    for seed in range(2):
        b = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        x = strategy.solve(Dense(eye), b).x
        rho = float(strategy.damping_used)
        assert rho == pytest.approx(strategy.damping * float(matrix.diagonal().mean()), rel=1e-10)
        exact = torch.linalg.solve(matrix + rho * eye, b)
        assert (x - exact).norm() <= 1e-9 * exact.norm()


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()


MLP = {"0.weight": "0.bias", "2.weight": "2.bias"}


def conv() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 2, bias=False), nn.GroupNorm(1, 4), nn.Tanh(),
        nn.Conv2d(4, 4, 2, groups=2), nn.Flatten(), nn.Linear(4, 3),
    ).double()  # fmt: skip


class Tied(nn.Module):
    """One weight in two layers, a biasless one, and a tensor that is in no layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.last = nn.Linear(4, 3, bias=False)
        self.scale = nn.Parameter(torch.ones(4))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.scale * self.second(self.first(x).tanh()).tanh())


MODELS = {
    "mlp": (mlp, (4,), MLP),
    # GroupNorm follows a weight of as many rows and is no bias
    "conv": (conv, (2, 3, 3), {"3.weight": "3.bias", "5.weight": "5.bias"}),
    "tied": (Tied, (4,), {"first.weight": "first.bias"}),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("decay", [1.0, 0.7])
def test_blocks_by_hand(name: str, decay: float):
    make, shape, bias_of = MODELS[name]
    model, strategy = make(), kronecker(decay=decay)
    rows = run(model, strategy, *data(*shape), steps=3)
    ages = torch.tensor([2.0, 1.0, 0.0]).double().repeat_interleave(7)
    weights = decay**ages / (decay**ages).sum()
    matrix = by_hand(rows, matrices(model, bias_of), weights)
    assert_inverts(strategy, matrix)
    exact = torch.einsum("i,ij,ij->j", weights, rows, rows)
    torch.testing.assert_close(matrix.trace(), exact.sum())  # the trace is that of F


def test_a_loss_tensor_tells_of_no_layers():
    """Nobody saw the modules: each bias is a block of its own, which is exact."""
    model, strategy = mlp(), kronecker()
    x, y = data(4)
    phi = torch.zeros(7, dtype=torch.float64, requires_grad=True)
    bo = BilevelOptimizer(SGD(model.parameters(), lr=0.0), SGD([phi], lr=0.1), strategy)
    rows = run(mlp(), kronecker(), x, y)
    rows /= torch.linspace(-1, 1, 7, dtype=torch.float64).exp().sqrt()[:, None]
    bo.inner_step(F.cross_entropy(model(x), y, reduction="none"))
    assert_inverts(strategy, by_hand(rows, matrices(model, {})))
    first = torch.arange(12, 15)
    torch.testing.assert_close(
        by_hand(rows, matrices(model, {}))[first][:, first], (rows.mT @ rows / 7)[first][:, first]
    )


def linear_rows(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Gradients δaᵀ of a linear layer, flat."""
    return torch.stack([torch.outer(delta, a).flatten() for delta, a in pairs])


def shown(rows: Tensor, shape: tuple[int, int]) -> NHGD:
    strategy = kronecker()
    wanted = strategy.samples_wanted(len(rows))
    strategy.observe(InnerStep(rows[0], len(rows), chosen=wanted, chosen_rows=rows, shapes=[shape]))
    return strategy


def test_exact_where_inputs_and_gradients_are_independent():
    """Every input meets every output gradient: F = E[δδᵀ] ⊗ E[aaᵀ], K-FAC's two factors."""
    g = torch.Generator().manual_seed(1)
    A, D = (torch.randn(5, d, dtype=torch.float64, generator=g) for d in (4, 3))
    rows = linear_rows(list(itertools.product(D, A)))
    fisher = rows.mT @ rows / len(rows)
    torch.testing.assert_close(torch.kron(D.mT @ D / 5, A.mT @ A / 5), fisher)
    assert_inverts(shown(rows, (3, 4)), fisher)


def test_exact_for_one_sample():
    g = torch.Generator().manual_seed(1)
    a, delta = (torch.randn(d, dtype=torch.float64, generator=g) for d in (4, 3))
    rows = linear_rows([(delta, a)])
    assert_inverts(shown(rows, (3, 4)), rows.mT @ rows)


def test_one_sample_of_a_network():
    """Exact within each layer, its bias included; between layers it sees nothing."""
    model, strategy = mlp(), kronecker()
    x, y = data(4)
    row = run(model, strategy, x[:1], y[:1])[0]
    exact = torch.zeros(len(row), len(row), dtype=torch.float64)
    for index in map(torch.flatten, matrices(model, MLP)):
        exact[index[:, None], index] = torch.outer(row[index], row[index])
    assert_inverts(strategy, exact)


def test_a_vector_is_a_block_without_error():
    g = torch.Generator().manual_seed(1)
    rows = torch.randn(9, 5, dtype=torch.float64, generator=g)
    assert_inverts(shown(rows, (5,)), rows.mT @ rows / 9)
    assert_inverts(shown(rows[:, :1], ()), rows[:, :1].mT @ rows[:, :1] / 9)


def test_a_long_side_keeps_its_diagonal(monkeypatch):
    monkeypatch.setattr(_kronecker, "_LARGEST_SIDE", 3)
    g = torch.Generator().manual_seed(1)
    rows = torch.randn(9, 12, dtype=torch.float64, generator=g)
    M = rows.reshape(9, 3, 4)
    L = torch.einsum("rij,rkj->ik", M, M) / 9
    R = torch.einsum("rij,rij->j", M, M).diag() / 9
    strategy = shown(rows, (3, 4))
    assert strategy.state["right0"].shape == (4,)
    assert_inverts(strategy, torch.kron(L, R) / L.trace())
    long = shown(rows, (12,))
    assert_inverts(long, (rows.square().mean(0)).diag())


def test_batch_rows_mean_the_same():
    """√B times the mean of independent gradients: both factors are those of single rows."""
    g = torch.Generator().manual_seed(2)
    A, D = (torch.randn(20_000, d, dtype=torch.float64, generator=g) for d in (4, 3))
    D = D * torch.tensor([1.0, 0.3, 0.1], dtype=torch.float64)
    G = torch.einsum("bo,bi->boi", D, A).reshape(400, 50, 12).mean(1)
    strategy = NHGD(structure="kronecker")
    for gradient in G:
        strategy.observe(InnerStep(gradient, batch_size=50, shapes=[(3, 4)]))
    exact = torch.kron(D.mT @ D, A.mT @ A) / 20_000**2
    eye = torch.eye(12, dtype=torch.float64)
    found = torch.stack([strategy.prepare(Dense(eye), 0.0)(e) for e in eye])
    close = torch.linalg.inv(found) - strategy.damping * exact.diagonal().mean() * eye
    assert (close - exact).norm() < 0.15 * exact.norm()


def test_other_tensors_of_as_many_entries_start_anew():
    strategy = NHGD(structure="kronecker")
    for shape in ((3, 4), (4, 3)):
        strategy.observe(InnerStep(torch.ones(12), batch_size=1, shapes=[shape]))
        assert strategy.state["steps"] == 1
        assert strategy.state["left0"].shape == (shape[0],) * 2


def test_steps_through_some_of_the_layers():
    """Two heads that take turns: the layers are those of the first step, nothing starts anew."""
    torch.manual_seed(0)
    heads = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)]).double()
    strategy, (x, y) = kronecker(), data(4)
    phi = torch.zeros(7, dtype=torch.float64, requires_grad=True)
    bo = BilevelOptimizer(SGD(heads.parameters(), lr=0.1), SGD([phi], lr=0.1), strategy)
    for step in range(4):
        head = heads[step % 2]
        bo.inner_step(lambda head=head: F.cross_entropy(head(x), y, reduction="none"))
    assert strategy.state["steps"] == 4
    assert strategy.state["blocks"] == [[0, 3, 4, 12], [15, 3, 4, -1], [27, 3, 1, -1]]


def test_the_hypergradient_is_that_of_the_blocks():
    """c - Jᵀ(F + κI + ρI)⁻¹b, all by hand, κ of the penalty."""
    model, strategy = mlp(), kronecker()
    x, y = data(4)
    phi = torch.linspace(-1, 1, 7, dtype=torch.float64, requires_grad=True)
    parameters = list(model.parameters())

    def train() -> PerSample:
        losses = F.cross_entropy(model(x), y, reduction="none")
        return PerSample(losses, phi.exp(), 0.05 * sum(p.square().sum() for p in parameters))

    def whole() -> Tensor:
        losses, weights, penalty = train()
        return (weights * losses).mean() + penalty

    bo = BilevelOptimizer(SGD(parameters, lr=0.0), SGD([phi], lr=0.1), strategy)
    bo.inner_step(train)
    val = F.cross_entropy(model(x[:3]), y[:3])
    (found,) = bo.hypergradient(val)
    rows = run(mlp(), kronecker(), x, y)
    matrix = by_hand(rows, matrices(model, MLP))
    b = oracles.flat(torch.autograd.grad(val, parameters))
    _, J = oracles.jacobians(whole, parameters, [phi])
    shift = 0.1 + 1e-3 * matrix.diagonal().mean()
    x_exact = torch.linalg.solve(matrix + shift * torch.eye(len(b)).double(), b)
    torch.testing.assert_close(found, -J.mT @ x_exact, rtol=1e-8, atol=1e-11)


def test_the_factors_are_wide_and_small():
    """float64 sums of float32 rows; a matrix for each side and nothing of the size of n²."""
    strategy = NHGD(structure="kronecker")
    strategy.observe(InnerStep(torch.randn(6000), batch_size=1, shapes=[(20, 299), (20,)]))
    tensors = [t for t in strategy.state.values() if isinstance(t, Tensor)]
    assert {t.dtype for t in tensors} == {torch.float64}
    assert sum(t.numel() for t in tensors) == 20**2 + 299**2 + 20**2 + 1 + 1
