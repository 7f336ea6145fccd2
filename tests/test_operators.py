"""Operators: batched, looped and dense products are one matrix; cost and memory are bounded."""

import weakref

import pytest
import torch
from oracles import jacobians
from problems import network
from torch import nn

from hyperopt_torch import Hessian
from hyperopt_torch._tensors import FlatLayout, inner_product
from hyperopt_torch.operators import Damped, Dense, InnerGradient, Shifted, Summed


def gradient_of(problem):
    return InnerGradient(problem.train_loss(), problem.inner, problem.outer)


@pytest.mark.parametrize("chunk_size", [None, 1, 2, 100])
def test_products_are_those_of_the_dense_matrix(chunk_size):
    problem = network()
    H, J = jacobians(problem.train_loss, problem.inner, problem.outer)
    operator = Hessian(chunk_size).operator(gradient_of(problem))
    x, X = torch.randn(problem.n).double(), torch.randn(problem.n, 5).double()
    torch.testing.assert_close(operator @ x, H @ x)
    torch.testing.assert_close(operator @ X, H @ X)
    Hx, Jx = operator.joint(x)
    torch.testing.assert_close(Hx, H @ x)
    torch.testing.assert_close(Jx, J.mT @ x)
    torch.testing.assert_close(operator.dense(), H)
    assert operator.matvecs == 1 + 5 + 1 + problem.n


