"""The companion object that a training loop talks to."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .curvature import Curvature
from .estimators import BilevelProblem, HypergradientEstimator, ImplicitDifferentiation
from .ihvp import IHVP, RecycledCG
from .inner_optimizer import needs_closure, parameters_of, plain, relink
from .recording import TrainLoss, evaluate, without_side_effects
from .report import SolveReport


class BilevelOptimizer:
    """Adds hypergradient updates to a training loop; the optimizers, the model, the loop stay.

    Args:
        inner: the optimizer of the model's parameters θ.
        outer: the optimizer of the parameters φ that the validation loss shall choose.
        ihvp: the strategy for (H + ρI)⁻¹ b; short for ``ImplicitDifferentiation(ihvp)``.
        estimator: how hypergradients are made; give this or ``ihvp``. Without both it is
            ``ImplicitDifferentiation(RecycledCG(window=20))``: three products a step and 44 vectors
            of the size of the inner parameters.
        curvature: what stands for the inner Hessian; goes with ``ihvp``. Default: ``Hessian()``.
        grad_scaler: a ``torch.amp.GradScaler`` for the inner step, which is then scaled, unscaled,
            stepped and updated through it. Hypergradients are not scaled.

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
        inner: Optimizer,
        outer: Optimizer,
        ihvp: IHVP | None = None,
        *,
        estimator: HypergradientEstimator | None = None,
        curvature: Curvature | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        for name, optimizer in (("inner", inner), ("outer", outer)):
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
        self.estimator = estimator or ImplicitDifferentiation(
            RecycledCG(window=20) if ihvp is None else ihvp, curvature
        )
        self.grad_scaler = grad_scaler
        self._inner_needs_closure = needs_closure(inner)
        self._closure: TrainLoss | None = None
        self._steps = {"inner": 0, "outer": 0}
        self.estimator.check(BilevelProblem(inner, outer))  # both check, before the first step

    def inner_step(self, train_loss: TrainLoss) -> Tensor:
        """One step of the inner optimizer, bit for bit the plain ``zero_grad, backward, step``.

        Args:
            train_loss: a closure that returns the training loss (scalar; or (B,) per-sample
                losses, whose mean is meant; or ``PerSample(losses, weights, penalty)``; or
                ``(loss, outputs)``) and does not call ``backward()``. It is kept, and called again
                by :meth:`outer_step`. A loss tensor works too; then :meth:`outer_step` must be
                given the training loss.

        Returns:
            The loss, detached.

        Only the inner parameters get a ``.grad``; those of the outer ones are not touched.
        """
        self._closure = train_loss if callable(train_loss) else None
        problem = BilevelProblem(self.inner, self.outer, train_loss)
        if self._inner_needs_closure:
            loss = self._closure_step(problem, train_loss)
        else:
            loss = self._backward(problem, train_loss, self.estimator.observes)
            self._step_inner()
        self._steps["inner"] += 1
        return loss

    def _backward(self, problem: BilevelProblem, train_loss: TrainLoss, observed: bool) -> Tensor:
        self.inner.zero_grad()
        clear = all(p.grad is None for p in problem.inner_parameters)
        with self.estimator.recording(problem) if observed else nullcontext():
            evaluation = evaluate(train_loss)
        if clear and any(p.grad is not None for p in problem.inner_parameters):
            raise RuntimeError(
                "The training closure called backward() itself; it must only compute and return "
                "the loss: inner_step does the rest."
            )
        loss = evaluation.loss
        scaled = loss if self.grad_scaler is None else self.grad_scaler.scale(loss)
        with problem.explained_training_errors():
            if observed:
                self.estimator.before_backward(problem, evaluation)
            scaled.backward(inputs=problem.inner_parameters)  # type: ignore[no-untyped-call]
        if observed:
            if self.grad_scaler is not None:
                self.grad_scaler.unscale_(self.inner)
            self.estimator.observe(problem)
        return loss.detach()

    def _step_inner(self) -> None:
        with plain(self.inner):
            if self.grad_scaler is None:
                self.inner.step()
            else:
                self.grad_scaler.step(self.inner)
                self.grad_scaler.update()

    def _closure_step(self, problem: BilevelProblem, train_loss: TrainLoss) -> Tensor:
        """For optimizers such as LBFGS, which evaluate the loss as often as they like."""
        name = type(self.inner).__name__
        if not callable(train_loss):
            raise TypeError(f"{name} needs a closure: inner_step(lambda: train_loss(...)).")
        if self.grad_scaler is not None:
            raise ValueError(f"{name} does not work with a grad_scaler.")
        first = True

        def evaluation() -> Tensor:
            nonlocal first
            loss = self._backward(problem, train_loss, first and self.estimator.observes)
            first = False
            return loss

        with plain(self.inner):
            loss: Tensor = self.inner.step(evaluation)  # type: ignore[arg-type, assignment]
        return loss.detach()

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
        problem = BilevelProblem(self.inner, self.outer)
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
        self.inner.state.clear()
        self._closure = None
        self.estimator.begin(initial)

    def outer_step(self, val_loss: Tensor, train_loss: TrainLoss | None = None) -> Tensor:
        """One step of the outer optimizer along the hypergradient of ``val_loss``.

        Args:
            val_loss: scalar, computed from the current inner parameters, its graph alive (it is
                freed, as by ``backward()``).
            train_loss: the training loss at the current parameters, tensor or closure; default:
                the closure of the last :meth:`inner_step`.

        Returns:
            The validation loss, detached.

        Replaces the ``.grad`` of the outer parameters. Inner parameters, their ``.grad``, the
        inner optimizer's state, module buffers and the RNG stream stay bitwise as they are.
        """
        for p, g in self._estimate(val_loss, train_loss):
            p.grad = g
        self.outer.step()
        self.estimator.restart()
        self._steps["outer"] += 1
        return val_loss.detach()

    def accumulate(self, val_loss: Tensor, train_loss: TrainLoss | None = None) -> Tensor:
        """Adds the hypergradient to the outer ``.grad``, as ``backward()`` would.

        For many tasks or validation batches a step: ``outer.zero_grad()``, ``accumulate`` for
        each, ``outer.step()``. Arguments and return value as for :meth:`outer_step`.
        """
        for p, g in self._estimate(val_loss, train_loss):
            if g is not None:
                p.grad = g if p.grad is None else p.grad + g
        self.estimator.finish()
        return val_loss.detach()

    def hypergradient(
        self, val_loss: Tensor, train_loss: TrainLoss | None = None
    ) -> tuple[Tensor | None, ...]:
        """The hypergradient itself, one tensor for each outer parameter; changes nothing.

        None where a parameter is frozen or has no influence. The graph of ``val_loss`` survives,
        and so does the memory of the strategy; :attr:`report` is that of this query.
        """
        memory = self.estimator.state_dict()
        try:
            pairs = self._estimate(val_loss, train_loss, keep_outer_graph=True)
        finally:
            self.estimator.load_state_dict(memory)
        found = {id(p): g for p, g in pairs}
        return tuple(found.get(id(p)) for p in parameters_of(self.outer))

    def _estimate(
        self, val_loss: Tensor, train_loss: TrainLoss | None, keep_outer_graph: bool = False
    ) -> list[tuple[Tensor, Tensor | None]]:
        train_loss = self._closure if train_loss is None else train_loss
        problem = BilevelProblem(self.inner, self.outer, train_loss, keep_outer_graph)
        with torch.enable_grad(), without_side_effects(problem.inner_parameters[0].device):
            hypergradient = self.estimator.estimate(problem, val_loss)
        return list(zip(problem.outer_parameters, hypergradient, strict=True))

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
        self._closure = None

    def state_dict(self) -> dict[str, Any]:
        """Both optimizers, the estimator's memory, the counters; not the ``grad_scaler``.

        A snapshot: later steps do not change it. Holds tensors and plain values only: loads with
        ``torch.load(..., weights_only=True)``. Closures are not saved: after loading, an inner
        step comes before the next outer step.
        """
        return {
            "inner": copy.deepcopy(self.inner.state_dict()),
            "outer": copy.deepcopy(self.outer.state_dict()),
            "estimator": self.estimator.state_dict(),
            "steps": dict(self._steps),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` gave; the run then continues bit for bit."""
        self.estimator.load_state_dict(state_dict["estimator"])  # first: it may refuse
        # torch's optimizers share tensors with what they load, and would move a checkpoint.
        learned = [dict(group) for group in self.inner.param_groups]
        self.inner.load_state_dict(copy.deepcopy(state_dict["inner"]))
        relink(self.inner.param_groups, learned)
        self.outer.load_state_dict(copy.deepcopy(state_dict["outer"]))
        self.estimator.restart()
        self._steps = dict(state_dict["steps"])
        self._closure = None

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(inner={type(self.inner).__name__}, "
            f"outer={type(self.outer).__name__}, estimator={self.estimator!r})"
        )
