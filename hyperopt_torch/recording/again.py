"""A recorded closure evaluated again, in the world that it found."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .._graph import graph_nodes
from .age import older, reaches, sequence_number
from .closure import Evaluation, TrainLoss, evaluate
from .door import changed
from .restore import Restoring
from .step import Record, is_compiled, watching
from .streams import StreamReader, Streams
from .world import BufferLender, Modules, put_modes

Self = TypeVar("Self", bound="_Present")

_HOLD = (
    "Draw the batch before the inner step and let the closure hold it: "
    "inner_step(lambda x=x, y=y: train_loss(x, y)). To mean another loss on purpose, say so: "
    "outer_step(val_loss, train_loss)."
)
_NOT_REPEATABLE = (
    "A training closure is not repeatable: called again with the same parameters and random "
    "streams, it returned another loss, or none. Does it draw its own batch, or read variables "
    "that the loop has changed since? " + _HOLD
)


OUTSIDE = (
    "A part of the training loss was made outside of the closure, from parameters that have moved "
    "since or through a graph that is gone: compute everything that depends on parameters inside "
    "the closure."
)


def again(record: Record, streams: Streams | None = None, *, twice: bool = True) -> Evaluation:
    """The training loss once more, its graph alive, at whatever θ and φ are now.

    The closure finds its variables, the attributes of its object, the modes of its modules and the
    random streams as they were; all is put back as it is now. Buffers are those of the
    :class:`World` around: they go on from one evaluation to the next. Attention runs without its
    fused kernels and compiled modules run uncompiled: neither has a second derivative.

    Args:
        streams: where the random streams shall stand instead, for an optimizer that evaluates
            several times a step; each evaluation leaves in ``record.reader.end`` where it ended.
        twice: whether the graph is to be differentiated twice. Otherwise fused attention and
            compiled modules run as they do in training.

    Raises:
        RuntimeError: the closure met another batch than then, and that is explained by none of
            these; or it draws from an iterator, and nothing shows that the batch is the same.
    """
    with record.closure.restoring() as present, _twice_differentiable(twice):
        put_modes(present, record.modules)
        _keep_streams(present, record.reader)
        record.reader.put(record.streams if streams is None else streams)
        for tensor in record.moved:
            _put_aside(present, tensor)
        start = sequence_number()
        before = [entrant.tensor._version for entrant in record.door]
        roots = [m for m in record.modules if is_compiled(m)]
        with watching(roots, record.modules) as watch:
            try:
                evaluation = evaluate(record.closure)
            except StopIteration as error:
                raise RuntimeError(_NOT_REPEATABLE) from error
        record.reader.end = record.reader.read()
    if reaches(older(graph_nodes(evaluation.loss), start), record.inner):
        raise RuntimeError(OUTSIDE)
    difference = changed(record.door, before, watch.door) if record.door else None
    if difference is not None:
        raise RuntimeError(
            "The training closure is not repeatable: it met another batch when it was evaluated "
            f"again for the hypergradient: {difference}. Its variables, the attributes of its "
            "object and the random streams were put back, so it got it from elsewhere: an "
            f"iterator, an attribute of another object? {_HOLD}"
        )
    if record.closure.iterators and not record.door:
        raise RuntimeError(
            "The training closure is not repeatable: it draws from an iterator, "
            f"`{record.closure.iterators[0]}`, so that each evaluation meets another batch. {_HOLD}"
        )
    return evaluation


def again_in_the_present(train_loss: TrainLoss, *, twice: bool = True) -> Evaluation:
    """A closure that is on no record, or a loss, in a form that can be differentiated twice."""
    with _twice_differentiable(twice):
        return evaluate(train_loss)


class _Present:
    """The present, kept: random streams and modes of modules are put back at the end."""

    def __init__(self, modules: Modules, reader: StreamReader) -> None:
        self._modules, self._reader = modules, reader
        self._present = Restoring()

    def __enter__(self: Self) -> Self:
        self._present.__enter__()
        try:
            _keep_streams(self._present, self._reader)
            put_modes(self._present, self._modules)
            self._enter()
        except BaseException:
            self._present.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        self._present.__exit__(*error)

    def _enter(self) -> None:
        """What else is changed until the end."""


class PlainWorld(_Present):
    """As :class:`World` around first gradients alone: no global hooks, no buffer replaced.

    Compiled modules would be compiled anew for either. Buffers of the modules on record are written
    in place instead, past their version counters, and written back.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        super().__init__(_earliest(records), records[0].reader)

    def fresh(self) -> Restoring:
        """Inside: the values of the buffers that the first record met; outside, those of now."""
        present = Restoring()
        for module, state in self._modules.items():
            buffers = dict(module._buffers.items())
            present.finally_do(_buffers_back(module, buffers))
            for name, copy in state.buffers.items():
                buffer = buffers.get(name)
                if buffer is not None and buffer.shape == copy.value.shape:
                    buffer.data.copy_(copy.value)
        return present


