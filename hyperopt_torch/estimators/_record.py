"""Inner steps on record, to be taken again later."""

from __future__ import annotations

import types
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._closure import Evaluation
from .._guards import Buffers, RandomState, random_state, recorded_buffers
from .base import BilevelProblem, HypergradientEstimator

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
