"""Law: dtype, memory format, device and loss scaling change the rounding, never the meaning.

The dense float64 oracle is what every mixture is held against; and what runs on the meta device
cannot have looked at a value.
"""

from __future__ import annotations

from contextlib import nullcontext

import oracles
import pytest
import torch
import torch.nn.functional as F
from cases import STRATEGIES, Case
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.utils._python_dispatch import TorchDispatchMode

from hyperopt_torch import BilevelOptimizer, ConjugateGradient, DenseSolve, Identity, Nystrom
from hyperopt_torch.ihvp import conjugate_gradient

SYNC_FREE = [case for case in STRATEGIES if case.sync_free]
RHO = 0.5


class Rig:
    """Weighted samples and a weight decay over any model; n is small enough for the oracle."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, outer_dtype=torch.float64) -> None:
        self.model, self.x, self.y = model, x, y
        self.context = nullcontext
        like = {"dtype": outer_dtype, "device": x.device, "requires_grad": True}
        self.weights = torch.linspace(-0.5, 0.5, len(x), **like)
        self.decay = torch.tensor(0.5, **like)  # enough to make H positive definite

    def bo(self, ihvp, inner=lambda p: SGD(p, lr=0.1), **kwargs) -> BilevelOptimizer:
        return BilevelOptimizer(
            inner(self.model.parameters()), SGD([self.weights, self.decay], lr=0.1), ihvp, **kwargs
        )

    def losses(self) -> Tensor:
        outputs = self.model(self.x)
        return F.cross_entropy(outputs.to(self.weights.dtype), self.y, reduction="none")

    def train(self) -> Tensor:
        with self.context():
            wide = [p.to(self.weights.dtype) for p in self.model.parameters()]
            penalty = sum(p.square().sum() for p in wide) / 2
            return (self.weights.exp() * self.losses()).mean() + self.decay.exp() * penalty

    def val(self) -> Tensor:
        with self.context():
            return self.losses()[:3].mean() + 0.1 * self.weights.square().sum()

    def hypergradient(self, ihvp) -> Tensor:
        bo = self.bo(ihvp)
        if ihvp.observes:  # has nothing to say before it has seen a step
            bo.inner_step(self.train)
        return oracles.flat(bo.hypergradient(self.val(), self.train)).double()

    def oracle(self) -> Tensor:
        inner = list(dict.fromkeys(p for p in self.model.parameters() if p.requires_grad))
        outer = [self.weights, self.decay]
        assert torch.linalg.eigvalsh(oracles.jacobians(self.train, inner, outer)[0])[0] > 0
        return oracles.hypergradient(self.train, self.val, inner, outer, RHO)


def data(n: int = 6, dtype=torch.float64, device="cpu") -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(4)
    x, y = torch.randn(n, 3, generator=g, dtype=dtype), torch.randint(2, (n,), generator=g)
    return x.to(device), y.to(device)


def mlp(*dtypes: torch.dtype, device="cpu") -> nn.Module:
    """Three layers; each works in its own dtype, inputs are cast on the way in."""
    dtypes = dtypes or (torch.float64,)

    class Cast(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.to(self.weight.dtype))

    torch.manual_seed(2)
    sizes = [(3, 4), (4, 3), (3, 2)]
    layers = [Cast(a, b).to(device, dtypes[i % len(dtypes)]) for i, (a, b) in enumerate(sizes)]
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


def cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a.double(), b.double(), dim=0))


EXACT = {
    "dense": lambda n: DenseSolve(RHO),
    "cg": lambda n: ConjugateGradient(3 * n, tol=1e-12, damping=RHO),
    "nystrom": lambda n: Nystrom(n, RHO),
    "nystrom-chunked": lambda n: Nystrom(n, RHO, chunk_size=7),
}
N = 16 + 15 + 8  # entries of mlp()


# --- dtypes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("exact", EXACT)
@pytest.mark.parametrize(
    "dtypes", [(torch.float64, torch.float32), (torch.float32,), (torch.float64,)], ids=str
)
def test_mixed_dtypes_against_the_dense_oracle(dtypes, exact: str):
    """The flat algebra is done in the widest dtype; float32 layers round their own products."""
    rig = Rig(mlp(*dtypes), *data())
    tolerance = 1e-4 if torch.float32 in dtypes else 1e-8
    expected = rig64(rig).oracle()
    found = rig.hypergradient(EXACT[exact](N))
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def rig64(rig: Rig) -> Rig:
    """The same point, all in float64."""
    twin = Rig(mlp(torch.float64), rig.x.double(), rig.y)
    with torch.no_grad():
        for p, q in zip(twin.model.parameters(), rig.model.parameters(), strict=True):
            p.copy_(q)
    return twin


@pytest.mark.parametrize("exact", EXACT)
def test_bfloat16_and_float32_layers(exact: str):
    """Each product is rounded to three digits, so the direction stands, not the digits."""
    rig = Rig(mlp(torch.bfloat16, torch.float32), *data(dtype=torch.float32), torch.float32)
    expected = rig64(rig).oracle()
    found = rig.hypergradient(EXACT[exact](N))
    assert cosine(found, expected) > 0.99
    assert 0.9 < float(found.norm() / expected.norm()) < 1.1


def test_a_solver_does_not_work_in_bfloat16():
    """Where all layers are bfloat16, vectors are float32 all the same."""
    rig = Rig(mlp(torch.bfloat16), *data(dtype=torch.float32), torch.float32)
    bo = rig.bo(ConjugateGradient(5, damping=RHO, warm_start=True))
    bo.inner_step(rig.train)
    bo.outer_step(rig.val())
    assert bo.estimator.ihvp.state["x"].dtype == torch.float32


def test_gradients_have_the_dtype_of_their_parameters():
    model = mlp(torch.bfloat16, torch.float32)
    rig = Rig(model, *data(dtype=torch.float32), torch.float32)
    mixed = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    bo = BilevelOptimizer(SGD(model.parameters(), lr=0.1), SGD([rig.weights, mixed], lr=0.1))
    train = lambda: rig.train() + mixed.sum() * model[0].weight.float().square().sum()  # noqa: E731
    bo.inner_step(train)
    found = bo.hypergradient(rig.val())
    assert [g.dtype for g in found] == [torch.float32, torch.float64]
    bo.outer_step(rig.val())
    assert mixed.grad.norm() > 0


@pytest.mark.parametrize("case", STRATEGIES, ids=str)
def test_autocast(case: Case):
    """bfloat16 products in closure and validation loss: close to float32, for every strategy."""
    found = {}
    for context in (nullcontext, lambda: torch.autocast("cpu", torch.bfloat16)):
        torch.manual_seed(0)
        rig = Rig(mlp(torch.float32), *data(24, torch.float32), torch.float32)
        rig.context = context
        found[context] = rig.hypergradient(case.make())
    plain, cast = found.values()
    assert not torch.equal(plain, cast)
    assert cosine(plain, cast) > 0.98


def test_outer_step_inside_an_autocast_region():
    """The region's cache of cast weights belongs to val's graph, which is freed on the way."""
    rig = Rig(mlp(torch.float32), *data(24, torch.float32), torch.float32)
    plain = rig.hypergradient(Identity())
    with torch.autocast("cpu", torch.bfloat16):
        bo = rig.bo(Identity())
        bo.outer_step(rig.val(), rig.train)
    found = torch.cat([rig.weights.grad, rig.decay.grad[None]])
    assert found.dtype == torch.float32
    assert cosine(found, plain) > 0.98


# --- loss scaling -------------------------------------------------------------------------------


def scaled(init_scale: float, inner, steps: int = 6):
    """(rig, its companion, the scaler) after some inner steps with an outer step in between."""
    rig = Rig(mlp(torch.float32), *data(dtype=torch.float32), torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale) if init_scale else None
    bo = rig.bo(ConjugateGradient(3, damping=RHO), inner, grad_scaler=scaler)
    for step in range(steps):
        bo.inner_step(rig.train)
        if step == 2:
            bo.outer_step(rig.val())
    return rig, bo, scaler


@pytest.mark.parametrize(
    "inner",
    [lambda p: SGD(p, lr=0.1, momentum=0.9), lambda p: Adam(p, lr=0.01)],
    ids=["sgd", "adam"],
)
def test_grad_scaler_changes_nothing(inner):
    """A power of two is exact in floating point: inner steps and hypergradients, bit by bit."""
    plain, plain_bo, _ = scaled(0, inner)
    rig, bo, scaler = scaled(2.0**12, inner)
    for p, q in zip(plain.model.parameters(), rig.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert torch.equal(plain.weights.grad, rig.weights.grad)
    pair = plain_bo.hypergradient(plain.val()), bo.hypergradient(rig.val())
    assert all(map(torch.equal, *pair))
    assert scaler.get_scale() == 2.0**12


def test_grad_scaler_as_in_the_plain_loop():
    """With the update of the scale, which grows every two steps here."""

    def make(steps: int) -> tuple[Rig, torch.amp.GradScaler]:
        rig = Rig(mlp(torch.float32), *data(dtype=torch.float32), torch.float32)
        return rig, torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=steps)

    (plain, scaler), (rig, ours) = make(2), make(2)
    optimizer = Adam(plain.model.parameters(), lr=0.01)
    bo = rig.bo(Identity(), lambda p: Adam(p, lr=0.01), grad_scaler=ours)
    for _ in range(5):
        optimizer.zero_grad()
        scaler.scale(plain.train()).backward()
        scaler.step(optimizer)
        scaler.update()
        loss = bo.inner_step(rig.train)
    for p, q in zip(plain.model.parameters(), rig.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert ours.state_dict() == scaler.state_dict()
    assert ours.get_scale() == 16.0
    assert float(loss) < 5  # what is returned is not scaled


def test_grad_scaler_skips_a_step_of_infinite_gradients():
    rig = Rig(mlp(torch.float32), *data(dtype=torch.float32), torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    bo = rig.bo(Identity(), lambda p: SGD(p, lr=0.1, momentum=0.9), grad_scaler=scaler)
    bo.inner_step(rig.train)
    before = [p.detach().clone() for p in rig.model.parameters()]
    momentum = [bo.inner.state[p]["momentum_buffer"].clone() for p in rig.model.parameters()]
    bo.inner_step(lambda: rig.train() * float("inf"))
    assert all(map(torch.equal, before, rig.model.parameters()))
    now = [bo.inner.state[p]["momentum_buffer"] for p in rig.model.parameters()]
    assert all(map(torch.equal, momentum, now))
    assert scaler.get_scale() == 2.0**3
    bo.inner_step(rig.train)  # and the loop goes on
    assert not torch.equal(before[0], rig.model[0].weight)
    bo.outer_step(rig.val())
    assert rig.weights.grad.isfinite().all()


def test_an_observing_strategy_sees_unscaled_gradients():
    class Watching(Identity):
        seen = None

        def observe(self, step) -> None:
            self.seen = step.gradient.clone()

    runs = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**12)):
        rig = Rig(mlp(torch.float32), *data(dtype=torch.float32), torch.float32)
        strategy = Watching()
        bo = rig.bo(strategy, lambda p: SGD(p, lr=0.1, momentum=0.9), grad_scaler=scaler)
        for _ in range(3):
            bo.inner_step(rig.train)
        expected = oracles.flat([p.grad for p in rig.model.parameters()])
        assert torch.equal(strategy.seen, expected)
        runs.append([strategy.seen, *rig.model.parameters()])
    assert all(map(torch.equal, *runs))


# --- memory formats, and parameters that are special --------------------------------------------


def check(rig: Rig, n: int, tolerance: float = 1e-8) -> None:
    expected = rig.oracle()
    for name, make in EXACT.items():
        found = rig.hypergradient(make(n))
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, msg=name)
    bo = rig.bo(DenseSolve(RHO))
    bo.inner_step(rig.train)
    bo.outer_step(rig.val())


def test_channels_last():
    torch.manual_seed(2)
    net = nn.Sequential(
        nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Conv2d(3, 2, 2), nn.Flatten(), nn.Linear(2, 2)
    )
    net = net.double().to(memory_format=torch.channels_last)
    assert not net[0].weight.is_contiguous()
    x = torch.randn(6, 2, 3, 3, dtype=torch.float64).to(memory_format=torch.channels_last)
    check(Rig(net, x, torch.randint(2, (6,))), sum(p.numel() for p in net.parameters()))
    assert net[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_transposed_parameter():
    net = mlp()
    net[0].weight = nn.Parameter(net[0].weight.detach().mT.contiguous().mT)
    assert not net[0].weight.is_contiguous()
    check(Rig(net, *data()), N)


def test_frozen_parameters():
    net = mlp()
    net[2].requires_grad_(False)
    check(Rig(net, *data()), N - 15)


class Unused(nn.Module):
    """A parameter in no graph, and one that only the decay reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()
        self.spare = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def test_parameters_that_the_outputs_do_not_use():
    check(Rig(Unused(), *data()), N + 2)


