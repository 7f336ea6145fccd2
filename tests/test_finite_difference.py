"""Products from first gradients: how exact, what they run through, and that nothing is touched."""

from __future__ import annotations

import statistics

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD

from hyperopt_torch import (
    CG,
    BilevelOptimizer,
    DenseSolve,
    FiniteDifference,
    Hessian,
    Identity,
    LancBiO,
    Neumann,
    Nystrom,
    RecycledCG,
)


class Attention(nn.Module):
    """A token a feature; fused attention unless exact products ask for another."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.qkv, self.head = nn.Linear(1, 8), nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x):
        q, k, v = (t[:, None] for t in self.qkv(self.lift(x[..., None])).chunk(3, -1))
        return self.head(F.scaled_dot_product_attention(q, k, v)[:, 0].mean(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRU(1, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.cell(x[..., None])[0][:, -1])


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(1, 4, 3, padding=1), nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(F.silu(self.norm(self.conv(x[:, None]))).mean(-1))


def mlp(act: type[nn.Module] = nn.Tanh) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 10), act(), nn.Linear(10, 10), act(), nn.Linear(10, 3))


def dropped() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Dropout(0.3), nn.Linear(12, 3))


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), nn.LayerNorm(12), nn.Softplus(), nn.Linear(12, 3))


SMOOTH = [mlp, dropped, normed, Attention, Recurrent, Convolution]
STRATEGIES = [
    lambda: CG(8, damping=0.5),
    lambda: Nystrom(8, 0.1, generator=torch.Generator().manual_seed(3)),
    lambda: Identity(),
    lambda: Neumann(8, scale=0.2, damping=0.5),
    lambda: LancBiO(5, damping=0.5),
    lambda: RecycledCG(8, damping=0.5),
]


def _counting(calls: list[int]):
    """Out of the closure's sight, whose own variables are put back."""
    return lambda module, args: calls.append(1)


class Loop:
    """Hyper-cleaning with a weight decay to learn as well."""

    def __init__(self, make, ihvp, curvature, dtype=torch.float32, scale=1.0, **settings) -> None:
        torch.manual_seed(0)
        self.net = make().to(dtype)
        self.x, self.xv = torch.randn(2, 24, 6, dtype=dtype)
        self.y, self.yv = torch.randint(3, (2, 24))
        self.phi = torch.zeros(24, dtype=dtype, requires_grad=True)
        self.decay = torch.tensor(-3.0, dtype=dtype, requires_grad=True)
        self.scale = scale
        self.calls: list[int] = []
        self.net.register_forward_pre_hook(_counting(self.calls))
        self.inner = SGD(self.net.parameters(), lr=0.1 / scale, momentum=0.9)
        self.bo = BilevelOptimizer(
            self.inner,
            SGD([self.phi, self.decay], lr=0.1),
            ihvp=ihvp,
            curvature=curvature,
            on_trouble="ignore",
            **settings,
        )

    def train(self):
        losses = F.cross_entropy(self.net(self.x), self.y, reduction="none")
        penalty = self.decay.exp() * sum(p.square().sum() for p in self.net.parameters())
        return self.scale * ((self.phi.sigmoid() * losses).mean() + penalty)

    def val(self):
        return F.cross_entropy(self.net(self.xv), self.yv)

    def hypergradient(self, steps: int = 3):
        torch.manual_seed(1)
        for _ in range(steps):
            self.bo.inner_step(self.train)
        self.bo.accumulate(self.val())  # a query keeps the graph, and compiled ones serve once
        return torch.cat([p.grad.flatten() for p in (self.phi, self.decay)])


def error(found, expected) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-6), (torch.float32, 3e-3)])
def test_as_exact_products_on_smooth_networks(dtype, most):
    errors = []
    for make in SMOOTH:
        for strategy in STRATEGIES:
            found, expected = (
                Loop(make, strategy(), curvature, dtype)
                for curvature in (FiniteDifference(), Hessian())
            )
            gap = error(found.hypergradient(), expected.hypergradient())
            assert gap < most, (make.__name__, found.bo.report.strategy)
            assert float(found.bo.report.kink) < 0.06
            errors.append(gap)
    assert statistics.median(errors) < most / 3


@pytest.mark.parametrize("scale", [1e-5, 1e5])
def test_the_scale_of_the_loss_does_not_matter(scale):
    found, expected = (
        Loop(mlp, RecycledCG(8), FiniteDifference(), scale=s).hypergradient() for s in (scale, 1.0)
    )
    assert error(found, expected) < 3e-3


