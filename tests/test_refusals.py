"""Law: where torch has no second derivative there is an error that says what to do, never a zero.

And no false alarm: what torch can differentiate as often as it is needed is not refused.
"""

from __future__ import annotations

import re

import oracles
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from hyperopt_torch import GaussNewton, Hessian
from hyperopt_torch._graph import (
    check_differentiable,
    graph_nodes,
    short_way_is_safe,
    without_parameter_hooks,
)
from hyperopt_torch.operators import InnerGradient

TOKENS = torch.tensor([[0, 2, 2], [5, 1, 0]])


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(3)))


class Case:
    """A loss f(θ, φ) = Σ exp(φ) tanh(o(θ))² whose outputs o went through one operation."""

    def __init__(self, inner, outputs) -> None:
        self.inner, self.outputs = list(inner), outputs
        self.phi = nn.Parameter(torch.tensor(0.3))

    def loss(self):
        return self.phi.exp() * self.outputs().tanh().square().sum()

    def gradient(self, outputs=None) -> InnerGradient:
        return InnerGradient(self.loss(), self.inner, [self.phi], outputs)


CASES = {}  # refused
ALLOWED = {}  # not refused: the right number


def case(make):
    CASES[make.__name__] = make
    return make


def allowed(make):
    ALLOWED[make.__name__] = make
    return make


def case_of_older_releases(make):
    """Refused where torch itself refuses, held to the right number in releases that learned it."""
    problem, _ = make()
    (g,) = torch.autograd.grad(problem.loss(), problem.inner, create_graph=True)
    try:
        torch.autograd.grad(g.sum(), problem.inner)
    except RuntimeError:  # and NotImplementedError, which is one
        return case(make)
    ALLOWED[make.__name__] = lambda: make()[0]
    return make


def of(module: nn.Module, *inputs) -> Case:
    return Case(module.parameters(), lambda: module(*inputs))


# --- refused ------------------------------------------------------------------------------------


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


@case
def once_differentiable_function():
    p = parameter(3)
    return Case([p], lambda: Once.apply(p.sin())), "Once (marked @once_differentiable)"


@case
def once_differentiable_function_under_a_constant_gradient():
    """Torch itself leaves no trace in this case: its second derivative is a silent zero."""
    p = parameter(3)
    linear = Case([p], lambda: None)
    linear.loss = lambda: Once.apply(p.sin()).sum() + linear.phi * p.sum()
    return linear, "Once (marked @once_differentiable)"


@case
def dirichlet():
    p = parameter(4)
    sample = lambda: torch.distributions.Dirichlet(p.exp()).rsample()  # noqa: E731
    return Case([p], sample), "_Dirichlet (marked @once_differentiable)"


@case
def embedding_bag():
    return of(nn.EmbeddingBag(7, 2), TOKENS), "nn.Embedding and a sum, mean or max"


@case
def embedding_bag_max():
    return of(nn.EmbeddingBag(7, 2, mode="max"), TOKENS), "nn.EmbeddingBag"


@case
def embedding_bag_sparse():
    return of(nn.EmbeddingBag(7, 2, sparse=True), TOKENS), "nn.EmbeddingBag"


@case
def embedding_bag_weights():
    bag, weights = nn.EmbeddingBag(7, 2, mode="sum"), parameter(2, 3)
    outputs = lambda: bag(TOKENS, per_sample_weights=weights)  # noqa: E731
    return Case([*bag.parameters(), weights], outputs), "nn.EmbeddingBag"


@case
def hardsigmoid():
    p = parameter(5)
    return Case([p], lambda: F.hardsigmoid(p.sin())), "relu6(x + 3) / 6"


@case
def ctc_loss():
    layer, x = nn.Linear(3, 4), torch.randn(6, 5, 3)
    target = torch.randint(1, 4, (5, 2))

    def outputs():
        return F.ctc_loss(layer(x).log_softmax(-1), target, [6] * 5, [2] * 5)

    return Case(layer.parameters(), outputs), "ctc_loss"


@case_of_older_releases
def cdist():
    p, x = parameter(2, 3), torch.randn(4, 3)
    return Case([p], lambda: torch.cdist(x, p)), 'compute_mode="use_mm_for_euclid_dist"'


