"""Hypergradients by the implicit function theorem."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._tensors import FlatLayout, inner_product
from ..curvature import Curvature, Hessian
from ..ihvp import IHVP, Solution
from ..ihvp.base import InnerStep
from ..inner_optimizer import learned
from ..operators import InnerGradient, LinearOperator, Shifted
from ..recording import Evaluation, without_side_effects
from ..report import SolveReport
from .base import BilevelProblem, HypergradientEstimator, combined

_BATCHED_ON_CPU = 4096  # parameters; from there on batching rows saves nothing there (measured)
_JUMP = 0.5  # a move of θ larger than half of its norm is a replacement, not a step


class ImplicitDifferentiation(HypergradientEstimator):
    """dg/dφ = ∂g/∂φ - Jᵀ(H + ρI)⁻¹ ∂g/∂θ, with one graph of ∇f for all products.

    Args:
        ihvp: the strategy for the linear system.
        curvature: what stands for H; the exact Hessian by default.

    Raises:
        TypeError: ``ihvp`` or ``curvature`` is something else (a class instead of an object, say).

    The inner problem is the one that the inner optimizer solves: where it has a weight decay of its
    own, added to the gradient, H includes it.

    Cost: one outer gradient, one inner gradient whose graph is kept, and the products of the
    strategy. A strategy that does not bring Jᵀx along gets it from one more joint product, which
    also gives the true residual for the report.
    """

    def __init__(self, ihvp: IHVP, curvature: Curvature | None = None) -> None:
        if not isinstance(ihvp, IHVP):
            raise TypeError(f"ihvp must be a strategy object such as Nystrom(); got {ihvp!r}.")
        if curvature is not None and not isinstance(curvature, Curvature):
            raise TypeError(f"curvature must be an object such as Hessian(); got {curvature!r}.")
        self.ihvp = ihvp
        self.curvature = curvature or Hessian()
        self._theta: Tensor | None = None  # of the last estimate, for a strategy that follows θ
        # What before_backward knows of the step that observe will hand on.
        self._step: Callable[[Tensor], InnerStep] = InnerStep

    @property
    def observes(self) -> bool:
        return self.ihvp.observes

    def check(self, problem: BilevelProblem) -> None:
        _check_no_hyperparameter(problem)

    def before_backward(self, problem: BilevelProblem, evaluation: Evaluation) -> None:
        parameters, losses = problem.inner_parameters, evaluation.per_sample
        layout = FlatLayout(parameters)
        chosen = [] if losses is None else self.ihvp.samples_wanted(len(losses))
        rows = None
        if chosen:
            # Activation checkpointing runs modules again, which must not show.
            with without_side_effects(layout.device):
                rows = _sample_rows(evaluation, parameters, layout, chosen)
        self._step = partial(
            InnerStep,
            batch_size=evaluation.batch_size,
            weights=None if evaluation.weights is None else evaluation.weights.detach(),
            chosen=chosen,
            chosen_rows=rows,
        )

    def observe(self, problem: BilevelProblem) -> None:
        parameters = problem.inner_parameters
        gradient = FlatLayout(parameters).flatten([p.grad for p in parameters])
        step, self._step = self._step(gradient), InnerStep
        with torch.no_grad():
            self.ihvp.observe(step)

    def estimate(self, problem: BilevelProblem, outer_loss: Tensor) -> list[Tensor | None]:
        self.check(problem)
        # b and c first: evaluating the closure may bump versions that the outer graph has saved.
        b_parts, direct = problem.outer_gradients(outer_loss)
        evaluation = problem.evaluate_train_loss()
        with problem.explained_training_errors():
            inner_gradient = InnerGradient(
                evaluation.loss,
                problem.inner_parameters,
                problem.outer_parameters,
                evaluation.outputs,
            )
        layout = inner_gradient.layout
        decay = _weight_decay(problem, layout)
        if self.ihvp.observes and not (evaluation.penalty is None and decay is None):
            curvature = _mean_curvature(evaluation.penalty, problem.inner_parameters, layout)
            self.ihvp.observe_penalty(curvature if decay is None else curvature + decay.mean())
        self._notice_jump(layout.flatten([p.detach() for p in problem.inner_parameters]))
        b = layout.flatten(b_parts)
        operator = self.curvature.operator(inner_gradient)
        with torch.no_grad():
            if decay is not None:
                operator = Shifted(operator, decay)
            solution, cross = self._solve(operator, b)
        gradient = inner_gradient.gradient
        if decay is not None:
            theta = layout.flatten([p.detach() for p in problem.inner_parameters])
            gradient = gradient + decay * theta
        self.report = self._report(solution, operator, b, gradient)
        parts = inner_gradient.outer_layout.unflatten(-cross)
        return combined(
            direct,
            parts,
            inner_gradient.reached,
            "The training loss depends on none of the outer parameters, so the hypergradient is "
            "the direct term ∂g/∂φ alone. Implicit differentiation cannot tune what does not enter "
            "the training loss.",
        )

    def _notice_jump(self, theta: Tensor) -> None:
        """Resets a strategy that follows a path where θ was replaced under it: one sync."""
        if not self.ihvp.follows:
            return
        last, self._theta = self._theta, theta.clone()
        if last is not None and last.shape == theta.shape and last.device == theta.device:
            size = torch.maximum(inner_product(last, last), inner_product(theta, theta))
            if bool(inner_product(theta - last, theta - last) > _JUMP**2 * size):
                self.ihvp.reset()

    def _solve(self, operator: LinearOperator, b: Tensor) -> tuple[Solution, Tensor]:
        found = self.ihvp.solve(operator, b)
        solution = found if isinstance(found, Solution) else Solution(found)
        if solution.cross is not None:
            return solution, solution.cross
        Hx, cross = operator.joint(solution.x)
        r = b - Hx - self.ihvp.damping * solution.x
        return replace(solution, residual=_relative(operator, r, b)), cross

    def _report(
        self, solution: Solution, operator: LinearOperator, b: Tensor, gradient: Tensor
    ) -> SolveReport:
        def norm(x: Tensor) -> Tensor:
            return operator.inner(x, x).sqrt()

        return SolveReport(
            strategy=repr(self.ihvp),
            matvecs=operator.matvecs,
            rhs_norm=norm(b),
            solution_norm=norm(solution.x),
            inner_gradient_norm=norm(gradient),
            residual=solution.residual,
            rank=solution.rank,
            negative_curvature=solution.negative_curvature,
            converged=solution.converged,
            notes=solution.notes,
        )

    def reset(self) -> None:
        self.ihvp.reset()
        self._theta = None

    def state_dict(self) -> dict[str, Any]:
        theta = None if self._theta is None else self._theta.clone()
        return {"ihvp": self.ihvp.state_dict(), "theta": theta}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.ihvp.load_state_dict(state_dict["ihvp"])
        theta = state_dict["theta"]
        self._theta = None if theta is None else theta.clone()


def _sample_rows(
    evaluation: Evaluation, parameters: list[Tensor], layout: FlatLayout, chosen: Sequence[int]
) -> Tensor:
    """(m, n) rows √w_i ∇ℓ_i for the chosen samples; a negative weight counts as zero.

    One backward pass a row, through the graph of the whole batch: the losses share it.
    """
    losses, weights = evaluation.per_sample, evaluation.weights
    assert losses is not None
    index = torch.tensor(chosen, device=losses.device)
    seeds = torch.zeros(len(chosen), len(losses), dtype=losses.dtype, device=losses.device)
    root = torch.ones_like(losses) if weights is None else weights.detach().clamp(min=0).sqrt()
    root = root.to(losses.dtype).index_select(0, index)
    seeds.scatter_(1, index[:, None], root[:, None])

    def pull(seed: Tensor, batched: bool) -> Tensor:
        grads = torch.autograd.grad(
            losses, parameters, seed, retain_graph=True, allow_unused=True, is_grads_batched=batched
        )
        return layout.flatten(grads, batched=batched)

    if layout.n <= _BATCHED_ON_CPU or layout.device.type != "cpu":
        with suppress(RuntimeError):  # an operation without a batching rule, or out of memory
            return pull(seeds, batched=True)
    return torch.stack([pull(seed, batched=False) for seed in seeds])


def _weight_decay(problem: BilevelProblem, layout: FlatLayout) -> Tensor | None:
    """The curvature that the inner optimizer's own weight decay adds: (n,), or () if uniform.

    ``torch.optim``'s optimizers but AdamW add weight_decay·θ to the gradient, so they minimise
    f + weight_decay·‖θ‖²/2. Decoupled decay is no part of any objective, and counts for nothing
    here; nor does that of optimizers whose code is not known.
    """
    if not type(problem.inner).__module__.startswith("torch.optim"):
        return None
    decays = {}
    for group in problem.inner.param_groups:
        decoupled = isinstance(problem.inner, torch.optim.AdamW)
        decoupled = decoupled or group.get("decoupled_weight_decay", False)
        for p in group["params"]:
            decays[id(p)] = 0.0 if decoupled else group.get("weight_decay", 0.0)
    found = [decays[id(p)] for p in problem.inner_parameters]
    if all(isinstance(d, (int, float)) and d == found[0] for d in found):
        return (
            torch.tensor(found[0], dtype=layout.dtype, device=layout.device) if found[0] else None
        )
    values = [torch.as_tensor(d, dtype=layout.dtype, device=layout.device) for d in found]
    return torch.cat([d.expand(n) for d, n in zip(values, layout.sizes, strict=True)])


def _mean_curvature(penalty: Tensor | None, parameters: list[Tensor], layout: FlatLayout) -> Tensor:
    """1ᵀH1/n for the Hessian H of the penalty: its mean diagonal entry, where H is diagonal."""
    total = torch.zeros((), dtype=layout.dtype, device=layout.device)
    if penalty is None or not penalty.requires_grad:
        return total
    grads = torch.autograd.grad(penalty, parameters, create_graph=True, allow_unused=True)
    live = [g for g in grads if g is not None and g.requires_grad]
    if live:
        ones = [torch.ones_like(g) for g in live]
        H1 = torch.autograd.grad(live, parameters, ones, retain_graph=True, allow_unused=True)
        for part in H1:
            if part is not None:
                total = total + part.sum(dtype=layout.dtype)
    return total / layout.n


def _relative(operator: LinearOperator, r: Tensor, b: Tensor) -> Tensor:
    """‖r‖ / ‖b‖, and 0 for b = 0."""
    bb = operator.inner(b, b)
    return (operator.inner(r, r) / torch.where(bb > 0, bb, 1.0)).sqrt()


def _check_no_hyperparameter(problem: BilevelProblem) -> None:
    tuned = {id(t) for t in problem.outer_parameters} & {id(t) for t in learned(problem.inner)}
    if tuned:
        raise ValueError(
            f"{len(tuned)} outer parameter(s) are hyperparameters of the inner optimizer, such as "
            "a learning rate. Implicit differentiation cannot tune them: the optimum of the "
            "training loss does not depend on how it was reached. Use estimator=Unrolled() or "
            "estimator=PZOBO(), which look at the inner steps themselves."
        )