def test_parameters_in_no_graph():
    """Their rows of H are zero; x there is b/ρ = 0, and they get no gradient."""
    rig = Rig(mlp(), *data())
    spare = torch.ones(2, dtype=torch.float64, requires_grad=True)
    expected = rig.oracle()
    for make in EXACT.values():
        bo = rig.bo(make(N + 2))
        bo.inner.add_param_group({"params": [spare]})
        found = oracles.flat(bo.hypergradient(rig.val(), rig.train))
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
        bo.inner_step(rig.train)
        assert spare.grad is None
        expected = rig.oracle()


def test_unused_outer_parameter():
    """None for what has no influence, as autograd has it; the others are not shifted."""
    rig = Rig(mlp(), *data())
    spare = torch.ones(3, dtype=torch.float64, requires_grad=True)
    frozen = torch.ones(2, dtype=torch.float64)
    outer = SGD([spare, rig.weights, frozen, rig.decay], lr=0.1)
    bo = BilevelOptimizer(SGD(rig.model.parameters(), lr=0.1), outer, DenseSolve(RHO))
    found = bo.hypergradient(rig.val(), rig.train)
    assert found[0] is None
    assert found[2] is None
    torch.testing.assert_close(oracles.flat(found), rig.oracle())
    bo.outer_step(rig.val(), rig.train)
    assert spare.grad is None
    assert torch.equal(spare, torch.ones_like(spare))


