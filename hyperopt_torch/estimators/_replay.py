"""Inner steps on record, and how to take them again: what trajectory estimators share."""

from __future__ import annotations

import types
from abc import abstractmethod
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .._closure import Evaluation, evaluate
from .._guards import (
    Buffers,
    RandomState,
    buffers_at,
    graph_nodes,
    random_state,
    recorded_buffers,
    set_random_state,
)
from ..hyperparameters import numbers
from .base import BilevelProblem, HypergradientEstimator, needs_closure

State = list[dict[str, Any]]  # of an optimizer, for each inner parameter


@dataclass(frozen=True)
class RecordedStep:
    """What it takes to take an inner step again.

    Attributes:
        closure: the training closure, with the variables that it named at that time.
        loss: its value, detached.
        random, buffers: the random streams and the modules' buffers before it ran.
        settings: the parameter groups without their parameters.
        parameters: copies of the inner parameters before the step; None where nobody needs them.
        state: a copy of the inner optimizer's state before the step; None likewise.
    """

    closure: Callable[[], Any]
    loss: Tensor
    random: RandomState
    buffers: Buffers
    settings: list[dict[str, Any]]
    parameters: list[Tensor] | None
    state: State | None


class TrajectoryEstimator(HypergradientEstimator):
    """Keeps the inner steps since the last outer step.

    Args:
        window: how many steps; None: all.
        every_step: whether every step keeps parameters and optimizer state, or the first alone.
    """

    def __init__(self, window: int | None, every_step: bool) -> None:
        self._every_step = every_step
        self._steps: deque[RecordedStep] = deque(maxlen=window)
        self._initial: list[Tensor] | None = None  # what θ was started from, if all is on record
        self._before: tuple[RandomState, Buffers] | None = None
        self._loss: Tensor | None = None
        self._finished = False  # a hypergradient was taken: the next step begins a new stretch

    @contextmanager
    def recording(self, problem: BilevelProblem) -> Iterator[None]:
        if self._finished:
            self.restart()
        device = problem.inner_parameters[0].device
        last = self._steps[-1] if self._steps else None
        random = random_state(device)
        if last is not None and all(map(torch.equal, random, last.random)):
            random = last.random  # nothing was drawn: one copy serves both
        with recorded_buffers(last.buffers if last else {}) as buffers:
            yield
        self._before = random, buffers

    def before_backward(self, problem: BilevelProblem, evaluation: Evaluation) -> None:
        self._loss = evaluation.loss.detach()

    def observe(self, problem: BilevelProblem) -> None:
        if not callable(problem.train_loss):
            raise RuntimeError(
                f"{type(self).__name__} takes inner steps again, for which it needs a closure: "
                "inner_step(lambda: train_loss(...)) instead of inner_step(train_loss)."
            )
        assert self._before is not None
        assert self._loss is not None
        if len(self._steps) == self._steps.maxlen:
            self._initial = None  # the step that leaves is the one that started there
        copies = self._every_step or not self._steps
        self._steps.append(
            RecordedStep(
                frozen(problem.train_loss),
                self._loss,
                *self._before,
                settings=[settings_now(group) for group in problem.inner.param_groups],
                parameters=[p.detach().clone() for p in problem.inner_parameters]
                if copies
                else None,
                state=[copied(problem.inner.state.get(p, {})) for p in problem.inner_parameters]
                if copies
                else None,
            )
        )
        self._before = self._loss = None

    def begin(self, initial: Sequence[Tensor]) -> None:
        self.restart()
        self._initial = list(initial)

    def finish(self) -> None:
        self._finished = True

    def restart(self) -> None:
        self._steps.clear()
        self._initial = None
        self._finished = False

    def reset(self) -> None:
        self.restart()

    @abstractmethod
    def estimate(self, problem: BilevelProblem, outer_loss: Tensor) -> list[Tensor | None]: ...

    def recorded(self, problem: BilevelProblem) -> list[RecordedStep]:
        """The steps on record, oldest first; RuntimeError if there are none that fit."""
        if not self._steps:
            raise RuntimeError(
                f"{type(self).__name__} has no inner step on record since the last outer step: "
                "call inner_step(closure) before outer_step(val_loss). Steps taken before a "
                "checkpoint was loaded cannot be taken again."
            )
        first = self._steps[0].parameters or []
        if [p.shape for p in first] != [p.shape for p in problem.inner_parameters]:
            raise RuntimeError(
                "The inner optimizer has got other parameters since the steps on record were "
                "taken (add_param_group, unfreezing?): call reset() before the next inner_step."
            )
        return list(self._steps)

    def started_from(self, problem: BilevelProblem) -> list[int]:
        """For each inner parameter the outer one that it was started from, by number; or []."""
        if self._initial is None:
            return []
        place = {id(p): i for i, p in enumerate(problem.outer_parameters)}
        return [place[id(t)] for t in self._initial]


def settings_now(group: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a parameter group; schedulers fill tensors in place, hence copies.

    Learned hyperparameters stay themselves: they are what a replay may vary.
    """
    return {
        name: value.clone() if isinstance(value, Tensor) and not value.requires_grad else value
        for name, value in group.items()
        if name != "params"
    }


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


def frozen(closure: Callable[[], Any]) -> Callable[[], Any]:
    """The closure with its variables as they are now.

    A loop that says ``inner_step(lambda: train_loss(x, y))`` changes x and y under the closures
    of earlier steps; each is to see its own batch again.
    """
    if not isinstance(closure, types.FunctionType):
        return closure
    scope = dict(closure.__globals__)  # whole: what is defined inside reads it too
    cells = tuple(types.CellType(*_content(cell)) for cell in closure.__closure__ or ())
    twin = types.FunctionType(
        closure.__code__, scope, closure.__name__, closure.__defaults__, cells
    )
    twin.__kwdefaults__ = closure.__kwdefaults__
    return twin


def _content(cell: types.CellType) -> tuple[Any, ...]:
    try:
        return (cell.cell_contents,)
    except ValueError:  # not assigned yet
        return ()


def copied(value: Any) -> Any:
    """Containers rebuilt and tensors cloned; everything else as it is."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {k: copied(v) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(copied(v) for v in value)
    return value


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
            reached.update(map(id, leaves(graph_nodes(evaluation.loss))))
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


def leaves(nodes: Sequence[Any]) -> list[Tensor]:
    """The tensors at the ends of a graph."""
    return [node.variable for node in nodes if hasattr(node, "variable")]


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


_NOT_REPEATABLE = (
    "A training closure is not repeatable: called again with the same parameters and random "
    "streams, it returned another loss, or none. Does it draw its own batch, or read variables "
    "that the loop has changed since? Draw the batch before inner_step and let the closure hold "
    "it: inner_step(lambda x=x, y=y: train_loss(x, y))."
)


def check_repeatable(agree: Sequence[Tensor]) -> None:
    """RuntimeError unless every evaluation agreed with the recorded one: one sync."""
    if not bool(torch.stack(list(agree)).all()):
        raise RuntimeError(_NOT_REPEATABLE)