@case_of_older_releases
def pdist():
    p = parameter(3, 2)
    return Case([p], lambda: F.pdist(p)), "torch.pdist"


@case
def multi_margin_loss():
    p = parameter(3, 4)
    outputs = lambda: F.multi_margin_loss(p.sin(), torch.tensor([0, 1, 2]))  # noqa: E731
    return Case([p], outputs), "multi_margin_loss"


@case
def segment_reduce():
    p, lengths = parameter(6, 2), torch.tensor([2, 4])
    outputs = lambda: torch.segment_reduce(p.sin(), "max", lengths=lengths)  # noqa: E731
    return Case([p], outputs), "segment_reduce"


@case
def gamma_sample():
    p = parameter(3)
    sample = lambda: torch.distributions.Gamma(p.exp(), torch.ones(3)).rsample()  # noqa: E731
    return Case([p], sample), "standard_gamma_grad"


@case
def fused_attention():
    layer, x = nn.Linear(4, 4), torch.randn(1, 2, 5, 4)
    attend = lambda q: F.scaled_dot_product_attention(q, q, q)  # noqa: E731
    outputs = lambda: attend(layer(x))  # noqa: E731
    return Case(layer.parameters(), outputs), "sdpa_kernel(torch.nn.attention.SDPBackend.MATH)"


@case
def transformer_layer():
    layer = nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True)
    return of(layer, torch.randn(2, 5, 4)), "fused attention"


@case
def compiled_module():
    layer, x = nn.Linear(3, 2), torch.randn(4, 3)
    compiled = torch.compile(layer, backend="aot_eager")
    return Case(layer.parameters(), lambda: compiled(x)), "`model._orig_mod`"


# With a schema: older releases cannot read one from annotations that are strings.
@torch.library.custom_op(
    "hyperopt_torch_tests::cube", mutates_args=(), schema="(Tensor x) -> Tensor"
)
def cube(x: torch.Tensor) -> torch.Tensor:
    return x**3


