"""Inner steps on record, kept since the last outer step."""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from .._graph import graph_leaves, graph_nodes
from ..inner_optimizer import numbers, own_grads, standing_in, take_step, twin
from ..recording import (
    Buffers,
    Evaluation,
    RandomState,
    RecordedStep,
    again,
    buffers_at,
    copied,
    earliest,
    frozen,
    random_state,
    recorded_buffers,
    set_random_state,
    settings_now,
)
from .base import BilevelProblem, HypergradientEstimator


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
