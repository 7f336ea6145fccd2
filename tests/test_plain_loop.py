"""Law: inner_step is the plain loop bit for bit, on every optimizer and every graph.

And its watching disturbs nobody: not other threads, not after an interrupt.
"""

from __future__ import annotations

import inspect
import signal
import threading
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hyperopt_torch import BilevelOptimizer, Identity, RecycledCG

OPTIM = torch.optim
SETTINGS = [{}, {"foreach": True}, {"foreach": False}, {"fused": True}, {"maximize": True}]
CLASSES = [
    cls
    for cls in vars(OPTIM).values()
    if inspect.isclass(cls) and issubclass(cls, OPTIM.Optimizer) and cls is not OPTIM.Optimizer
]


class Net(nn.Module):
    def __init__(self, wrap=None) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)
        self.drop, self.wrap = nn.Dropout(0.2), wrap or (lambda f, x: f(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.drop(self.wrap(lambda t: self.norm(self.a(t)).tanh(), x)))


class OwnBackward(torch.autograd.Function):
    """Runs a backward pass of its own, as reentrant checkpoints and reversible layers do."""

    @staticmethod
    def forward(ctx, x: Tensor, function) -> Tensor:
        ctx.x, ctx.function = x.detach(), function
        return function(x.detach())

    @staticmethod
    def backward(ctx, grad: Tensor):
        with torch.enable_grad():
            x = ctx.x.requires_grad_()
            ctx.function(x).backward(grad)
        return x.grad, None


WRAPS = {
    "plain": None,
    "reentrant": lambda f, x: checkpoint(f, x, use_reentrant=True),
    "non-reentrant": lambda f, x: checkpoint(f, x, use_reentrant=False),
    "own-backward": lambda f, x: OwnBackward.apply(x, f),
}


def run(bilevel: bool, make, wrap=None, context=None) -> tuple[list[Tensor], Tensor | None]:
    torch.manual_seed(1)
    model, phi = Net(wrap), torch.zeros(8, requires_grad=True)
    x, y = torch.randn(4, 8, 3, requires_grad=True), torch.randn(4, 8)
    phi.grad = own = torch.ones(8)
    optimizer = make(model)
    bo = BilevelOptimizer(optimizer, OPTIM.SGD([phi], lr=0.1), Identity()) if bilevel else None

    def loss(t: int) -> Tensor:
        with context() if context else torch.enable_grad():
            out = model(x[t])[:, 0].float()
        return (phi.exp() * (out - y[t]).square()).mean()

    for t in range(4):
        if bo is not None:
            bo.inner_step(lambda t=t: loss(t))
            continue

        def closure(t: int = t) -> Tensor:
            optimizer.zero_grad()
            value = loss(t)
            value.backward()
            return value

        optimizer.step(closure)
    assert not bilevel or (phi.grad is own and torch.equal(own, torch.ones(8)))
    return [*model.parameters(), *model.buffers()], x.grad


def same(make, wrap=None, context=None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (ours, ours_x), (plain, plain_x) = (run(b, make, wrap, context) for b in (True, False))
    assert all(map(torch.equal, ours, plain))
    assert torch.equal(ours_x, plain_x)  # a leaf that no optimizer holds gets its gradient, too


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_optimizer(cls, settings: dict):
    if not settings.keys() <= inspect.signature(cls).parameters.keys():
        pytest.skip("it has no such setting")

    def make(model: nn.Module):
        kept = [p for p in model.parameters() if cls.__name__ != "Muon" or p.ndim == 2]
        return cls(kept, lr=1e-2, **settings)

    try:
        make(Net())
    except (ValueError, RuntimeError) as error:
        pytest.skip(str(error))
    if cls.__name__ == "SparseAdam":
        pytest.skip("it takes sparse gradients only")
    same(make)


@pytest.mark.parametrize("wrap", WRAPS)
def test_every_graph(wrap: str):
    same(lambda m: OPTIM.Adam(m.parameters(), lr=1e-2), WRAPS[wrap])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype):
    same(
        lambda m: OPTIM.SGD(m.parameters(), lr=1e-2),
        context=lambda: torch.autocast("cpu", dtype=dtype),
    )


@pytest.mark.slow  # builds a transformer
def test_lora_with_gradient_checkpointing():
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")

    def run(bilevel: bool) -> list[Tensor]:
        torch.manual_seed(0)
        config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=32)
        model = transformers.GPT2LMHeadModel(config)
        model.gradient_checkpointing_enable({"use_reentrant": True})
        model.enable_input_require_grads()
        settings = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
        model = peft.get_peft_model(model, settings).train()
        tokens = torch.randint(32, (4, 8), generator=torch.Generator().manual_seed(1))
        weights = torch.zeros(4, requires_grad=True)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = OPTIM.AdamW(trained, lr=1e-2)

        def loss() -> Tensor:
            logits = model(input_ids=tokens).logits[:, :-1]
            losses = nn.functional.cross_entropy(logits.mT, tokens[:, 1:], reduction="none")
            return (weights.exp() * losses.mean(1)).mean()

        bo = BilevelOptimizer(optimizer, OPTIM.SGD([weights], lr=0.1)) if bilevel else None
        for _ in range(2):
            if bo is not None:
                bo.inner_step(loss)
            else:
                optimizer.zero_grad()
                loss().backward()
                optimizer.step()
        return trained

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, plain = run(True), run(False)
    assert len(ours) == 4
    assert all(map(torch.equal, ours, plain))
    assert all(p.grad is not None and p.grad.any() for p in ours)


