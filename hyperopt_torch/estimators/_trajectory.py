"""Inner steps on record, kept since the last outer step, and taken again."""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .._graph import check_differentiable, graph_leaves, graph_nodes
from .._tensors import inner_product, is_sharded
from ..inner_optimizer import (
    Change,
    Gradients,
    SeenGradient,
    needs_closure,
    numbers,
    standing_in,
    take_step,
    twin,
    unchanged,
)
from ..plain_gradient import own_grads
from ..recording import (
    Evaluation,
    Record,
    State,
    Streams,
    World,
    again,
    copied,
    same_loss,
    settings_now,
    shared,
    weights,
)
from ..report import SolveReport
from ._problem import BilevelProblem
from .base import HypergradientEstimator


@dataclass(frozen=True)
class RecordedStep:
    """What it takes to take an inner step again.

    Attributes:
        records: the micro-batches whose gradients it took.
        weights: of each of them.
        settings: the parameter groups of each inner optimizer, without their parameters.
        parameters: copies of the inner parameters before the step; None where nobody needs them.
        state: a copy of the inner optimizers' state before the step; None likewise.
        seen: what the optimizers saw of the gradient; None: the gradient of the loss itself.
    """

    records: list[Record]
    weights: list[float]
    settings: list[list[dict[str, Any]]]
    parameters: list[Tensor] | None
    state: State | None
    seen: SeenGradient | None

    def change_from(self, raw: Gradients) -> Change:
        """What became of the gradient of this step, ``raw``, before the optimizers saw it."""
        return unchanged if self.seen is None else self.seen.change_from(raw)


class TrajectoryEstimator(HypergradientEstimator):
    """Keeps the inner steps since the last outer step.

    Args:
        window: how many steps; None: all.
        every_step: whether every step keeps parameters and optimizer state, or the first alone.
    """

    averages = True

    def __init__(self, window: int | None, every_step: bool) -> None:
        self._every_step = every_step
        self._steps: deque[RecordedStep] = deque(maxlen=window)
        self._initial: list[Tensor] | None = None  # what θ was started from, if all is on record
        self._skipped = False  # a step was not taken
        self._finished = False  # a hypergradient was taken: the next step begins a new stretch

    def check(self, problem: BilevelProblem) -> None:
        if any(map(is_sharded, problem.inner_parameters)):
            raise RuntimeError(
                f"{type(self).__name__} takes inner steps again, which it cannot where parameters "
                "are in parts (FSDP2, DTensor): use ImplicitDifferentiation with "
                "curvature=FiniteDifference(), or whole parameters (DistributedDataParallel)."
            )

    def outer_gradients(
        self, problem: BilevelProblem, outer_loss: Tensor
    ) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None]]:
        """∂g/∂θ and ∂g/∂φ of the mean loss of all processes."""
        b, direct = problem.outer_gradients(outer_loss)
        return (b, direct) if problem.group is None else problem.group.gradients(b, direct)

    def observe(self, problem: BilevelProblem, records: Sequence[Record]) -> None:
        if not records:
            raise RuntimeError(
                f"{type(self).__name__} takes inner steps again, for which it needs a closure: "
                "inner_step(lambda: train_loss(...)) instead of inner_step(train_loss)."
            )
        if self._finished:
            self.restart()
        if len(self._steps) == self._steps.maxlen:
            self._initial = None  # the step that leaves is the one that started there
        copies = self._every_step or not self._steps
        parameters = problem.inner_parameters
        if self._steps:
            last = self._steps[-1].records[-1].streams
            records = [replace(r, streams=shared(r.streams, last), door=[]) for r in records]
        self._steps.append(
            RecordedStep(
                list(records),
                weights(records),
                [[settings_now(group) for group in o.param_groups] for o in problem.inner],
                parameters=[p.detach().clone() for p in parameters] if copies else None,
                state=[copied(_state(problem, p)) for p in parameters] if copies else None,
                # A line search sees other gradients than the one that is here now.
                seen=None
                if any(map(needs_closure, problem.inner))
                else SeenGradient.of(parameters, problem.untouched),
            )
        )

    def skipped(self, problem: BilevelProblem, records: Sequence[Record]) -> None:
        if self._finished:
            self.restart()
        self._skipped = True

    def begin(self, initial: Sequence[Tensor]) -> None:
        self.restart()
        self._initial = list(initial)

    def finish(self) -> None:
        self._finished = True

    def restart(self) -> None:
        self._steps.clear()
        self._initial = None
        self._finished = self._skipped = False

    def reset(self) -> None:
        self.restart()

    @abstractmethod
    def estimate(self, problem: BilevelProblem, outer_loss: Tensor) -> list[Tensor | None]: ...

    def recorded(self, problem: BilevelProblem) -> list[RecordedStep]:
        """The steps on record, oldest first; RuntimeError if there are none that fit.

        There may be none where a GradScaler skipped them all: then θ does not depend on φ.
        """
        if not self._steps and self._skipped:
            return []
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
        kinds = [(p.dtype, p.device) for p in problem.inner_parameters]
        if [(p.dtype, p.device) for p in first] != kinds:
            raise RuntimeError(
                "The model was moved to another dtype or device since the steps on record were "
                "taken: call reset() after model.to(...), and take inner steps again."
            )
        return list(self._steps)

    def started_from(self, problem: BilevelProblem) -> list[int]:
        """For each inner parameter the outer one that it was started from, by number; or []."""
        if self._initial is None:
            return []
        place = {id(p): i for i, p in enumerate(problem.outer_parameters)}
        return [place[id(t)] for t in self._initial]


