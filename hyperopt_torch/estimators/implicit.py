"""Hypergradients by the implicit function theorem."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._tensors import FlatLayout, inner_product, is_sharded
from ..curvature import Curvature, FirstOrderCurvature, Hessian
from ..distributed import Group
from ..ihvp import IHVP, Solution
from ..ihvp.base import InnerStep
from ..inner_optimizer import Prober
from ..operators import LinearOperator, Shifted
from ..recording import Evaluation, InnerObjective, Record
from ..report import SelfCheck, SolveReport
from ._function import InnerFunction, PlainFunction
from ._inner_steps import biases_of, inner_step_of, joined
from ._moving import Moving, moving
from ._problem import BilevelProblem, all_facts, combined
from ._self_check import self_check
from .base import HypergradientEstimator

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

    averages = True

    def __init__(self, ihvp: IHVP, curvature: Curvature | None = None) -> None:
        if not isinstance(ihvp, IHVP):
            raise TypeError(f"ihvp must be a strategy object such as Nystrom(); got {ihvp!r}.")
        if curvature is not None and not isinstance(curvature, Curvature):
            raise TypeError(f"curvature must be an object such as Hessian(); got {curvature!r}.")
        self.ihvp = ihvp
        self.curvature = curvature or Hessian()
        self._theta: Tensor | None = None  # of the last estimate, for a strategy that follows θ
        self._rows: list[InnerStep] = []  # what before_backward knows of the step under way
        self._checked = self._agreed = False
        self._prober = Prober()

    @property
    def first_order(self) -> bool:  # type: ignore[override]
        return isinstance(self.curvature, FirstOrderCurvature)

    @property
    def vectors(self) -> int:
        return self.ihvp.vectors

    @property
    def observes(self) -> bool:
        return self.ihvp.observes

    def claim(self, owner: object) -> None:
        self.ihvp.claim(owner)

    def check(self, problem: BilevelProblem) -> None:
        _check_no_hyperparameter(problem)
        if not self.first_order and any(map(is_sharded, problem.inner_parameters)):
            raise RuntimeError(
                "The inner parameters are in parts (FSDP2, DTensor), and their gradients cannot be "
                "differentiated again: pass curvature=FiniteDifference(), which needs first "
                "gradients alone."
            )
        if self.ihvp.observes and any(map(is_sharded, problem.inner_parameters)):
            raise RuntimeError(
                f"{type(self.ihvp).__name__} learns from the inner steps, which it cannot where "
                "parameters are in parts (FSDP2, DTensor): use a strategy that does not."
            )

    def before_backward(self, problem: BilevelProblem, evaluation: Evaluation) -> None:
        if not self.ihvp.observes:
            return
        if problem.begins:
            self._rows = []  # a step was recorded before, and not taken
        self._rows.append(inner_step_of(problem, evaluation, self.ihvp.samples_wanted))

    def observe(self, problem: BilevelProblem, records: Sequence[Record]) -> None:
        parts, self._rows = self._rows, []
        if not self.ihvp.observes:
            return
        parameters = problem.inner_parameters
        layout = FlatLayout(parameters)
        step = replace(
            joined(layout.flatten([p.grad for p in parameters]), parts),
            shapes=layout.shapes,
            biases=partial(biases_of, parameters, records),
        )
        with torch.no_grad():
            self.ihvp.observe(step)

    def skipped(self, problem: BilevelProblem, records: Sequence[Record]) -> None:
        self.observe(problem, records)  # a strategy leaves out what is not finite

    def estimate(self, problem: BilevelProblem, outer_loss: Tensor) -> list[Tensor | None]:
        self.check(problem)
        # b and c first: evaluating the closure may bump versions that the outer graph has saved.
        b_parts, direct = problem.outer_gradients(outer_loss, plain=self.first_order)
        group = problem.group
        if group is not None:
            if not self._agreed:  # on the seeds of the first process
                self._agreed, device = True, outer_loss.device
                self.ihvp.reseed(lambda seed: group.seed(seed, device))
            b_parts, direct = group.gradients(b_parts, direct)
        objective = problem.known_objective()
        layout = FlatLayout(problem.inner_parameters)
        facts = all_facts(self._prober, problem)
        theta = layout.flatten([p.detach() for p in problem.inner_parameters])
        self._notice_jump(theta, group)
        b = layout.flatten(b_parts)
        with objective.plain_world if self.first_order else objective.world:
            f = self._function(problem, objective, facts.sign)
            decay = _as_vector(facts.decay, layout)
            if self.ihvp.observes and not (f.penalty is None and decay is None):
                penalty = torch.zeros_like(b[0]) if f.penalty is None else f.penalty
                penalty = penalty if group is None else group.mean([penalty])[0]
                self.ihvp.observe_penalty(penalty if decay is None else penalty + decay.mean())
            operator = f.operator
            if group is not None:
                operator = group.operator(operator)
            with torch.no_grad():
                if decay is not None:
                    operator = Shifted(operator, decay)
                mask = moving(problem.hook_zeros, f.gradient, layout)
                if mask is not None:
                    operator, b = Moving(operator, mask), mask * b
                solution, cross = self._solve(operator, b)
            check = None
            if isinstance(f, InnerFunction):
                check = self._self_check(problem, objective, f)
        gradient = f.gradient
        if decay is not None:
            gradient = gradient + decay * theta
        loss, kink = f.loss, f.kink
        size = operator.inner(gradient, gradient).sqrt()
        if group is not None:  # a few numbers, so that what one process meets all of them know
            loss, value, size = group.mean([loss, outer_loss, size])
            loss = loss + 0 * value
            kink = None if kink is None else group.mean([kink])[0]
            check = None if check is None else _mean_check(group, check, size)
        report = self._report(solution, operator, b, size)
        self.report = replace(
            report,
            loss=loss,
            precision=f.precision,
            kink=kink,
            self_check=check,
            notes=report.notes + facts.notes,
        )
        parts = f.outer_layout.unflatten(-cross)
        return combined(
            direct,
            parts,
            f.reached,
            "The training loss depends on none of the outer parameters, so the hypergradient is "
            "the direct term ∂g/∂φ alone. Implicit differentiation cannot tune what does not enter "
            "the training loss.",
        )

    def _function(
        self, problem: BilevelProblem, objective: InnerObjective, sign: float
    ) -> InnerFunction | PlainFunction:
        if isinstance(self.curvature, FirstOrderCurvature):
            return PlainFunction(problem, objective, self.curvature, sign)
        return InnerFunction(problem, objective, self.curvature, sign)

    def _self_check(
        self, problem: BilevelProblem, objective: InnerObjective, f: InnerFunction
    ) -> SelfCheck | None:
        """Once: products against differences of gradients; None where it was done, or cannot be."""
        if not problem.self_check or self._checked or not objective.repeatable:
            return None
        self._checked = True
        return self_check(problem, objective, f)

    def _notice_jump(self, theta: Tensor, group: Group | None) -> None:
        """Resets a strategy that follows a path where θ was replaced under it: one sync."""
        if not self.ihvp.follows:
            return
        last, self._theta = self._theta, theta.clone()
        if last is not None and last.shape == theta.shape and last.device == theta.device:
            vectors = last, theta, theta - last
            squares = torch.stack([inner_product(x, x) for x in vectors])
            before, now, moved = squares if group is None else group.total(squares)
            if bool(moved > _JUMP**2 * torch.maximum(before, now)):
                self.ihvp.reset()

    def _solve(self, operator: LinearOperator, b: Tensor) -> tuple[Solution, Tensor]:
        solution = self.ihvp.solution(operator, b)
        if solution.cross is not None:
            return solution, solution.cross
        x = solution.x
        Hx, cross = operator.joint(x)
        Ax = Hx + self._damping(solution) * x
        solution = replace(
            solution,
            residual=_relative(operator, b - Ax, b),
            curvature=operator.inner(x, Ax),
        )
        return solution, cross

    def _damping(self, solution: Solution) -> Tensor | float:
        own = solution.damping
        return float(self.ihvp.damping) if own is None else own

    def _report(
        self, solution: Solution, operator: LinearOperator, b: Tensor, size: Tensor
    ) -> SolveReport:
        def norm(x: Tensor) -> Tensor:
            return operator.inner(x, x).sqrt()

        return SolveReport(
            strategy=repr(self.ihvp),
            matvecs=operator.matvecs,
            rhs_norm=norm(b),
            solution_norm=norm(solution.x),
            inner_gradient_norm=size,
            residual=solution.residual,
            rank=solution.rank,
            negative_curvature=solution.negative_curvature,
            converged=solution.converged,
            diverged=solution.diverged,
            damping=self._damping(solution),
            self_tuned=solution.damping is not None,
            curvature=solution.curvature,
            notes=solution.notes,
        )

    def begin(self, initial: Sequence[Tensor]) -> None:
        self.ihvp.begin()

    def recover(self) -> None:
        if not self.ihvp.observes:  # a memory of inner steps has nothing to do with it
            self.reset()

    def reset(self) -> None:
        self.ihvp.reset()
        self._theta = None

    @contextmanager
    def on_loan(self) -> Iterator[None]:
        theta = self._theta  # replaced by an estimate, never written into
        try:
            with self.ihvp.on_loan():
                yield
        finally:
            self._theta = theta

    def state_dict(self) -> dict[str, Any]:
        theta = None if self._theta is None else self._theta.clone()
        return {"ihvp": self.ihvp.state_dict(), "theta": theta}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        if not isinstance(state_dict, Mapping) or not {"ihvp", "theta"} <= state_dict.keys():
            raise ValueError(f"This is no state of {type(self).__name__}: {state_dict!r:.80}")
        self.ihvp.load_state_dict(state_dict["ihvp"])
        theta = state_dict["theta"]
        self._theta = None if theta is None else theta.clone()


def _mean_check(group: Group, check: SelfCheck, like: Tensor) -> SelfCheck:
    """The same verdict in every process: each checks products of its own batch."""
    names = [n for n in ("product", "cross", "kink") if getattr(check, n) is not None]
    numbers = like.new_tensor([getattr(check, n) for n in names])
    return check._replace(**dict(zip(names, group.mean([numbers])[0].tolist(), strict=True)))


def _as_vector(decay: Sequence[float], layout: FlatLayout) -> Tensor | None:
    """The curvature that the inner optimizer's own weight decay adds: (n,), or () if uniform."""
    whole = torch.empty(0, dtype=layout.dtype, device=layout.device)
    if all(d == decay[0] for d in decay):
        return whole.new_full((), decay[0]) if decay[0] else None
    return torch.cat([whole.new_full((n,), d) for d, n in zip(decay, layout.sizes, strict=True)])


def _relative(operator: LinearOperator, r: Tensor, b: Tensor) -> Tensor:
    """‖r‖ / ‖b‖, and 0 for b = 0."""
    bb = operator.inner(b, b)
    return (operator.inner(r, r) / torch.where(bb > 0, bb, 1.0)).sqrt()


def _check_no_hyperparameter(problem: BilevelProblem) -> None:
    tuned = {id(t) for t in problem.outer_parameters} & {id(t) for t in problem.learned()}
    if tuned:
        raise ValueError(
            f"{len(tuned)} outer parameter(s) are hyperparameters of the inner optimizer, such as "
            "a learning rate. Implicit differentiation cannot tune them: the optimum of the "
            "training loss does not depend on how it was reached. Use estimator=Unrolled() or "
            "estimator=PZOBO(), which look at the inner steps themselves."
        )
