"""Taking recorded inner steps again, without a trace."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .._closure import Evaluation, evaluate
from .._guards import Buffers, buffers_at, graph_leaves, graph_nodes, set_random_state
from ..hyperparameters import numbers
from ._record import RecordedStep, State, copied
from .base import BilevelProblem, needs_closure

_NOT_REPEATABLE = (
    "A training closure is not repeatable: called again with the same parameters and random "
    "streams, it returned another loss, or none. Does it draw its own batch, or read variables "
    "that the loop has changed since? Draw the batch before inner_step and let the closure hold "
    "it: inner_step(lambda x=x, y=y: train_loss(x, y))."
)


def again(step: RecordedStep) -> Evaluation:
    """The training loss of a step once more; whoever calls restores what it depends on."""
    try:
        return evaluate(step.closure)
    except StopIteration as error:
        raise RuntimeError(_NOT_REPEATABLE) from error


def earliest(steps: Sequence[RecordedStep]) -> Buffers:
    """The buffers of every module as they were before the first step that called it."""
    found: Buffers = {}
    for step in steps:
        for part, known in step.buffers.items():
            found.setdefault(part, known)
    return found


@contextmanager
def standing_in(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[None]:
    """Inside, each tensor holds the memory of its value; outside, its own again.

    The objects stay, so closures see the values, and no version counter moves: graphs that hold
    the tensors, such as that of the validation loss, stay good.
    """
    own = [t.data for t in tensors]
    try:
        for t, value in zip(tensors, values, strict=True):
            t.data = value.data
        yield
    finally:
        for t, value in zip(tensors, own, strict=True):
            t.data = value


@contextmanager
def own_grads(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Whatever happens to ``.grad`` inside, outside it is the same object again."""
    own = [t.grad for t in tensors]
    try:
        for t in tensors:
            t.grad = None
        yield
    finally:
        for t, grad in zip(tensors, own, strict=True):
            t.grad = grad


def twin(optimizer: Optimizer, places: Mapping[int, Tensor], state: State) -> Optimizer:
    """A copy of ``optimizer`` over other tensors: ``places[id(p)]`` for p.

    Args:
        state: for each of ``places``, in order; becomes the twin's own.
    """

    def swapped(value: Any) -> Any:
        if isinstance(value, Tensor):
            return places.get(id(value), value)
        if isinstance(value, list):
            return [swapped(v) for v in value]
        return value

    copy: Optimizer = object.__new__(type(optimizer))
    # Not `step`: learning rate schedulers wrap it in the original's.
    copy.__dict__.update({k: swapped(v) for k, v in vars(optimizer).items() if k != "step"})
    copy.defaults = dict(optimizer.defaults)
    copy.param_groups = [
        {name: swapped(value) if name == "params" else value for name, value in group.items()}
        for group in optimizer.param_groups
    ]
    copy.state = defaultdict(dict)
    for place, entries in zip(places.values(), state, strict=True):
        if entries:
            copy.state[place] = entries
    return copy


def follow(
    problem: BilevelProblem, steps: Sequence[RecordedStep], initial: Sequence[Tensor] | None = None
) -> tuple[list[Tensor], set[int]]:
    """The inner parameters after ``steps``, with the outer parameters as they are now.

    Args:
        initial: where to start; None: where the first step started.

    Returns:
        (θ, ids of the tensors that any of the losses depended on).
    """
    first = steps[0]
    assert first.parameters is not None
    assert first.state is not None
    parameters = problem.inner_parameters
    start = first.parameters if initial is None else [t.detach() for t in initial]
    stand_ins = [v.clone().requires_grad_() for v in start]
    places = {id(p): q for p, q in zip(parameters, stand_ins, strict=True)}
    optimizer = twin(problem.inner, places, copied(first.state))
    reached: set[int] = set()

    def gradients() -> Tensor:
        for p, q in zip(parameters, stand_ins, strict=True):
            p.data = q.data  # one memory: what the twin does to q, the model sees in p
        with problem.explained_training_errors():
            evaluation = again(step)
            reached.update(map(id, graph_leaves(graph_nodes(evaluation.loss))))
            grads = torch.autograd.grad(evaluation.loss, parameters, allow_unused=True)
        for p, q, g in zip(parameters, stand_ins, grads, strict=True):
            p.grad = q.grad = g  # both: a hook may clip those of the model
        return evaluation.loss.detach()

    with standing_in(parameters, stand_ins), buffers_at(earliest(steps)), own_grads(parameters):
        for step in steps:
            for group, settings in zip(optimizer.param_groups, step.settings, strict=True):
                group.update(numbers(settings))
            set_random_state(parameters[0].device, step.random)
            with torch.enable_grad():
                take_step(optimizer, gradients)
    return [q.detach() for q in stand_ins], reached


def take_step(optimizer: Optimizer, gradients: Callable[[], Tensor]) -> None:
    """One step of a twin; ``gradients`` puts them in place."""
    step = type(optimizer).step
    if needs_closure(optimizer):
        step(optimizer, gradients)  # type: ignore[arg-type]
    else:
        gradients()
        with torch.no_grad():
            step(optimizer)


def step_hooks(optimizer: Optimizer) -> bool:
    """Whether anything is registered to run before or after the optimizer's step."""
    kinds = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    return any(getattr(optimizer, kind, None) for kind in kinds)


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