def test_tied_parameters():
    torch.manual_seed(2)
    first, second = nn.Linear(3, 3).double(), nn.Linear(3, 3).double()
    second.weight = first.weight
    net = nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), nn.Linear(3, 2).double())
    check(Rig(net, *data()), 9 + 3 + 3 + 8)


@pytest.mark.filterwarnings("ignore:.*duplicate parameters:UserWarning")
def test_a_parameter_that_is_given_twice():
    """It counts once: twice would double its part of the hypergradient."""
    rig = Rig(mlp(), *data())
    inner = SGD([*rig.model.parameters(), rig.model[0].weight], lr=0.1)
    for make in EXACT.values():
        bo = BilevelOptimizer(inner, SGD([rig.weights, rig.decay], lr=0.1), make(N))
        found = oracles.flat(bo.hypergradient(rig.val(), rig.train))
        torch.testing.assert_close(found, rig.oracle(), rtol=1e-8, atol=1e-8)


def test_parameters_of_no_dimension_and_of_no_entry():
    class Scaled(Unused):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
            self.empty = nn.Parameter(torch.zeros(0, 3, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * self.net(x) + self.empty.sum()

    check(Rig(Scaled(), *data()), N + 3)


# --- losses that are linear in parameters: H = 0 there --------------------------------------------


@pytest.mark.parametrize("exact", EXACT)
@pytest.mark.parametrize("linear", ["some", "all", "all, outer in no gradient"])
def test_linear_inner_loss(linear: str, exact: str):
    """H is zero in part or in whole, so x = b/ρ there; J need not be."""
    u = torch.tensor([0.5, -1.0], dtype=torch.float64, requires_grad=True)
    v = torch.tensor([[1.0], [2.0]], dtype=torch.float64, requires_grad=True)
    phi = torch.tensor([0.3, 0.7], dtype=torch.float64, requires_grad=True)

    def train() -> Tensor:
        if linear == "some":
            return phi @ u + (v.square().sum() + v.prod()) * phi.sum()
        if linear == "all":
            return phi @ u + v.sum() * phi.prod()
        return u.sum() + v.sum() + phi.square().sum()

    def val() -> Tensor:
        return (u - 1).square().sum() + (v[:, 0] * u).sum() + phi.prod()

    bo = BilevelOptimizer(SGD([u, v], lr=0.1), SGD([phi], lr=0.1), EXACT[exact](4))
    bo.inner_step(train)
    expected = oracles.hypergradient(train, val, [u, v], [phi], RHO)
    warns = linear == "all, outer in no gradient"
    with pytest.warns(UserWarning, match="direct term") if warns else nullcontext():
        (found,) = bo.hypergradient(val())
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", STRATEGIES, ids=str)
def test_linear_inner_loss_for_every_strategy(case: Case):
    """A zero Hessian is no crash, and no NaN; the sign of c - Jᵀb/ρ stands."""
    w = torch.ones(12, requires_grad=True)
    phi = torch.ones((), requires_grad=True)
    bo = BilevelOptimizer(SGD([w], lr=0.1), SGD([phi], lr=0.1), case.make())
    bo.inner_step(lambda: phi * w.sum())
    (found,) = bo.hypergradient(w.square().sum())
    if case.name != "nystrom-woodbury":  # M = 0 is singular there, as documented
        assert found.isfinite()
        assert found < 0


# --- no value is looked at ----------------------------------------------------------------------


@pytest.mark.parametrize("case", SYNC_FREE, ids=str)
def test_meta_device(case: Case):
    """Shapes only: whatever runs here depends on no value, from the closure to outer.step()."""
    rig = Rig(
        mlp(torch.float32, device="meta"),
        *data(dtype=torch.float32, device="meta"),
        outer_dtype=torch.float32,
    )
    bo = rig.bo(case.make(), lambda p: SGD(p, lr=0.1, momentum=0.9))
    bo.inner_step(rig.train)
    found = bo.hypergradient(rig.val())
    assert [g.shape for g in found] == [rig.weights.shape, ()]
    assert {g.device.type for g in found} == {"meta"}
    for _ in range(2):
        bo.inner_step(rig.train)
        bo.outer_step(rig.val())
    assert bo.report.solution_norm.device.type == "meta"


class Synced(Exception):
    pass


class NoSync(TorchDispatchMode):
    """Raises at every operation that brings a value, or a shape made from values, to the host."""

    SYNCING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__.lstrip("_") in [s.lstrip("_") for s in self.SYNCING]:
            raise Synced(func)
        return func(*args, **kwargs or {})


def forbid_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python side of the same: also what is no operation, such as tolist and cpu.

    Tensors on the CPU are at hand, and a strategy may read them; here they stand for a device's.
    """
    monkeypatch.setattr(conjugate_gradient, "is_at_hand", lambda tensor: False)

    def refuse(*args, **kwargs):
        raise Synced

    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, refuse, raising=False)


@pytest.mark.parametrize("case", SYNC_FREE, ids=str)
def test_no_sync(case: Case, monkeypatch):
    rig = Rig(mlp(torch.float32), *data(dtype=torch.float32), torch.float32)
    # outer_step reads once whether all is finite, as GradScaler does; the first one checks itself.
    bo = rig.bo(case.make(), on_trouble="ignore", self_check=False)
    bo.inner_step(rig.train)
    with monkeypatch.context() as patch, NoSync():
        forbid_reading(patch)
        for _ in range(2):  # the second time with a memory
            bo.inner_step(rig.train)
            bo.accumulate(rig.val())
            bo.hypergradient(rig.val())
            report = bo.report
    assert report.trouble() is not None  # reading is what syncs
    assert rig.weights.grad.norm() > 0


@pytest.mark.parametrize(
    "read",
    [lambda t: t.item(), bool, float, int, lambda t: t.tolist(), lambda t: t.cpu(), torch.nonzero],
)
def test_a_sync_would_be_noticed(read, monkeypatch):
    t = torch.ones(())
    with monkeypatch.context() as patch, NoSync(), pytest.raises(Synced):  # noqa: PT012
        forbid_reading(patch)
        read(t)


@pytest.mark.parametrize("case", [c for c in STRATEGIES if not c.sync_free], ids=str)
def test_what_is_marked_as_syncing_does(case: Case, monkeypatch):
    rig = Rig(mlp(torch.float32), *data(dtype=torch.float32), torch.float32)
    bo = rig.bo(case.make())
    with monkeypatch.context() as patch, NoSync(), pytest.raises(Synced):  # noqa: PT012
        forbid_reading(patch)
        for _ in range(2):
            bo.outer_step(rig.val(), rig.train)