def _buffers_back(module: nn.Module, own: dict[str, Tensor | None]) -> Callable[[], None]:
    values = {name: None if b is None else b.detach().clone() for name, b in own.items()}

    def undo() -> None:
        for name in [name for name in module._buffers if name not in own]:
            del module._buffers[name]  # made by a forward inside
        for name, buffer in own.items():
            module._buffers[name] = buffer
            value = values[name]
            if buffer is not None and value is not None:
                buffer.data.copy_(value)

    return undo


class World(_Present):
    """Around everything that evaluates closures again, or differentiates what they returned.

    Modules work on copies of their buffers: those that the first of ``records`` met, or what they
    hold where they are on no record. Activation checkpoints run forward passes again in the
    backward pass: hence also the modes. At the end everything is as found, random streams included.

    Args:
        records: what will be evaluated; none for closures in the world as it is.
        device: whose random stream is kept.
        reader: of the random streams; None: that of the records, or a new one.
    """

    def __init__(
        self,
        records: Sequence[Record],
        device: torch.device,
        reader: StreamReader | None = None,
    ) -> None:
        known = records[0].reader if records else None
        super().__init__(_earliest(records), reader or known or StreamReader(device))
        self._lender = BufferLender()

    def _enter(self) -> None:
        self._lender.put(self._present, self._modules)
        self._lender.install(self._present)

    def fresh(self, records: Sequence[Record] | None = None) -> Restoring:
        """Inside: the buffers that the first of ``records`` met once more, for another run."""
        present = Restoring()
        self._lender.put(present, self._modules if records is None else _earliest(records))
        return present


def _earliest(records: Sequence[Record]) -> Modules:
    """Every module as it was before the first record that called it."""
    modules: Modules = {}
    for record in records:
        for module, state in record.modules.items():
            modules.setdefault(module, state)
    return modules


def _keep_streams(present: Restoring, reader: StreamReader) -> None:
    now = reader.read()
    present.finally_do(lambda: reader.put(now))


def _put_aside(present: Restoring, tensor: Tensor) -> None:
    """Lends a tensor other memory, so that what is written to it goes there."""
    own = tensor.data
    present.finally_do(lambda: setattr(tensor, "data", own))
    tensor.data = own.clone()


@contextmanager
def _twice_differentiable(wanted: bool = True) -> Iterator[None]:
    if not wanted:
        yield
        return
    with _attention_by_matrix_products(), _uncompiled():
        yield


@contextmanager
def _attention_by_matrix_products() -> Iterator[None]:
    with Restoring() as present:
        present.finally_do(_attention_back())  # also where an interrupt comes as `with` ends
        with sdpa_kernel(SDPBackend.MATH):
            yield


def _attention_back() -> Callable[[], None]:
    switches: Any = torch.backends.cuda  # of every device, whatever the name says
    kinds = [k for k in ("flash", "mem_efficient", "math", "cudnn") if _has(switches, k)]
    found = {kind: bool(getattr(switches, f"{kind}_sdp_enabled")()) for kind in kinds}

    def undo() -> None:
        for kind, enabled in found.items():
            if getattr(switches, f"{kind}_sdp_enabled")() is not enabled:
                getattr(switches, f"enable_{kind}_sdp")(enabled)

    return undo


def _has(switches: Any, kind: str) -> bool:
    return hasattr(switches, f"{kind}_sdp_enabled") and hasattr(switches, f"enable_{kind}_sdp")


@contextmanager
def _uncompiled() -> Iterator[None]:
    frame: Any = sys.modules.get("torch._dynamo.eval_frame")
    if frame is None:
        yield
        return
    found = getattr(frame, "_stance", None)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:  # it is set as soon as it is made: an interrupt may come before `with` holds it
        if found is not None and frame._stance is not found:
            frame._set_stance(found)


def same_loss(recorded: Tensor, again: Tensor) -> Tensor:
    """Whether two evaluations agree to rounding; a 0-d bool tensor."""
    tolerance = torch.finfo(recorded.dtype).eps ** 0.5
    both_nan = recorded.isnan() & again.isnan()
    agree: Tensor = (
        both_nan | ((recorded - again).abs() <= tolerance * recorded.abs()) | (recorded == again)
    )
    return agree


def check_repeatable(agree: Sequence[Tensor]) -> None:
    """RuntimeError unless every evaluation agreed with the recorded one: one sync."""
    if not bool(torch.stack(list(agree)).all()):
        raise RuntimeError(_NOT_REPEATABLE)