class NoBatching(torch.autograd.Function):
    """x², twice differentiable, without a vmap rule."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        if torch._C._functorch.is_batchedtensor(g):
            raise RuntimeError("no batching rule")
        return 2 * x * g


def test_loops_where_batching_fails():
    w = torch.randn(4, dtype=torch.float64, requires_grad=True)
    loss = NoBatching.apply(NoBatching.apply(w)).sum()  # Σ w⁴
    operator = Hessian(chunk_size=4).operator(InnerGradient(loss, [w], []))
    torch.testing.assert_close(operator.dense(), torch.diag(12 * w.detach() ** 2))


def test_automatic_chunk_follows_graph_and_memory(monkeypatch):
    problem = network()
    operator = Hessian().operator(gradient_of(problem))
    widest = []
    products = operator.gradient.hessian_products
    monkeypatch.setattr(
        operator.gradient, "hessian_products", lambda X: widest.append(len(X)) or products(X)
    )
    monkeypatch.setattr("hyperopt_torch.curvature.hessian._MEMORY", 3 * operator.gradient.bytes)
    operator @ torch.randn(problem.n, 8).double()
    assert widest == [3, 3, 2]

    conv = nn.Conv2d(1, 2, 3)
    gradient = InnerGradient(
        conv(torch.randn(2, 1, 5, 5)).square().mean(), list(conv.parameters()), []
    )
    looped = Hessian().operator(gradient)
    looped @ torch.randn(20, 3)
    assert looped._chunk == 1


def test_damped_counts_on_its_operator():
    base = Dense(torch.eye(3))
    Damped(base, 1.0) @ torch.ones(3, 2)
    assert base.matvecs == 2


@pytest.mark.parametrize(
    "wrap", [lambda A: Damped(A, 1.0), lambda A: Shifted(A, torch.ones(3))], ids=["damped", "shift"]
)
def test_what_wraps_an_operator_asks_it_for_places(wrap):
    """Where indices are, and how to sum, is known to the operator that holds the vectors."""
    asked = []

    class Sharded(Dense):
        def inner(self, x, y):
            return asked.append("inner") or super().inner(x, y)

        def basis(self, index):
            return asked.append("basis") or super().basis(index)

        def take(self, x, index):
            return asked.append("take") or super().take(x, index)

        def place(self, y, index):
            return asked.append("place") or super().place(y, index)

    operator, x = wrap(Sharded(torch.eye(3))), torch.ones(3)
    operator.inner(x, x)
    operator.take(operator.basis([1]), [1])
    operator.place(torch.ones(1), [2])
    assert asked == ["inner", "basis", "take", "place"]


def micro_batches(alive=None):
    """f = Σ w_i f_i on one network, and (w_i, what builds the operator of f_i) for each."""
    problem, weights = network(), [0.5, 1.0, 2.0]
    batches = [torch.randn(4, problem.n).double() for _ in weights]

    def loss(x):
        theta = torch.cat([p.flatten() for p in problem.inner])
        return ((x @ theta).tanh() * problem.outer[0].sum()).square().sum()

    def make(x):
        gradient = InnerGradient(loss(x), problem.inner, problem.outer)
        if alive is not None:
            assert not any(graph() is not None for graph in alive), "two graphs at a time"
            alive.append(weakref.ref(gradient))
        return Hessian().operator(gradient)

    def total():
        return sum(w * loss(x) for w, x in zip(weights, batches, strict=True))

    makes = [(w, lambda x=x: make(x)) for w, x in zip(weights, batches, strict=True)]
    return problem, total, makes


def test_a_sum_is_the_operator_of_the_sum():
    problem, total, makes = micro_batches()
    H, J = jacobians(total, problem.inner, problem.outer)
    operator = Summed(makes)
    x, X = torch.randn(problem.n).double(), torch.randn(problem.n, 3).double()
    torch.testing.assert_close(operator @ x, H @ x)
    torch.testing.assert_close(operator @ X, H @ X)
    Hx, Jx = operator.joint(x)
    torch.testing.assert_close(Hx, H @ x)
    torch.testing.assert_close(Jx, J.mT @ x)
    assert operator.matvecs == 1 + 3 + 1  # all terms of a product together


def test_a_sum_holds_one_graph_at_a_time():
    """Each term is built once a product, in order, and gone before the next one."""
    alive = []
    problem, _, makes = micro_batches(alive)
    operator = Summed(makes)
    x = torch.randn(problem.n).double()
    for i, product in enumerate([operator.joint, operator.__matmul__], start=1):
        product(x)
        assert len(alive) == i * len(makes)
    operator @ torch.stack([x, x], 1)
    assert len(alive) == 3 * len(makes)
    assert not any(graph() is not None for graph in alive)


def test_flat_vectors_of_sparse_gradients_are_dense():
    tensors = [torch.zeros(4), torch.zeros(2, 3)]
    sparse = torch.sparse_coo_tensor(  # an index that occurs twice
        [[1, 1]], [2.0, 3.0], (4,), check_invariants=True
    )
    expected = torch.tensor([0.0, 5.0, 0.0, 0.0])
    flat = FlatLayout(tensors).flatten([sparse, torch.eye(2, 3).to_sparse()])
    assert torch.equal(flat, torch.cat([expected, torch.eye(2, 3).flatten()]))
    assert torch.equal(FlatLayout(tensors[:1]).flatten([sparse]), expected)
    assert FlatLayout([t.double() for t in tensors]).flatten([sparse, None]).dtype == torch.float64


@pytest.mark.parametrize("n", [0, 1, 1 << 16, (1 << 16) + 1, 200_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_inner_products_in_blocks(n, dtype):
    x, y = torch.randn(n, dtype=dtype), torch.randn(n, dtype=dtype)
    for a, b in ((x, y), (x, x), (1e-30 * x, y)):
        found = inner_product(a, b)
        assert found.dtype == torch.float64
        expected = (a.double() * b.double()).sum()
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12 * n**0.5)


def test_inner_is_summed_in_float64():
    operator = Dense(torch.eye(1))
    x = torch.full((3_000_000,), 0.1)
    exact = 3_000_000 * float(torch.tensor(0.1)) ** 2
    assert abs(float(operator.inner(x, x)) - exact) < 1e-7 * exact  # each product is rounded
    X = torch.randn(1_500_000, 3)
    torch.testing.assert_close(
        operator.inner(X, X), X.double().mT @ X.double(), rtol=1e-12, atol=1e-6
    )
    torch.testing.assert_close(operator.inner(X, X[:, 0]), X.double().mT @ X[:, 0].double())
