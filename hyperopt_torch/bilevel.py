"""The companion object that a training loop talks to."""

from __future__ import annotations

import copy
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ._default import default_estimator
from ._graph import graph_nodes, short_way_is_safe, without_parameter_hooks
from ._room import explained_shortage, shortage
from ._tensors import FlatLayout, inner_product, is_sharded
from .curvature import Curvature
from .distributed import Group, group_of, joined, packed, unpacked
from .errors import HypergradientError, HypergradientWarning, check_choice, check_number
from .estimators import BilevelProblem, HypergradientEstimator, ImplicitDifferentiation
from .estimators._moving import hook_zeros
from .estimators._trajectory import TrajectoryEstimator
from .estimators.base import all_facts
from .ihvp import IHVP
from .inner_optimizer import (
    Prober,
    StepHook,
    born_state,
    learned,
    needs_closure,
    parameters_of,
    plain,
    relink,
    unwrapped,
)
from .recording import (
    OUTSIDE,
    Evaluation,
    InnerObjective,
    Record,
    Recorder,
    TrainLoss,
    evaluate,
    older,
    reaches,
    sequence_number,
    settled,
)
from .report import SolveReport, Trouble


class BilevelOptimizer:
    """Adds hypergradient updates to a training loop; the optimizers, the model, the loop stay.

    Args:
        inner: the optimizer of the model's parameters θ; or several, ``[adamw, muon]``, which step
            together. Wrapped ones (accelerate, Lightning) may be passed as they are.
        outer: the optimizer of the parameters φ that the validation loss shall choose.
        ihvp: the strategy for (H + ρI)⁻¹ b; short for ``ImplicitDifferentiation(ihvp)``.
        estimator: how hypergradients are made; give this or ``ihvp``. Without both it is
            ``ImplicitDifferentiation(RecycledCG(window=20))``: three products a step and 49 vectors
            of the size of the inner parameters.
        curvature: what stands for the inner Hessian; goes with ``ihvp``. Default: ``Hessian()``
            where an ``ihvp`` is given; without one ``AutomaticCurvature()``, which is
            ``GaussNewton()`` as soon as the training closure returns ``(loss, outputs)``. On
            networks let it do so.
        grad_scaler: a ``torch.amp.GradScaler`` for the inner step, which is then scaled, unscaled,
            stepped and updated through it. Where losses compute in half precision, the products
            and the validation gradient are scaled by it as well, and divided again.
        max_grad_norm: the longest hypergradient that ``outer_step`` steps along; longer ones are
            shortened to it, as ``clip_grad_norm_`` does.
        on_trouble: what to do where the report says that a hypergradient is not to be trusted:
            "warn", the first time of each kind, by a :class:`HypergradientWarning`; "raise" a
            :class:`HypergradientError` before anything has moved; "ignore". A hypergradient that is
            not finite is never stepped along, whatever is chosen.
        self_check: whether the first hypergradient holds a product against differences of
            gradients, at the cost of two gradients.
        process_group: the processes that share the inner problem, each with all parameters and its
            own batch, whose union is meant: a ``torch.distributed`` group, or False where each
            solves its own. None: those of the ``DistributedDataParallel`` that the training closure
            calls; a RuntimeError where there are several processes and none is called.

    Raises:
        TypeError: ``inner`` or ``outer`` is no ``torch.optim.Optimizer``.
        ValueError: both ``ihvp`` and ``estimator``; an outer optimizer that needs a closure; a
            parameter on both levels; parameters on several devices.

    Example:
        >>> from hyperopt_torch import DenseSolve
        >>> w = torch.zeros((), requires_grad=True)       # inner: min (w - phi)^2 / 2
        >>> phi = torch.ones((), requires_grad=True)      # outer: min (w - 3)^2 / 2
        >>> optimizer = BilevelOptimizer(
        ...     torch.optim.SGD([w], lr=1.0), torch.optim.SGD([phi], lr=0.5), ihvp=DenseSolve()
        ... )
        >>> _ = optimizer.inner_step(lambda: (w - phi) ** 2 / 2)
        >>> _ = optimizer.outer_step((w - 3) ** 2 / 2)    # phi <- 1 + 0.5 * (3 - 1)
        >>> phi.item()
        2.0
    """

    def __init__(
        self,
        inner: Optimizer | Sequence[Optimizer],
        outer: Optimizer,
        ihvp: IHVP | None = None,
        *,
        estimator: HypergradientEstimator | None = None,
        curvature: Curvature | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
        max_grad_norm: float | None = None,
        on_trouble: str = "warn",
        self_check: bool = True,
        process_group: Any = None,
    ) -> None:
        several = isinstance(inner, (list, tuple))
        steppers: list[Optimizer] = list(inner) if several else [inner]  # type: ignore[list-item, arg-type]
        _check_optimizers(steppers, outer)
        if estimator is not None and (ihvp is not None or curvature is not None):
            raise ValueError(
                "Give either estimator, or ihvp (and curvature), which is short for "
                "estimator=ImplicitDifferentiation(ihvp, curvature)."
            )
        if estimator is not None and not isinstance(estimator, HypergradientEstimator):
            raise TypeError(
                f"estimator must be an object such as ImplicitDifferentiation(...); got "
                f"{estimator!r}. A strategy such as Nystrom() goes to ihvp=."
            )
        if grad_scaler is not None and not hasattr(grad_scaler, "unscale_"):
            raise TypeError(f"grad_scaler must be a torch.amp.GradScaler; got {grad_scaler!r}.")
        self.inner, self.outer = inner, outer
        if estimator is None and ihvp is None:
            estimator = default_estimator(curvature)
        self.estimator = estimator or ImplicitDifferentiation(ihvp, curvature)  # type: ignore[arg-type]
        self.grad_scaler = grad_scaler
        self.max_grad_norm = (
            None
            if max_grad_norm is None
            else check_number("max_grad_norm", max_grad_norm, positive=True)
        )
        self.on_trouble = check_choice("on_trouble", on_trouble, ("warn", "raise", "ignore"))
        self.self_check = bool(self_check)
        self.process_group = process_group
        self._steppers = steppers
        self._real = [unwrapped(optimizer) for optimizer in steppers]
        self._said: set[str] = set()
        self._listeners: list[Callable[[SolveReport, list[Tensor | None], Tensor], None]] = []
        self._steps = {"inner": 0, "outer": 0}
        self._inner_moved = self._outer_moved = (0, 0)  # by which thread, and when
        self._forget()
        problem = self.problem()
        self.estimator.check(problem)  # both check, before the first step
        self.estimator.claim(self)
        self._observes = self.estimator.observes
        self._line_search = any(map(needs_closure, self._real))
        self._device = problem.inner_parameters[0].device
        self._recorder = Recorder(self._device)
        self._watch_steps()

    def _forget(self) -> None:
        """Forgets which inner problem is under way."""
        self._pending: list[Record] = []  # micro-batches since the last step
        self._records: list[Record] = []  # those of the last step: the inner problem
        self._earlier: list[Record] = []  # those recorded before the step that is under way
        self._waiting = False  # until the closure that this step was given has been called
        self._unseen = False  # the loss of this step was a tensor: there is no closure
        self._outer_grads: list[tuple[Tensor, Tensor | None]] = []  # while the trainer runs
        self._weighed = False  # whether the memory of a solve was compared with what is free
        self._shared: tuple[bool, Group | None] | None = None  # whether modules were known, then
        self._versions: list[tuple[Tensor, int]] = []  # of gradients, after our own backward
        self._hook_zeros: dict[int, Tensor] = {}
        self._now: BilevelProblem | None = None  # while an inner step of ours is under way
        self._observing = True
        self._stepping: Optimizer | None = None
        # While an optimizer steps, the learned tensors in its groups are numbers.
        self._numbers: AbstractContextManager[None] | None = None
        self._stepped: set[int] = set()  # ids of the optimizers that took the recorded step

    # The inner level ----------------------------------------------------------------------------

    def record(self, closure: Callable[[], Any], weight: float | None = None) -> Tensor:
        """The training loss, its closure put on record: for loops that do the rest themselves.

        ::

            loss = bilevel.record(lambda: loss_fn(batch))
            accelerator.backward(loss)
            clip_grad_norm_(model.parameters(), 1.0); optimizer.step(); optimizer.zero_grad()
            bilevel.outer_step(val_loss())

        The closures recorded between two steps of the inner optimizer are micro-batches of one
        inner problem: their mean, or Σ weight·loss where weights are given. A step counts when it
        really happens, beneath scalers and wrappers.

        Args:
            closure: as for :meth:`inner_step`.
            weight: of this loss in the inner objective, as the backward passes weight it.

        Returns:
            The live loss, for the trainer's own ``backward()``.

        What that backward pass adds to the ``.grad`` of outer parameters is taken away again when
        the inner optimizer steps.
        """
        if not callable(closure):
            raise TypeError(
                "record needs a closure: loss = bilevel.record(lambda: loss_fn(batch)). The loss "
                "itself cannot be evaluated again."
            )
        if weight is not None:
            weight = check_number("weight", weight)
        problem = self.problem()
        if not self._pending and not self._outer_grads:
            self._put_outer_grads_aside(problem)
        evaluation = self._evaluate(problem, closure, weight)
        self._check_made_inside(problem, graph_nodes(evaluation.loss))
        return evaluation.loss

    def _evaluate(
        self, problem: BilevelProblem, closure: Callable[[], Any], weight: float | None = None
    ) -> Evaluation:
        inner, outer = problem.inner_parameters, problem.outer_parameters
        evaluation, record = self._recorder.call(closure, inner, outer, weight)
        self._pending.append(record)
        self._before_backward(problem, evaluation)
        return evaluation

    def _before_backward(self, problem: BilevelProblem, evaluation: Evaluation) -> None:
        inside = self._stepping is not None and len(self._pending) - len(self._earlier)
        again = self._line_search and inside > 1  # an evaluation that the trainer's closure made
        if self._observes and self._observing and not again:
            problem.group = self._group(self._pending)
            problem.begins = len(self._pending) <= 1
            with problem.explained_training_errors():
                self.estimator.before_backward(problem, evaluation)

    def inner_step(self, train_loss: TrainLoss) -> Tensor:
        """One step of the inner optimizer, bit for bit the plain ``zero_grad, backward, step``.

        Args:
            train_loss: a closure that returns the training loss (scalar; or (B,) per-sample
                losses, whose mean is meant; or ``PerSample(losses, weights, penalty)``; or
                ``(loss, outputs)``) and does not call ``backward()``. It goes on record, and is
                evaluated again by :meth:`outer_step`, in the world that it finds now: variables,
                modes of modules, buffers, random streams. A loss tensor works too; then
                :meth:`outer_step` must be given the training loss.

        Returns:
            The loss, detached.

        Raises:
            RuntimeError: the closure called ``backward()``; or the optimizer did not step, as under
                gradient accumulation, for which there is :meth:`record`.

        Only the inner parameters get a ``.grad``; those of the outer ones are left as found.
        """
        self._now = problem = self.problem()
        self._notice_late_clipping()
        self._pending.clear()
        if self._line_search:
            loss = self._closure_step(problem, train_loss)
        else:
            loss = self._backward(problem, train_loss)
            if self.grad_scaler is not None:
                for optimizer in self._steppers:
                    self.grad_scaler.unscale_(optimizer)
            self._note_gradients(problem)
            self._step_inner()
            self._notice_no_step()
        self._now = None
        self._steps["inner"] += 1
        self._note_gradients(problem)
        return loss

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
            scaled = loss if self.grad_scaler is None else self.grad_scaler.scale(loss)
            inner, outer = problem.inner_parameters, problem.outer_parameters
            # Past φ where that is proved to be the same.
            short = short_way_is_safe(nodes, inner, outer)
            with problem.explained_training_errors():
                scaled.backward(inputs=inner if short else None)  # type: ignore[no-untyped-call]
        finally:
            self._put_outer_grads_back()
        return loss.detach()

    def _step_inner(self) -> None:
        for optimizer in self._steppers:
            if self.grad_scaler is None:
                optimizer.step()
            else:
                self.grad_scaler.step(optimizer)
        if self.grad_scaler is not None:
            self.grad_scaler.update()

    def _closure_step(self, problem: BilevelProblem, train_loss: TrainLoss) -> Tensor:
        """For optimizers such as LBFGS, which evaluate the loss as often as they like."""
        if not callable(train_loss):
            raise TypeError(f"{problem.name} needs a closure: inner_step(lambda: train_loss(...)).")
        if self.grad_scaler is not None:
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
            bilevel = me()
            if bilevel is not None:
                bilevel._before_step(optimizer, closure)

        def after(optimizer: Optimizer, closure: bool) -> None:
            bilevel = me()
            if bilevel is not None:
                bilevel._after_step(optimizer)

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
        self._waiting = closure and isinstance(self.estimator, ImplicitDifferentiation)
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
        if self._pending:  # a closure that the trainer gave it was called inside of the step
            if isinstance(self.estimator, TrajectoryEstimator):
                raise RuntimeError(
                    f"{self.estimator!r} needs the parameters as they were before the step, but "
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
        self._inner_moved = threading.get_ident(), sequence_number()
        if self._records and self._observes and id(optimizer) in self._stepped:
            self.estimator.stepped(self.problem())

    def _close_numbers(self) -> None:
        numbers, self._numbers = self._numbers, None
        if numbers is not None:
            numbers.__exit__(None, None, None)

    def _commit(self) -> None:
        self._put_outer_grads_back()
        self._records = list(self._pending)
        self._pending.clear()
        self._unseen = False
        self._stepped = set()
        problem = self._now or self.problem()
        self._hook_zeros = hook_zeros(problem.inner_parameters)
        if self._observes:
            problem.untouched = bool(self._versions) and not self._written()
            self.estimator.observe(problem, self._records)

    def _notice_no_step(self) -> None:
        """What was recorded is still pending: no optimizer stepped."""
        if not self._pending:
            return
        skipped = self.grad_scaler is not None or any(
            getattr(optimizer, "step_was_skipped", False) for optimizer in self._steppers
        )
        if not skipped:
            raise RuntimeError(
                "inner_step: the inner optimizer did not step; does a wrapper accumulate "
                "gradients? Each inner_step begins with zero_grad(), so the gradients of earlier "
                "micro-batches would be lost. Use loss = bilevel.record(closure) and keep the "
                "loop's own backward, step and zero_grad."
            )
        self._records = list(self._pending)  # the problem is the same, only the step was skipped
        self._pending.clear()
        if self._observes:
            self.estimator.skipped(self.problem(), self._records)

    def _notice_late_clipping(self) -> None:
        """Gradients written to after the step in which they served."""
        if self._written():
            self._say(
                Trouble(
                    "late_gradient_change",
                    "the gradients were changed after inner_step, which has stepped already: "
                    "clipping there has no effect. Use loss = bilevel.record(closure) and keep the "
                    "loop's own backward, clipping and step",
                )
            )
        self._versions = []

    def _note_gradients(self, problem: BilevelProblem) -> None:
        grads = [p.grad for p in problem.inner_parameters]
        self._versions = [(g, g._version) for g in grads if g is not None]

    def _written(self) -> bool:
        """Whether gradients were written to since :meth:`_note_gradients`."""
        return any(g._version != version for g, version in self._versions)

    def _put_outer_grads_aside(self, problem: BilevelProblem) -> None:
        self._outer_grads = [(p, p.grad) for p in problem.outer_parameters]
        for p in problem.outer_parameters:
            p.grad = None

    def _put_outer_grads_back(self) -> None:
        for p, grad in self._outer_grads:
            p.grad = grad
        self._outer_grads = []

    def _check_made_inside(self, problem: BilevelProblem, nodes: Sequence[Any]) -> None:
        """RuntimeError where a part of the graph is older than the parameters that it came from."""
        levels = (
            (self._inner_moved, problem.inner_parameters),
            (self._outer_moved, problem.outer_parameters),
        )
        oldest = min((node._sequence_nr() for node in nodes), default=0)
        for (thread, moved), parameters in levels:
            if oldest >= moved or thread != threading.get_ident():
                continue
            if reaches(older(nodes, moved), parameters):
                raise RuntimeError(OUTSIDE)

    # Between the levels -------------------------------------------------------------------------

    def start_from(self, initial: Iterable[Tensor]) -> None:
        """Starts a new inner problem at the given outer parameters: θ ← φ, as in MAML.

        Args:
            initial: outer parameters, one for each inner parameter, of the same shape, in the order
                of the inner optimizer; such as ``meta_model.parameters()``.

        The inner optimizer's state is cleared. ``Unrolled`` and ``PZOBO`` let the hypergradient
        flow to the starting point; implicit differentiation knows only what enters the training
        loss, such as a proximal term (iMAML).

        Raises:
            ValueError: the tensors are not in the outer optimizer, or do not fit.
        """
        initial = list(initial)
        problem = self.problem()
        shapes = [tuple(p.shape) for p in problem.inner_parameters]
        if [tuple(t.shape) for t in initial] != shapes:
            raise ValueError(
                f"start_from needs one tensor for each of the {len(shapes)} trainable inner "
                f"parameters, of the same shape and in the same order; got {len(initial)}: "
                f"{[tuple(t.shape) for t in initial]} for {shapes}."
            )
        outer = {id(p) for p in problem.outer_parameters}
        if any(id(t) not in outer for t in initial):
            raise ValueError(
                "start_from needs parameters of the outer optimizer: there is a tensor that is not "
                "in it. To start from a constant, copy it into the model and call reset()."
            )
        with torch.no_grad():
            for p, t in zip(problem.inner_parameters, initial, strict=True):
                p.copy_(t)
        for optimizer in self._real:
            optimizer.state.clear()
            for group in optimizer.param_groups:
                for p in group["params"]:
                    born = born_state(optimizer, p, group)
                    if born:
                        optimizer.state[p] = born
        self._forget()
        self._inner_moved = threading.get_ident(), sequence_number()
        self.estimator.begin(initial)

    # The outer level ----------------------------------------------------------------------------

    def outer_step(
        self,
        val_loss: Tensor | list[Callable[[], Tensor]],
        train_loss: TrainLoss | None = None,
        *,
        averaged: Iterable[Tensor] | None = None,
    ) -> Tensor:
        """One step of the outer optimizer along the hypergradient of ``val_loss``.

        Args:
            val_loss: scalar, computed from the current inner parameters, its graph alive (it is
                freed, as by ``backward()``). Or a list of closures, one for each micro-batch, whose
                mean is meant: one graph is alive at a time.
            train_loss: the training loss at the current parameters, tensor, closure or list of
                closures, in the world as it is; default: the closures on record of the last inner
                step, in theirs.
            averaged: where ``val_loss`` was computed with an average of the inner parameters (EMA,
                SWA): its tensors, one for each inner parameter, in their order.

        Returns:
            The validation loss, detached.

        Replaces the ``.grad`` of the outer parameters. Inner parameters, their ``.grad``, the
        inner optimizer's state, module buffers and the RNG stream stay bitwise as they are. Where
        the hypergradient is not finite, outer parameters and optimizer stay as they are, too.
        """
        value, hypergradient = self._estimate(val_loss, train_loss, averaged)
        for p, g in hypergradient:
            p.grad = g
        if self._check_report():
            if self.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_([p for p, _ in hypergradient], self.max_grad_norm)
            self.outer.step()
            self._outer_moved = threading.get_ident(), sequence_number()
        self.estimator.restart()
        self._steps["outer"] += 1
        for listener in self._listeners:
            listener(self.report, [g for _, g in hypergradient], value)
        return value

    def accumulate(
        self,
        val_loss: Tensor | list[Callable[[], Tensor]],
        train_loss: TrainLoss | None = None,
        *,
        averaged: Iterable[Tensor] | None = None,
    ) -> Tensor:
        """Adds the hypergradient to the outer ``.grad``, as ``backward()`` would.

        For many tasks or validation batches a step: ``outer.zero_grad()``, ``accumulate`` for
        each, ``outer.step()``. Arguments and return value as for :meth:`outer_step`. What is not
        finite is added as it is, and said.
        """
        value, hypergradient = self._estimate(val_loss, train_loss, averaged)
        for p, g in hypergradient:
            if g is not None:
                p.grad = g if p.grad is None else p.grad + g
        if self.on_trouble != "ignore":
            self._check_report()
        self.estimator.finish()
        return value

    def hypergradient(
        self,
        val_loss: Tensor | list[Callable[[], Tensor]],
        train_loss: TrainLoss | None = None,
        *,
        averaged: Iterable[Tensor] | None = None,
    ) -> tuple[Tensor | None, ...]:
        """The hypergradient itself, one tensor for each outer parameter; changes nothing.

        None where a parameter is frozen or has no influence. The graph of ``val_loss`` survives,
        and so does the memory of the strategy; :attr:`report` is that of this query.
        """
        with self.estimator.on_loan():
            _, pairs = self._estimate(val_loss, train_loss, averaged, keep_outer_graph=True)
        found = {id(p): g for p, g in pairs}
        return tuple(found.get(id(p)) for p in parameters_of(self.outer))

    def on_outer_step(
        self, listener: Callable[[SolveReport, list[Tensor | None], Tensor], None]
    ) -> None:
        """Calls ``listener(report, hypergradient, val_loss)`` after each outer step, for logs."""
        self._listeners.append(listener)

    def problem(self) -> BilevelProblem:
        """The two levels as an estimator sees them, without an objective."""
        return BilevelProblem(self._real, self.outer)

    def inner_facts(self) -> tuple[float, list[float]]:
        """(sign, λ for each inner parameter): the inner optimizers rest at sign·∇f + λθ = 0."""
        facts = all_facts(Prober(), self.problem())
        return facts.sign, facts.decay

    def _objective(self, train_loss: TrainLoss | None) -> InnerObjective | None:
        if train_loss is not None:
            return InnerObjective.given(train_loss, self._device)
        return InnerObjective.on_record(self._records, self._device) if self._records else None

    def _estimate(
        self,
        val_loss: Tensor | list[Callable[[], Tensor]],
        train_loss: TrainLoss | None,
        averaged: Iterable[Tensor] | None,
        keep_outer_graph: bool = False,
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor | None]]]:
        if isinstance(val_loss, list) and not (val_loss and all(map(callable, val_loss))):
            raise TypeError(
                "A list for the validation loss must hold closures, one for each micro-batch."
            )
        self._put_outer_grads_back()
        problem = BilevelProblem(
            self._real,
            self.outer,
            self._objective(train_loss),
            keep_outer_graph=keep_outer_graph,
            averaged=None if averaged is None else list(averaged),
            scale=self._scale(),
            hook_zeros=self._hook_zeros,
            self_check=self.self_check,
            reader=self._recorder.reader,
            group=self._group(self._records),
        )
        parameters = [*problem.inner_parameters, *problem.outer_parameters]
        n = FlatLayout(problem.inner_parameters).n
        vectors = self.estimator.vectors
        if not self._weighed and vectors is not None and self.on_trouble != "ignore":
            self._weighed = True
            lack = shortage(vectors, n, FlatLayout(problem.inner_parameters).dtype, self._device)
            if lack is not None:
                warnings.warn(lack, HypergradientWarning, stacklevel=3)
        with (
            explained_shortage(vectors, n),
            settled(),
            torch.enable_grad(),
            without_parameter_hooks(parameters),
        ):
            if isinstance(val_loss, list):
                val_loss = problem.mean_of(val_loss, plain=self.estimator.first_order)
            found = self.estimator.estimate(problem, val_loss)
        assert self.estimator.report is not None
        self.estimator.report, found = judged(self.estimator.report, found, val_loss)
        return val_loss.detach(), list(zip(problem.outer_parameters, found, strict=True))

    def _group(self, records: Sequence[Record]) -> Group | None:
        """The processes that share the inner problem; known since its modules were called."""
        modules = [module for record in records for module in record.modules]
        if self._shared is None or self._shared[0] != bool(modules):
            problem = self.problem()
            group = group_of(
                self.process_group, modules, problem.inner_parameters, problem.outer_parameters
            )
            if group is not None and not self.estimator.averages:
                raise RuntimeError(
                    f"{type(self.estimator).__name__} does not average over processes: each would "
                    "get another hypergradient. Use ImplicitDifferentiation(...), or one process."
                )
            self._shared = bool(modules), group
        if self._shared[1] is not None:
            self._shared[1].check()
        return self._shared[1]

    def _scale(self) -> Tensor | None:
        if self.grad_scaler is None or not self.grad_scaler.is_enabled():
            return None
        one = torch.ones((), device=self._device)
        return torch.as_tensor(self.grad_scaler.scale(one))

    def _check_report(self) -> bool:
        """Whether to step along the last hypergradient; says what is wrong. One sync."""
        report = self.report
        if self._device.type == "meta":  # nothing has a value there
            return True
        troubles = [] if self.on_trouble == "ignore" else report.troubles()
        finite = bool(report.finite)
        if not finite:
            self.estimator.recover()
        if troubles and self.on_trouble == "raise":
            raise HypergradientError("; ".join(trouble.text for trouble in troubles))
        for trouble in troubles:
            self._say(trouble)
        return finite

    def _say(self, trouble: Trouble) -> None:
        """Once of each kind."""
        if self.on_trouble == "ignore" or trouble.kind in self._said:
            return
        self._said.add(trouble.kind)
        warnings.warn(
            f"{trouble.text}. [{trouble.kind}: said once; bilevel.report.trouble() tells it for "
            "every step, on_trouble= changes that]",
            HypergradientWarning,
            stacklevel=4,
        )

    @property
    def report(self) -> SolveReport:
        """What the last hypergradient cost and whether to trust it.

        Raises:
            RuntimeError: there was none yet.
        """
        if self.estimator.report is None:
            raise RuntimeError("There is no report yet: call outer_step(val_loss) first.")
        return self.estimator.report

    def reset(self) -> None:
        """Forgets what the strategy has learned and the last closure: for a new inner problem."""
        self.estimator.reset()
        self._forget()

    def state_dict(self) -> dict[str, Any]:
        """Both optimizers, the estimator's memory, the counters; not the ``grad_scaler``.

        A snapshot: later steps do not change it. Holds tensors and plain values only: loads with
        ``torch.load(..., weights_only=True)``. Closures are not saved: after loading, an inner
        step comes before the next outer step.

        Where the inner parameters are in parts over several processes, it is what this one holds,
        as one entry: save it with ``torch.distributed.checkpoint``, load it by as many processes.
        """
        state = {
            "inner": [copy.deepcopy(optimizer.state_dict()) for optimizer in self._real],
            "outer": copy.deepcopy(self.outer.state_dict()),
            "estimator": self.estimator.state_dict(),
            "steps": dict(self._steps),
        }
        first = self.problem().inner_parameters[0]
        return packed(state, first) if is_sharded(first) else state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` gave; the run then continues bit for bit.

        Raises:
            ValueError: it is no such dict, or of other optimizers or another strategy; nothing has
                been changed then.
        """
        first = self.problem().inner_parameters[0]
        if is_sharded(first):
            state_dict = unpacked(state_dict, first)
            states = zip(state_dict["inner"], self._real, strict=True)
            state_dict = {**state_dict, "inner": [joined(state, o) for state, o in states]}
        inner = _checked_state(state_dict, self._real, self.outer)
        self.estimator.load_state_dict(state_dict["estimator"])  # first: it may refuse
        # torch's optimizers share tensors with what they load, and would move a checkpoint.
        for optimizer, state in zip(self._real, inner, strict=True):
            before = [dict(group) for group in optimizer.param_groups]
            optimizer.load_state_dict(copy.deepcopy(state))
            relink(optimizer.param_groups, before)
        self.outer.load_state_dict(copy.deepcopy(state_dict["outer"]))
        self.estimator.restart()
        self._steps = dict(state_dict["steps"])
        self._forget()

    def __getstate__(self) -> Any:
        raise TypeError(
            "A BilevelOptimizer cannot be pickled or copied: it holds live optimizers and hooks. "
            "Save bilevel.state_dict(), and load it into a new BilevelOptimizer."
        )

    def __repr__(self) -> str:
        settings = {
            "inner": " + ".join(type(optimizer).__name__ for optimizer in self._steppers),
            "outer": type(self.outer).__name__,
            "estimator": repr(self.estimator),
            "grad_scaler": self.grad_scaler and type(self.grad_scaler).__name__,
            "max_grad_norm": self.max_grad_norm,
            "on_trouble": repr(self.on_trouble),
        }
        told = ", ".join(f"{name}={value}" for name, value in settings.items() if value is not None)
        return f"{type(self).__name__}({told})"


def _check_optimizers(inner: Sequence[Any], outer: Any) -> None:
    """Raises unless all are optimizers that can serve at their level."""
    if not inner:
        raise ValueError("inner is empty: give the optimizer of the model's parameters.")
    for name, optimizer in [*(("inner", o) for o in inner), ("outer", outer)]:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"{name} must be a torch.optim.Optimizer; got {type(optimizer).__name__}. Pass "
                "for example torch.optim.SGD(model.parameters(), lr=0.1)."
            )
    if needs_closure(outer):
        raise ValueError(
            f"{type(outer).__name__} cannot be the outer optimizer: it evaluates its loss "
            "several times a step, and each evaluation would be a whole bilevel solve. Use "
            "for example torch.optim.Adam or torch.optim.SGD."
        )
    if len(inner) > 1 and any(map(needs_closure, inner)):
        raise ValueError(
            "An inner optimizer that evaluates the loss itself, such as LBFGS, cannot step "
            "together with others."
        )


def _checked_state(
    state_dict: Mapping[str, Any], inner: Sequence[Optimizer], outer: Optimizer
) -> list[Any]:
    """The states of the inner optimizers; ValueError where the dict does not fit."""
    advice = "Give what BilevelOptimizer.state_dict() returned, of the same optimizers."
    missing = [k for k in ("inner", "outer", "estimator", "steps") if k not in state_dict]
    if missing:
        raise ValueError(f"The state has no {', '.join(map(repr, missing))}. {advice}")
    states = state_dict["inner"]
    states = [states] if isinstance(states, Mapping) else list(states)
    if len(states) != len(inner):
        raise ValueError(
            f"The state is of {len(states)} inner optimizer(s), not of {len(inner)}. {advice}"
        )
    for optimizer, state in [*zip(inner, states, strict=True), (outer, state_dict["outer"])]:
        groups = state.get("param_groups", ()) if isinstance(state, Mapping) else ()
        sizes = [len(group["params"]) for group in groups]
        expected = [len(group["params"]) for group in optimizer.param_groups]
        if sizes != expected:
            raise ValueError(
                f"The state of {type(optimizer).__name__} has parameter groups of {sizes}, the "
                f"optimizer of {expected}. {advice}"
            )
    return states


def judged(
    report: SolveReport, hypergradient: list[Tensor | None], val_loss: Tensor
) -> tuple[SolveReport, list[Tensor | None]]:
    """Whether all is finite, on record; what is not leaves no finite hypergradient behind."""
    parts = [g for g in hypergradient if g is not None]
    norm = torch.stack([inner_product(g.flatten(), g.flatten()) for g in parts]).sum().sqrt()
    sizes = (
        *(norm, report.loss, report.rhs_norm, report.solution_norm),
        *(report.inner_gradient_norm, report.residual, report.growth),
    )
    known = [s.to(norm) for s in sizes if s is not None]
    zero = torch.stack([*known, val_loss.detach().to(norm)]).sum() * 0  # NaN, if one of them is not
    report = replace(report, hypergradient_norm=norm + zero, finite=zero == 0)
    return report, [None if g is None else g + zero.to(g.dtype) for g in hypergradient]