@pytest.mark.parametrize("factor", [0.0, 10.0])
def test_weights_of_any_size(factor):
    """A layer that starts at zero, as adapters do, and one that is large."""

    def make():
        net = mlp()
        with torch.no_grad():
            net[2].weight.mul_(factor)
        return net

    found, expected = (
        Loop(make, DenseSolve(0.1), c).hypergradient(1) for c in (FiniteDifference(), Hessian())
    )
    assert error(found, expected) < 1e-2  # tanh saturates at ten times the weights


@pytest.mark.parametrize("make", [mlp, dropped, Convolution])
def test_a_run_is_bit_for_bit_the_same(make):
    """Inner steps, buffers and random streams as in a loop without hypergradients."""
    results = []
    for bilevel in (False, True):
        loop = Loop(make, CG(3, damping=0.1), FiniteDifference())
        parameters = list(loop.net.parameters())
        for step in range(4):
            loop.inner.zero_grad()
            loop.bo.record(loop.train).backward(inputs=parameters)
            loop.inner.step()
            kept = [(p.grad, p.grad.clone(), p.data_ptr(), p._version) for p in parameters]
            value = loop.val()
            if bilevel:
                loop.bo.hypergradient(value)
                for p, (grad, values, address, version) in zip(parameters, kept, strict=True):
                    assert p.grad is grad
                    assert torch.equal(grad, values)
                    assert (p.data_ptr(), p._version) == (address, version)
            if step == 2:
                value.backward()  # its graph is alive, and holds the parameters
        results.append([*loop.net.state_dict().values(), torch.rand(3)])
    assert all(map(torch.equal, *results))


def test_two_gradients_a_product_and_one_more():
    loop = Loop(mlp, CG(4, tol=0.0, damping=0.1), FiniteDifference(), self_check=False)
    loop.hypergradient(1)
    assert len(loop.calls) == 2 + 1 + 2 * loop.bo.report.matvecs  # a step, a validation loss


def test_kinks_are_told():
    for make, kinked in ((lambda: mlp(nn.ReLU), True), (mlp, False)):
        loop = Loop(make, DenseSolve(0.05), FiniteDifference())
        loop.hypergradient()
        kinds = [trouble.kind for trouble in loop.bo.report.troubles()]
        assert ("kink" in kinds) is kinked


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].cos()


class OnceDifferentiable(nn.Module):
    def __init__(self, hard: bool) -> None:
        super().__init__()
        self.net, self.hard = mlp(), hard

    def forward(self, x):
        h = self.net[0](x)
        return self.net[2:](Once.apply(h) if self.hard else torch.sin(h))


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.net, self.reentrant = mlp(), reentrant

    def forward(self, x):
        if not self.reentrant:
            return self.net(x)
        x = x.clone().requires_grad_()
        return torch.utils.checkpoint.checkpoint(self.net, x, use_reentrant=True)