@torch.library.custom_op(
    "hyperopt_torch_tests::cube_backward", mutates_args=(), schema="(Tensor x, Tensor g) -> Tensor"
)
def cube_backward(x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    return 3 * x**2 * g


cube.register_autograd(
    lambda ctx, g: cube_backward(ctx.saved_tensors[0], g),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
)


@case
def custom_operation():
    p = parameter(3)
    return Case([p], lambda: cube(p.sin())), "hyperopt_torch_tests.cube_backward"


@case
def custom_operation_that_only_warns():
    """Torch makes zeros of it, with a warning at best."""
    p = parameter(3)
    return Case([p], lambda: Opaque.apply(p.sin())), "torch.library.register_autograd"


_library = torch.library.Library("hyperopt_torch_opaque", "DEF")
_library.define("square(Tensor x) -> Tensor")
_library.impl("square", lambda x: torch.tensor([v * v for v in x.tolist()]), "CPU")


class Opaque(torch.autograd.Function):
    """x³ / 3, its derivative by an operation that autograd does not know."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3 / 3

    @staticmethod
    def backward(ctx, g):
        return torch.ops.hyperopt_torch_opaque.square(ctx.saved_tensors[0]) * g


def checkpointed(on: bool = True) -> Case:
    first, second = nn.Linear(3, 4), nn.Linear(4, 1)
    x = torch.randn(5, 3).requires_grad_()
    run = (lambda f, t: checkpoint(f, t, use_reentrant=True)) if on else (lambda f, t: f(t))
    outputs = lambda: second(run(lambda t: first(t).tanh(), x))  # noqa: E731
    return Case([*first.parameters(), *second.parameters()], outputs)


@case
def reentrant_checkpoint():
    return checkpointed(), "use_reentrant=False"


class OwnBackward(torch.autograd.Function):
    """A checkpoint under another name, as other libraries have them."""

    @staticmethod
    def forward(ctx, run, x):
        ctx.run = run
        ctx.save_for_backward(x)
        with torch.no_grad():
            return run(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = ctx.run(x)
        torch.autograd.backward(y, g)
        return None, x.grad


@case
def checkpoint_under_another_name():
    layer, x = nn.Linear(3, 4), torch.randn(5, 3).requires_grad_()
    outputs = lambda: OwnBackward.apply(layer, x)  # noqa: E731
    return Case(layer.parameters(), outputs), "OwnBackward, a torch.autograd.Function that runs"


def products(gradient: InnerGradient):
    x = torch.ones(gradient.layout.n)
    return {
        "Hx": lambda: Hessian().operator(gradient) @ x,
        "joint": lambda: Hessian().operator(gradient).joint(x),
        "batched": lambda: Hessian(2).operator(gradient) @ torch.ones(gradient.layout.n, 2),
        "looped": lambda: Hessian(1).operator(gradient) @ torch.ones(gradient.layout.n, 2),
    }


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("product", ["Hx", "joint", "batched", "looped"])
@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
def test_refused(make, product):
    problem, advice = make()
    with pytest.raises(RuntimeError, match=r"^The training loss went through ") as caught:
        products(problem.gradient())[product]()
    message = str(caught.value)
    assert advice in message
    assert "outer_step(val_loss, train_loss=eager_closure)" in message
    assert ("PZOBO()" in message) == ("hides its parameters" not in message)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("make", [hardsigmoid, embedding_bag, once_differentiable_function])
def test_refused_by_gauss_newton(make):
    problem, advice = make()
    o = problem.outputs()
    problem.outputs = lambda: o
    with pytest.raises(RuntimeError, match=re.escape(advice)):
        GaussNewton().operator(problem.gradient(o)) @ torch.ones(problem.gradient(o).layout.n)


@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
def test_the_remedy_names_something_that_exists(make):
    """`a.b.c` in a message is found under that name."""
    for name in re.findall(r"(?<![\w.])torch(?:\.\w+)+(?=[ ,(])", make()[1]):
        found = torch
        for part in name.split(".")[1:]:
            found = getattr(found, part)


# --- not refused: the right number --------------------------------------------------------------


@allowed
def relu6_for_hardsigmoid():
    p = parameter(5)
    return Case([p], lambda: F.relu6(p.sin() + 3) / 6)


@allowed
def cdist_by_matrix_products():
    p, x = parameter(2, 3), torch.randn(4, 3)
    return Case([p], lambda: torch.cdist(x, p, compute_mode="use_mm_for_euclid_dist"))


@allowed
def lstm():  # on mkldnn in float32
    rnn, x = nn.LSTM(3, 4, batch_first=True), torch.randn(2, 5, 3)
    return Case(rnn.parameters(), lambda: rnn(x)[0])


@allowed
def gru():
    rnn, x = nn.GRU(3, 4, batch_first=True), torch.randn(2, 5, 3)
    return Case(rnn.parameters(), lambda: rnn(x)[0])


@case_of_older_releases
def grid_sample():
    p, grid = parameter(1, 1, 4, 4), torch.rand(1, 2, 2, 2)
    return Case([p], lambda: F.grid_sample(p, grid, align_corners=False)), "grid_sampler_2d"


@allowed
def max_pool():
    p = parameter(1, 1, 4, 4)
    return Case([p], lambda: F.max_pool2d(p, 2))


@allowed
def sparse_embedding():
    return of(nn.Embedding(7, 2, sparse=True), TOKENS)


@allowed
def sparse_gather():
    p = parameter(7)
    return Case([p], lambda: torch.gather(p, 0, TOKENS[0], sparse_grad=True))


@allowed
def checkpoint_without_reentry():
    layer, x = nn.Linear(3, 2), torch.randn(4, 3)
    return Case(layer.parameters(), lambda: checkpoint(layer, x, use_reentrant=False))


@allowed
def module_with_backward_hooks():
    layer = nn.Linear(3, 2)
    layer.register_full_backward_hook(lambda *_: None)
    return of(layer, torch.randn(4, 3).requires_grad_())


@pytest.mark.parametrize("columns", [1, 3], ids=["looped", "batched"])
@pytest.mark.parametrize("make", ALLOWED.values(), ids=ALLOWED)
def test_not_refused(make, columns):
    """Products are differences of gradients, to two digits in float32."""
    problem = make()
    gradient = problem.gradient()
    X = torch.randn(gradient.layout.n, 3)
    found = Hessian(columns).operator(gradient) @ X
    cross = gradient.cross(X[:, 0])

    for i, x in enumerate(X.unbind(1)):
        plus, minus = first_gradients(problem, x, 1e-2), first_gradients(problem, x, -1e-2)
        expected = [(a - b) / 2e-2 for a, b in zip(plus, minus, strict=True)]
        assert float((found[:, i] - expected[0]).norm() / expected[0].norm()) < 2e-2
        if i == 0:
            torch.testing.assert_close(cross, expected[1], rtol=2e-2, atol=1e-3)


def first_gradients(problem, x, step):
    """∇f with respect to θ and φ at θ + step·x."""
    gradient = problem.gradient()
    parts = gradient.layout.unflatten(step * x)
    with torch.no_grad():
        for p, d in zip(problem.inner, parts, strict=True):
            p.add_(d)
    found = torch.autograd.grad(problem.loss(), [*problem.inner, problem.phi])
    with torch.no_grad():
        for p, d in zip(problem.inner, parts, strict=True):
            p.sub_(d)
    return gradient.layout.flatten(found[:-1]), found[-1].reshape(1)


def test_sparse_gradients_are_those_of_the_dense_embedding():
    """As b and c, too: a layout flattens what autograd gives."""
    torch.manual_seed(0)
    weight = torch.randn(7, 2)
    found = []
    for sparse in (False, True):
        layer = nn.Embedding(7, 2, sparse=sparse, _weight=weight.clone())
        gradient = of(layer, TOKENS).gradient()
        (b,) = torch.autograd.grad(layer(TOKENS).square().sum(), layer.weight)
        assert b.is_sparse == sparse
        found.append([gradient.gradient, gradient.layout.flatten([b])])
        found[-1] += [Hessian(k).operator(gradient).dense() for k in (None, 1)]
        found[-1] += gradient.joint(torch.ones(14))
    for dense, other in zip(*found, strict=True):
        torch.testing.assert_close(other, dense)


def test_what_sparse_tensors_cannot_do_is_said():
    """Columns that cannot be batched are looped; what fails there names sparse=False."""
    problem = sparse_embedding()
    gradient = problem.gradient()

    def refuse(g):
        raise NotImplementedError(
            "Could not run 'aten::view' with arguments from the 'SparseCPU' backend."
        )

    problem.inner[0].register_hook(refuse)
    with pytest.raises(RuntimeError, match=re.escape("nn.Embedding(..., sparse=False)")):
        Hessian().operator(gradient) @ torch.ones(14, 2)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["once", "compiled", "bag"])
def test_an_outer_model_is_differentiated_only_once(kind):
    """Its outputs are constants for θ, so Jᵀx needs its first derivative alone."""
    w, x = parameter(3), torch.randn(4, 3)
    if kind == "bag":
        outer = nn.EmbeddingBag(7, 4, mode="sum")
        weigh = lambda: outer(TOKENS[:1])[0]  # noqa: E731
    else:
        outer = nn.Linear(3, 1)
        net = torch.compile(outer, backend="aot_eager") if kind == "compiled" else outer
        weigh = lambda: net(x)[:, 0].exp()  # noqa: E731
        if kind == "once":
            weigh = lambda: Once.apply(outer(x)[:, 0])  # noqa: E731
    plain = {
        "once": lambda: outer(x)[:, 0] ** 3,
        "compiled": lambda: outer(x)[:, 0].exp(),
        "bag": lambda: outer.weight[TOKENS[0]].sum(0),
    }[kind]

    def loss(weights):
        return lambda: (weights() * (x @ w).tanh().square()).sum()

    gradient = InnerGradient(loss(weigh)(), [w], list(outer.parameters()))
    H, J = oracles.jacobians(loss(plain), [w], list(outer.parameters()))
    v = torch.randn(3)
    Hv, Jv = gradient.joint(v)
    torch.testing.assert_close(Hv, H @ v)
    torch.testing.assert_close(Jv, J.mT @ v)
    assert Jv.norm() > 0


# --- first derivatives --------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["validation", "training"])
def test_a_loss_that_hides_its_parameters(which):
    check_differentiable(checkpointed(on=False).loss(), which)
    fused, _ = fused_attention()
    check_differentiable(fused.loss(), which)  # first derivatives are all right
    for make in (reentrant_checkpoint, checkpoint_under_another_name):
        with pytest.raises(RuntimeError, match=f"^The {which} loss went through .*use_reentrant"):
            check_differentiable(make()[0].loss(), which)


# --- the short way of the inner step ------------------------------------------------------------


def level(*, extra: bool = False) -> tuple[list, list, object]:
    w, phi, other = parameter(3), parameter(3), parameter(3)
    return [w], [phi], (lambda: (phi.exp() * w.tanh() + (other if extra else 0)).square().sum())


def test_the_short_way_is_the_plain_one():
    inner, outer, loss = level()
    inner[0].register_hook(lambda g: 2 * g)
    assert short_way_is_safe(graph_nodes(loss()), inner, outer)
    loss().backward(inputs=inner)
    short, inner[0].grad = inner[0].grad, None
    loss().backward()
    assert torch.equal(short, inner[0].grad)


def test_the_short_way_is_not_taken_past_what_only_the_plain_one_does():
    inner, outer, loss = level(extra=True)
    assert not short_way_is_safe(graph_nodes(loss()), inner, outer)  # fills .grad of another leaf
    inner, outer, loss = level()
    for register in ("register_hook", "register_post_accumulate_grad_hook"):
        handle = getattr(outer[0], register)(lambda g: None)
        assert not short_way_is_safe(graph_nodes(loss()), inner, outer)
        handle.remove()
        assert short_way_is_safe(graph_nodes(loss()), inner, outer)
    for make in (reentrant_checkpoint, checkpoint_under_another_name, once_differentiable_function):
        problem, _ = make()
        assert not short_way_is_safe(graph_nodes(problem.loss()), problem.inner, [problem.phi])
    problem = module_with_backward_hooks()
    assert not short_way_is_safe(graph_nodes(problem.loss()), problem.inner, [problem.phi])


# --- hooks on parameters ------------------------------------------------------------------------


def test_hooks_on_parameters_do_not_act_in_products():
    problem = lstm()
    gradient = problem.gradient()
    x = torch.randn(gradient.layout.n)
    expected = [gradient.gradient, *gradient.joint(x)]
    called = []
    for p in [*problem.inner, problem.phi]:
        p.register_hook(lambda g: called.append(1) or g.clamp(-1e-3, 1e-3))
        p.register_post_accumulate_grad_hook(lambda p: called.append(2))
    with without_parameter_hooks([*problem.inner, problem.phi]):
        gradient = problem.gradient()
        found = [gradient.gradient, *gradient.joint(x)]
        problem.loss().backward()
    assert not called
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    problem.loss().backward()
    assert sorted(called) == [1] * 5 + [2] * 5


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_hooks_are_back_in_order_whatever_happens(error):
    p, order = parameter(2), []
    for i in range(3):
        handle = p.register_hook(lambda g, i=i: order.append(i))
    held = p._backward_hooks

    def interrupted():
        with without_parameter_hooks([p, parameter(1)]):
            with without_parameter_hooks([p]):
                p.sum().backward()
            p.register_hook(lambda g: order.append("registered inside"))
            raise error

    with pytest.raises(error):
        interrupted()
    assert p._backward_hooks is held
    p.sum().backward()
    assert order == [0, 1, 2]
    handle.remove()
    p.sum().backward()
    assert order == [0, 1, 2, 0, 1]


def test_an_interrupt_while_hooks_are_put_back():
    p, called = parameter(2), []
    p.register_hook(lambda g: called.append(1))

    class Interrupted(dict):
        times = 1

        def update(self, *args):
            if self.times:
                self.times -= 1
                raise KeyboardInterrupt
            super().update(*args)

    hooks = Interrupted(p._backward_hooks)
    tensor = type("Tensor", (), {"_backward_hooks": hooks, "_post_accumulate_grad_hooks": None})()
    with pytest.raises(KeyboardInterrupt), without_parameter_hooks([tensor]):
        assert not hooks
    assert list(hooks) == list(p._backward_hooks)