# --- bystanders ----------------------------------------------------------------------------------


def setting() -> tuple[Net, Tensor, BilevelOptimizer, Tensor]:
    torch.manual_seed(0)
    model, phi, x = Net(), torch.zeros(8, requires_grad=True), torch.randn(8, 3)
    inner, outer = OPTIM.SGD(model.parameters(), lr=1e-3), OPTIM.SGD([phi], lr=1e-3)
    return model, phi, BilevelOptimizer(inner, outer, RecycledCG(), on_trouble="ignore"), x


def test_other_threads_keep_their_updates():
    """A bystander's BatchNorm counts each of its own forward passes."""
    model, phi, bo, x = setting()
    other, stop, count = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), threading.Event(), [0]

    def work() -> None:
        while not stop.is_set():
            other(torch.ones(4, 3))
            count[0] += 1

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(30):
            bo.inner_step(lambda: (phi.exp() * model(x)[:, 0].square()).mean())
            bo.outer_step(model(x).square().mean())
    finally:
        stop.set()
        thread.join()
    assert count[0] > 30
    assert int(other[1].num_batches_tracked) == count[0]


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs a timer signal")
def test_an_interrupt_leaves_everything_as_found():
    """Ctrl-C at any moment of an outer step: the same buffer objects with the same values."""
    model, phi, bo, x = setting()
    caught = 0

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for i in range(60):
            bo.inner_step(lambda: (phi.exp() * model(x)[:, 0].square()).mean())
            val = model(x).square().mean()
            own = [(b, b.clone()) for b in model.buffers()]
            values = [p.detach().clone() for p in model.parameters()]
            streams = torch.get_rng_state()
            try:
                signal.setitimer(signal.ITIMER_REAL, 2e-4 + 1e-4 * i)
                bo.outer_step(val)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                caught += 1
            signal.setitimer(signal.ITIMER_REAL, 0)
            now = list(model.buffers())
            assert all(b is a and torch.equal(a, c) for a, (b, c) in zip(now, own, strict=True))
            assert all(map(torch.equal, model.parameters(), values))
            assert torch.equal(streams, torch.get_rng_state())
            assert model.training
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert caught > 5
    assert not torch.nn.modules.module._global_forward_pre_hooks
    assert not torch.nn.modules.module._global_forward_hooks
    assert torch._dynamo.eval_frame._stance.stance == "default"