class Bag(nn.Module):
    """Its weights have no second derivative in EmbeddingBag; rows picked and summed do."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.table, self.head, self.fused = nn.EmbeddingBag(9, 5, mode="mean"), mlp(), fused
        self.lift = nn.Linear(5, 6)

    def forward(self, x):
        index = (x.abs() * 3).long().clamp(max=8)
        rows = self.table(index) if self.fused else self.table.weight[index].mean(1)
        return self.head(self.lift(rows))


def compiled(wanted: bool) -> nn.Module:
    net = mlp()
    return torch.compile(net, backend="aot_eager") if wanted else net


@pytest.mark.parametrize("make", [OnceDifferentiable, Checkpointed, Bag, compiled])
@pytest.mark.parametrize("strategy", STRATEGIES[:3] + STRATEGIES[5:])
def test_runs_through_what_has_no_second_derivative(make, strategy):
    found = Loop(lambda: make(True), strategy(), FiniteDifference(), torch.float64)
    expected = Loop(lambda: make(False), strategy(), Hessian(), torch.float64)
    assert error(found.hypergradient(), expected.hypergradient()) < 1e-6


def test_a_compiled_module_is_compiled_once():
    torch._dynamo.reset()
    counted = torch._dynamo.testing.CompileCounter()
    loop = Loop(lambda: torch.compile(mlp(), backend=counted), Nystrom(4), FiniteDifference())
    loop.bo.inner_step(loop.train)
    loop.val()
    before = counted.frame_count
    for _ in range(3):
        loop.hypergradient(1)
    assert counted.frame_count == before


def test_micro_batches():
    """The mean of two halves is the whole: the records of one step are one problem."""
    whole = Loop(mlp, CG(5, damping=0.1), FiniteDifference(), torch.float64)
    parts = Loop(mlp, CG(5, damping=0.1), FiniteDifference(), torch.float64)
    for _ in range(2):
        whole.bo.inner_step(whole.train)
        parts.inner.zero_grad()
        for half in (slice(None, 12), slice(12, None)):

            def closure(half=half):
                losses = F.cross_entropy(parts.net(parts.x[half]), parts.y[half], reduction="none")
                penalty = sum(p.square().sum() for p in parts.net.parameters())
                weighted = (parts.phi[half].sigmoid() * losses).mean()
                return weighted + parts.decay.exp() * penalty

            (parts.bo.record(closure) / 2).backward()
        parts.inner.step()
    assert error(parts.hypergradient(0), whole.hypergradient(0)) < 1e-6


def test_autocast():
    def train(loop):
        with torch.autocast("cpu", torch.bfloat16):
            return loop.train()

    loop, exact = (Loop(mlp, Nystrom(8, 0.1), c) for c in (FiniteDifference(), Hessian()))
    for _ in range(2):
        loop.bo.inner_step(lambda: train(loop))
        exact.bo.inner_step(exact.train)
    found = torch.cat([g.flatten() for g in loop.bo.hypergradient(loop.val())])
    expected = torch.cat([g.flatten() for g in exact.bo.hypergradient(exact.val())])
    assert float(F.cosine_similarity(found, expected, dim=0)) > 0.9
    assert loop.bo.report.precision > 1e-3


def test_half_precision_parameters_are_refused():
    loop = Loop(mlp, Nystrom(4), FiniteDifference(), torch.bfloat16)
    loop.bo.inner_step(loop.train)
    with pytest.raises(RuntimeError, match=r"stored in torch.bfloat16.*autocast"):
        loop.bo.outer_step(loop.val())


def test_a_loss_instead_of_a_closure_is_refused():
    loop = Loop(mlp, Nystrom(4), FiniteDifference())
    with pytest.raises(
        RuntimeError, match=r"FiniteDifference evaluates.*give outer_step a closure"
    ):
        loop.bo.outer_step(loop.val(), loop.train())
    loop.bo.outer_step(loop.val(), loop.train)  # a closure on no record is fine


def test_an_error_in_between_puts_everything_back():
    loop = Loop(mlp, CG(4, damping=0.1), FiniteDifference())
    loop.bo.inner_step(loop.train)
    before = [p.detach().clone() for p in loop.net.parameters()]
    grads = [p.grad for p in loop.net.parameters()]
    seen: list[int] = []

    def failing(module, args):
        seen.append(1)
        if len(seen) > 2:
            raise KeyError("in the model")

    value = loop.val()
    handle = loop.net.register_forward_pre_hook(failing)
    with pytest.raises(KeyError, match="in the model"):
        loop.bo.outer_step(value)
    handle.remove()
    assert all(map(torch.equal, before, loop.net.parameters()))
    assert all(p.grad is g for p, g in zip(loop.net.parameters(), grads, strict=True))
    loop.bo.outer_step(loop.val())


def test_invalid_step():
    with pytest.raises(ValueError, match="step"):
        FiniteDifference(step=0.0)


@pytest.mark.parametrize("curvature", [FiniteDifference(), Hessian()], ids=["differences", "exact"])
def test_adapters_of_a_language_model_against_a_dense_solve(curvature):
    """LoRA on a tiny GPT-2, its attention fused but where products are exact."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=6, n_embd=8, n_layer=1, n_head=2, resid_pdrop=0.0
    )
    lora = peft.LoraConfig(r=1, target_modules=["c_attn"], init_lora_weights=False)
    model = peft.get_peft_model(transformers.GPT2LMHeadModel(config), lora).double()
    adapters = [p for p in model.parameters() if p.requires_grad]
    corpora = torch.randint(11, (3, 4, 6))
    phi = torch.zeros(2, dtype=torch.float64, requires_grad=True)

    def loss_of(batch):
        logits = model(input_ids=batch).logits[:, :-1]  # its own loss would be in float32
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def train():
        penalty = sum(p.square().sum() for p in adapters)
        return phi.softmax(0) @ torch.stack([loss_of(c) for c in corpora[:2]]) + 0.1 * penalty

    model.eval()  # without dropout: the oracle below is of another evaluation
    bo = BilevelOptimizer(
        SGD(adapters, lr=0.1), SGD([phi], lr=0.1), ihvp=DenseSolve(), curvature=curvature
    )
    bo.inner_step(train)
    (found,) = bo.hypergradient(loss_of(corpora[2]))

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        grads = torch.autograd.grad(train(), adapters, create_graph=True)
        flat = torch.cat([g.flatten() for g in grads])
        rows = [torch.autograd.grad(g, [*adapters, phi], retain_graph=True) for g in flat]
        b = torch.autograd.grad(loss_of(corpora[2]), adapters)
    H = torch.stack([torch.cat([part.flatten() for part in row[:-1]]) for row in rows])
    J = torch.stack([row[-1] for row in rows])
    expected = -J.mT @ torch.linalg.solve(H, torch.cat([part.flatten() for part in b]))
    assert error(found, expected) < 1e-6
