"""What torch refuses to differentiate twice, said in the user's terms."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.autograd.function import once_differentiable


class NoSecondDerivative(RuntimeError):
    """Torch refuses a derivative; the message names the operation and what to do."""


# (part of the operation's name, what to call it, what computes the same and has a second
# derivative); the name itself stands for {}.
_INSTEAD = (
    (
        "CompiledFunction|aot_autograd",
        "torch.compile",
        "the module itself has one: `model._orig_mod`, or what was passed to torch.compile",
    ),
    (
        "ScaledDotProduct|scaled_dot_product|_attention",
        "fused attention ({})",
        "the MATH backend has one: `with torch.nn.attention.sdpa_kernel("
        "torch.nn.attention.SDPBackend.MATH): ...`",
    ),
    (
        "embedding_bag",
        "nn.EmbeddingBag",
        "nn.Embedding and a sum, mean or max over its rows has one",
    ),
    ("hardsigmoid", "hardsigmoid", "relu6(x + 3) / 6 is the same and has one"),
    ("cdist", "torch.cdist", 'compute_mode="use_mm_for_euclid_dist" has one, for p=2'),
    ("pdist", "torch.pdist", "torch.linalg.vector_norm of the differences has one"),
    ("cudnn_rnn", "an RNN on cuDNN", "`torch.backends.cudnn.flags(enabled=False)` gives it one"),
    ("mkldnn_rnn", "an RNN on mkldnn", "`torch.backends.mkldnn.flags(enabled=False)` gives it one"),
    ("Sparse", "sparse gradients", "nn.Embedding(..., sparse=False) has one"),
    (
        "WarnNotImplemented",
        "a custom operation without a formula for its derivative",
        "torch.library.register_autograd gives it one",
    ),
)
_ANOTHER = (
    "The inner steps may keep it: evaluate another closure for the hypergradient, "
    "outer_step(val_loss, train_loss=eager_closure)"
)
_REENTRANT = (
    "which hides its parameters from torch.autograd.grad. Pass use_reentrant=False to "
    "torch.utils.checkpoint.checkpoint (in transformers gradient_checkpointing_enable("
    'gradient_checkpointing_kwargs={"use_reentrant": False}))'
)
# How torch words a refusal; a group is the operation.
_WORDS = re.compile(
    r"derivative for '?(?:aten::)?([\w.]+(?:::[\w.]+)*).*is not implemented"
    r"|backward through ([\w.:]+) but no autograd formula"
    r"|double.backwards? on (\w+)"
    r"|(aot_autograd) does not currently support double backward"
    r"|(once_differentiable)|double.?backward|differentiable twice|differentiate twice",
    re.IGNORECASE,
)
_SPARSE = re.compile(r"from the '(Sparse)\w*' backend")
_ONCE: Any = once_differentiable(lambda ctx: None).__code__


def refusal(operation: str) -> NoSecondDerivative:
    """The error for an operation of the training loss, by its name in torch."""
    what, instead = operation, ""
    for part, name, other in _INSTEAD:
        if re.search(part, operation):
            what, instead = name.format(operation), f"; {other}"
            break
    return NoSecondDerivative(
        f"The training loss went through {what}, which has no second derivative in torch{instead}. "
        f"{_ANOTHER}. Or use curvature=FiniteDifference() or estimator=PZOBO(), which need no "
        "second derivative."
    )


def hiding(which: str, operation: str) -> NoSecondDerivative:
    """The error for an operation that ``torch.autograd.grad`` does not see through at all."""
    another = f". {_ANOTHER}" if which == "training" else ""
    if operation == "CheckpointFunctionBackward":
        what = f"an activation checkpoint with use_reentrant=True, {_REENTRANT}"
    else:
        name = operation.removesuffix("Backward")
        what = (
            f"{name}, a torch.autograd.Function that runs a backward pass of its own, {_REENTRANT}"
            ", or let its backward() return the gradients of everything that it used"
        )
    return NoSecondDerivative(f"The {which} loss went through {what}{another}.")


def hides(node: Any) -> bool:
    """Whether a node runs a backward pass of its own, as reentrant activation checkpoints do."""
    if node.name() == "CheckpointFunctionBackward":
        return True
    used = {name for code in _codes(node) for name in code.co_names}
    return {"enable_grad", "backward"} <= used  # by its code: checkpoints of other libraries


def refused_operation(node: Any) -> str | None:
    """The operation behind a node of the training loss that has no second derivative."""
    name: str = node.name()
    if "CompiledFunction" in name or ("ScaledDotProduct" in name and "Math" not in name):
        return name
    if any(code is _ONCE for code in _codes(node)):
        return f"{name.removesuffix('Backward')} (marked @once_differentiable)"
    return None


def operation_of_error_node(node: Any) -> str | None:
    """What stands behind a node of the graph of ∇f that is there to refuse; None for others."""
    name: str = node.name()
    if name == "torch::autograd::WarnNotImplemented":
        return name
    if name not in ("torch::autograd::Error", "torch::autograd::NotImplemented"):
        return None
    try:  # such a node does nothing but raise, and knows the operation
        node(*[None] * len(node._input_metadata))
    except Exception as error:
        return _operation(str(error)) or str(error)
    return "an operation"


@contextmanager
def explained_refusals(*, sparse: bool = True) -> Iterator[None]:
    """Torch's words for a missing second derivative, as a remedy.

    Args:
        sparse: also what sparse tensors cannot do; not where other ways are tried next.
    """
    try:
        yield
    except NoSecondDerivative:
        raise
    except RuntimeError as error:
        operation = _operation(str(error))
        if operation is None and sparse and _SPARSE.search(str(error)):
            operation = "Sparse"
        if operation is None:
            raise
        raise refusal(operation) from error


def _operation(message: str) -> str | None:
    found = _WORDS.search(message)
    if found is None:
        return None
    name = next((group for group in found.groups() if group), None)
    if name is None:
        return f'an operation of which torch says "{message.splitlines()[0]}"'
    if name == "once_differentiable":
        return "a torch.autograd.Function that is marked @once_differentiable"
    return re.sub(r"^_+|_backward$", "", name)


def _codes(node: Any) -> Iterator[Any]:
    """The code of a python Function's backward, beneath its decorators; nothing for others."""
    backward = getattr(getattr(node, "_forward_cls", None), "backward", None)
    while backward is not None:
        if hasattr(backward, "__code__"):
            yield backward.__code__
        backward = getattr(backward, "__wrapped__", None)