def _state(problem: BilevelProblem, parameter: Tensor) -> dict[str, Any]:
    found = [o.state[parameter] for o in problem.inner if parameter in o.state]
    return found[0] if found else {}


def all_skipped(
    strategy: str,
    problem: BilevelProblem,
    b: Sequence[Tensor | None],
    direct: Sequence[Tensor | None],
) -> tuple[SolveReport, list[Tensor | None]]:
    """The hypergradient through no step at all: the direct term."""
    live = [g.flatten() for g in b if g is not None]
    size = torch.stack([inner_product(g, g) for g in live]).sum().sqrt()
    note = "a GradScaler skipped all inner steps since the last outer step"
    report = SolveReport(strategy, 0, size, gradients=0, notes=(note,))
    pairs = zip(direct, problem.outer_parameters, strict=True)
    return report, [torch.zeros_like(p) if c is None else c for c, p in pairs]


def world_of(problem: BilevelProblem, steps: Sequence[RecordedStep]) -> World:
    """The world in which the steps are taken again."""
    return World(records_of(steps), problem.inner_parameters[0].device)


def records_of(steps: Sequence[RecordedStep]) -> list[Record]:
    """All of them, the oldest first."""
    return [record for step in steps for record in step.records]


def again_checked(record: Record, agree: list[Tensor]) -> Evaluation:
    """The evaluation at a point that is on record too; notes whether the loss is the same."""
    evaluation = again(record)
    agree.append(same_loss(record.loss, evaluation.loss.detach()))
    return evaluation


def follow(
    problem: BilevelProblem,
    steps: Sequence[RecordedStep],
    world: World,
    changes: list[Change],
    initial: Sequence[Tensor] | None = None,
) -> tuple[list[Tensor], set[int]]:
    """The inner parameters after ``steps``, with the outer parameters as they are now.

    Args:
        world: in which they are taken.
        changes: of the gradient in each step; found out, and added, where the list is empty.
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
    state = copied(first.state)
    twins = [twin(optimizer, places, state) for optimizer in problem.inner]
    reached: set[int] = set()
    line_search = any(map(needs_closure, twins))
    going_on: dict[int, Streams | None] = {}

    def gradients() -> Tensor:
        for p, q in zip(parameters, stand_ins, strict=True):
            p.data = q.data  # one memory: what the twin does to q, the model sees in p
        total: list[Tensor | None] = [None] * len(parameters)
        loss = torch.zeros((), device=parameters[0].device)
        for weight, record in zip(step.weights, step.records, strict=True):
            with problem.explained_training_errors():
                evaluation = again(record, going_on.get(id(record)))
                if line_search:
                    going_on[id(record)] = record.reader.end
                check_differentiable(evaluation.loss, "training")
                reached.update(map(id, graph_leaves(graph_nodes(evaluation.loss))))
                grads = torch.autograd.grad(evaluation.loss, parameters, allow_unused=True)
            total = [plus(s, weight, g) for s, g in zip(total, grads, strict=True)]
            loss = loss + weight * evaluation.loss.detach()
        *total, mean = problem.over_processes([*total, loss])
        assert mean is not None
        if i == len(changes):
            changes.append(step.change_from(total))
        total = changes[i](total)
        for p, q, g in zip(parameters, stand_ins, total, strict=True):
            p.grad = q.grad = g  # both: a step hook may clip those of the model
        return mean

    with (
        standing_in(parameters, stand_ins),
        world.fresh(records_of(steps)),
        own_grads(parameters),
    ):
        for i, step in enumerate(steps):  # noqa: B007 (read in gradients)
            for optimizer, settings in zip(twins, step.settings, strict=True):
                for group, known in zip(optimizer.param_groups, settings, strict=True):
                    group.update(numbers(known))
            with torch.enable_grad():
                take_step(twins, gradients)
    return [q.detach() for q in stand_ins], reached


def plus(total: Tensor | None, weight: float, gradient: Tensor | None) -> Tensor | None:
    """total + weight · gradient, where None is zero."""
    if gradient is None:
        return total
    scaled = gradient if weight == 1 else weight * gradient
    return scaled if total is None else total + scaled
