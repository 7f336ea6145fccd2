"""The inner level: training losses on record, and the steps of the optimizers as they happen."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ._graph import graph_nodes, short_way_is_safe
from .distributed import Processes
from .estimators import BilevelProblem, HypergradientEstimator
from .estimators._moving import hook_zeros
from .estimators._trajectory import TrajectoryEstimator
from .inner_optimizer import StepHook, learned, needs_closure, plain
from .recording import (
    OUTSIDE,
    Evaluation,
    Record,
    Recorder,
    TrainLoss,
    evaluate,
    older,
    reaches,
    sequence_number,
)

Moment = tuple[int, int]  # a thread, and how many graph nodes it had made by then


def now() -> Moment:
    return threading.get_ident(), sequence_number()


class InnerLevel:
    """What happens between two hypergradients, and the inner problem that it leaves on record.

    Losses come in by :meth:`record`, from the trainer's own loop, or by :meth:`step`, which is the
    loop. A problem is closed when an optimizer really steps, beneath scalers and wrappers: hooks
    tell it, and the records since the last step are the inner problem.

    Args:
        steppers: the inner optimizers as the loop calls them.
        real: the same beneath their wrappers.
        problem: makes the two levels as an estimator sees them.
        estimator: is shown every step, where it looks at them.
        processes: those that share the inner problem.
        grad_scaler: of :meth:`step`.

    Attributes:
        records: those of the last step: the inner problem.
        recorder: puts closures on record.
        hook_zeros: zero shifts of the parameters' own hooks, at the last step.
        inner_moved, outer_moved: when θ and φ were last written to.
    """

    def __init__(
        self,
        steppers: Sequence[Optimizer],
        real: Sequence[Optimizer],
        problem: Callable[[], BilevelProblem],
        estimator: HypergradientEstimator,
        processes: Processes,
        grad_scaler: torch.amp.GradScaler | None,
    ) -> None:
        self._steppers, self._real, self._problem = steppers, real, problem
        self._estimator, self._processes = estimator, processes
        self._grad_scaler = grad_scaler
        self._line_search = any(map(needs_closure, real))
        self.recorder = Recorder(problem().inner_parameters[0].device)
        self.inner_moved: Moment = (0, 0)
        self.outer_moved: Moment = (0, 0)
        self.forget()
        self._watch_steps()

    def forget(self) -> None:
        """Forgets which inner problem is under way."""
        self.records: list[Record] = []
        self.hook_zeros: dict[int, Tensor] = {}
        self._pending: list[Record] = []  # micro-batches since the last step
        self._earlier: list[Record] = []  # those recorded before the step that is under way
        self._waiting = False  # until the closure that this step was given has been called
        self._unseen = False  # the loss of this step was a tensor: there is no closure
        self._outer_grads: list[tuple[Tensor, Tensor | None]] = []  # while the trainer runs
        self._versions: list[tuple[Tensor, int]] = []  # of gradients, after our own backward
        self._now: BilevelProblem | None = None  # while an inner step of ours is under way
        self._observing = True
        self._stepping: Optimizer | None = None
        # While an optimizer steps, the learned tensors in its groups are numbers.
        self._numbers: AbstractContextManager[None] | None = None
        self._stepped: set[int] = set()  # ids of the optimizers that took the recorded step

    # Losses -------------------------------------------------------------------------------------

    def record(self, closure: Callable[[], Any], weight: float | None) -> Tensor:
        """The live loss, for a backward pass of the trainer's own."""
        problem = self._problem()
        if not self._pending and not self._outer_grads:
            self._put_outer_grads_aside(problem)
        evaluation = self._evaluate(problem, closure, weight)
        self._check_made_inside(problem, graph_nodes(evaluation.loss))
        return evaluation.loss

    def step(self, train_loss: TrainLoss) -> Tensor:
        """``zero_grad, backward, step``; the loss, detached."""
        self._now = problem = self._problem()
        self._versions = []
        self._pending.clear()
        if self._line_search:
            loss = self._closure_step(problem, train_loss)
        else:
            loss = self._backward(problem, train_loss)
            if self._grad_scaler is not None:
                for optimizer in self._steppers:
                    self._grad_scaler.unscale_(optimizer)
            self._note_gradients(problem)
            self._step_optimizers()
            self._notice_no_step()
        self._now = None
        self._note_gradients(problem)
        return loss

    def _evaluate(
        self, problem: BilevelProblem, closure: Callable[[], Any], weight: float | None = None
    ) -> Evaluation:
        inner, outer = problem.inner_parameters, problem.outer_parameters
        evaluation, record = self.recorder.call(closure, inner, outer, weight)
        self._pending.append(record)
        self._before_backward(problem, evaluation)
        return evaluation

    def _before_backward(self, problem: BilevelProblem, evaluation: Evaluation) -> None:
        inside = self._stepping is not None and len(self._pending) - len(self._earlier)
        again = self._line_search and inside > 1  # an evaluation that the trainer's closure made
        if self._estimator.observes and self._observing and not again:
            problem.begins = len(self._pending) <= 1
            problem.group = self._processes.of(
                self._pending, problem.inner_parameters, problem.outer_parameters
            )
            with problem.explained_training_errors():
                self._estimator.before_backward(problem, evaluation)

    def _backward(self, problem: BilevelProblem, train_loss: TrainLoss) -> Tensor:
        for optimizer in self._steppers:
            optimizer.zero_grad()
        clear = all(p.grad is None for p in problem.inner_parameters)
        self._put_outer_grads_aside(problem)
        try:
            self._unseen = not callable(train_loss)
            if callable(train_loss):
                evaluation = self._evaluate(problem, train_loss)
            else:
                evaluation = evaluate(train_loss)
                self._before_backward(problem, evaluation)
            loss = evaluation.loss
            if clear and any(p.grad is not None for p in problem.inner_parameters):
                raise RuntimeError(
                    "The training closure called backward() itself; it must only compute and "
                    "return the loss: inner_step does the rest."
                )
            nodes = graph_nodes(loss)
            self._check_made_inside(problem, nodes)
            scaled = loss if self._grad_scaler is None else self._grad_scaler.scale(loss)
            inner, outer = problem.inner_parameters, problem.outer_parameters
            # Past φ where that is proved to be the same.
            short = short_way_is_safe(nodes, inner, outer)
            with problem.explained_training_errors():
                scaled.backward(inputs=inner if short else None)  # type: ignore[no-untyped-call]
        finally:
            self.put_outer_grads_back()
        return loss.detach()

    def _step_optimizers(self) -> None:
        for optimizer in self._steppers:
            if self._grad_scaler is None:
                optimizer.step()
            else:
                self._grad_scaler.step(optimizer)
        if self._grad_scaler is not None:
            self._grad_scaler.update()

    def _closure_step(self, problem: BilevelProblem, train_loss: TrainLoss) -> Tensor:
        """For optimizers such as LBFGS, which evaluate the loss as often as they like."""
        if not callable(train_loss):
            raise TypeError(f"{problem.name} needs a closure: inner_step(lambda: train_loss(...)).")
        if self._grad_scaler is not None:
            raise ValueError(f"{problem.name} does not work with a grad_scaler.")

        def evaluation() -> Tensor:
            loss = self._backward(problem, train_loss)
            if self._observing:
                self._commit()
            self._pending.clear()
            self._observing = False  # further evaluations are the optimizer's own affair
            return loss

        (optimizer,) = self._steppers
        try:
            loss: Tensor = optimizer.step(evaluation)  # type: ignore[arg-type, assignment]
        finally:
            self._observing = True
        return loss.detach()

    # When a step really happens -----------------------------------------------------------------

    def _watch_steps(self) -> None:
        """Hooks on the optimizers beneath the wrappers; gone when this object is."""
        me = weakref.ref(self)

        def before(optimizer: Optimizer, closure: bool) -> None:
            level = me()
            if level is not None:
                level._before_step(optimizer, closure)

        def after(optimizer: Optimizer, closure: bool) -> None:
            level = me()
            if level is not None:
                level._after_step(optimizer)

        for optimizer in self._real:
            handles = [
                optimizer.register_step_pre_hook(StepHook(optimizer, before)),
                optimizer.register_step_post_hook(StepHook(optimizer, after)),
            ]
            for handle in handles:
                weakref.finalize(self, handle.remove)

    def _before_step(self, optimizer: Optimizer, closure: bool) -> None:
        """Gradients are there, parameters have not moved: what was recorded is the problem.

        Unless the step was given a closure, which may add to both: there may be micro-batches of
        which only the last is inside of the step. Trajectory estimators cannot wait for it.
        """
        nested = self._stepping is optimizer  # a subclass's step that calls super().step()
        self._stepping = optimizer
        if not nested:
            self._earlier = list(self._pending)
        self._waiting = closure and not isinstance(self._estimator, TrajectoryEstimator)
        if (self._pending or self._unseen) and not self._waiting:
            self._commit()
        elif not nested and id(optimizer) in self._stepped:
            self._stepped = set()  # a step of its own, of which nothing is on record
        self._stepped.add(id(optimizer))
        if not nested:
            self._close_numbers()
            if learned(optimizer):
                self._numbers = plain(optimizer)
                self._numbers.__enter__()

    def _after_step(self, optimizer: Optimizer) -> None:
        self._stepping = None
        self._close_numbers()
        if self._pending or (self._waiting and self._unseen):  # the step was given a closure
            if isinstance(self._estimator, TrajectoryEstimator):
                raise RuntimeError(
                    f"{self._estimator!r} needs the parameters as they were before the step, but "
                    "the loss was recorded inside of it, in a closure that was given to "
                    "optimizer.step(), as Lightning's automatic optimization does. Call record and "
                    "backward before optimizer.step() (manual optimization)."
                )
            if not self._waiting:
                self._pending[:0] = self._earlier
            if self._line_search:
                del self._pending[len(self._earlier) + 1 :]
            self._commit()
        self._earlier, self._waiting = [], False
        self.inner_moved = now()
        if self.records and self._estimator.observes and id(optimizer) in self._stepped:
            self._estimator.stepped(self._problem())

    def _close_numbers(self) -> None:
        numbers, self._numbers = self._numbers, None
        if numbers is not None:
            numbers.__exit__(None, None, None)

    def _commit(self) -> None:
        self.put_outer_grads_back()
        self.records = list(self._pending)
        self._pending.clear()
        self._unseen = False
        self._stepped = set()
        problem = self._now or self._problem()
        self.hook_zeros = hook_zeros(problem.inner_parameters)
        if self._estimator.observes:
            problem.untouched = bool(self._versions) and not self.gradients_changed()
            self._estimator.observe(problem, self.records)

    def _notice_no_step(self) -> None:
        """What was recorded is still pending: no optimizer stepped."""
        if not self._pending:
            return
        skipped = self._grad_scaler is not None or any(
            getattr(optimizer, "step_was_skipped", False) for optimizer in self._steppers
        )
        if not skipped:
            raise RuntimeError(
                "inner_step: the inner optimizer did not step; does a wrapper accumulate "
                "gradients? Each inner_step begins with zero_grad(), so the gradients of earlier "
                "micro-batches would be lost. Use loss = bilevel.record(closure) and keep the "
                "loop's own backward, step and zero_grad."
            )
        self.records = list(self._pending)  # the problem is the same, only the step was skipped
        self._pending.clear()
        if self._estimator.observes:
            self._estimator.skipped(self._problem(), self.records)

    def _note_gradients(self, problem: BilevelProblem) -> None:
        grads = [p.grad for p in problem.inner_parameters]
        self._versions = [(g, g._version) for g in grads if g is not None]

    def gradients_changed(self) -> bool:
        """Whether gradients were written to since :meth:`step` noted them."""
        return any(g._version != version for g, version in self._versions)

    def _put_outer_grads_aside(self, problem: BilevelProblem) -> None:
        self._outer_grads = [(p, p.grad) for p in problem.outer_parameters]
        for p in problem.outer_parameters:
            p.grad = None

    def put_outer_grads_back(self) -> None:
        for p, grad in self._outer_grads:
            p.grad = grad
        self._outer_grads = []

    def _check_made_inside(self, problem: BilevelProblem, nodes: Sequence[Any]) -> None:
        """RuntimeError where a part of the graph is older than the parameters that it came from."""
        levels = (
            (self.inner_moved, problem.inner_parameters),
            (self.outer_moved, problem.outer_parameters),
        )
        oldest = min((node._sequence_nr() for node in nodes), default=0)
        for (thread, moved), parameters in levels:
            if oldest >= moved or thread != threading.get_ident():
                continue
            if reaches(older(nodes, moved), parameters):
                raise RuntimeError(OUTSIDE)
