"""The inner objective at one point, ready for products with its Hessian."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._tensors import FlatLayout
from ..curvature import Curvature, FirstOrderCurvature
from ..operators import InnerGradient, LinearOperator, Summed
from ..plain_gradient import PlainGradient
from ..recording import Evaluation, InnerObjective
from ._problem import BilevelProblem


class InnerFunction:
    """s·f at the current θ and φ, f = Σ w_i f_i, with its products.

    The graph of a single loss is built once and serves every product. Of several micro-batches one
    graph is alive at a time, built anew for every product: time for memory.

    Args:
        sign: s, -1 where the inner optimizer maximises.

    Attributes:
        sign: s.
        operator: H, with Jᵀ.
        gradient: (n,) s·∇f.
        reached: for each outer parameter, whether it reaches ∇f at all.
        penalty: mean diagonal entry of the penalty's Hessian, where the closure told it apart.
        precision: machine epsilon of the coarsest dtype used, where coarser than the vectors'.
    """

    def __init__(
        self,
        problem: BilevelProblem,
        objective: InnerObjective,
        curvature: Curvature,
        sign: float = 1.0,
    ) -> None:
        self._problem, self._curvature, self.sign = problem, curvature, sign
        self._terms = objective.terms
        self.layout = FlatLayout(problem.inner_parameters)
        self.outer_layout = FlatLayout(problem.outer_parameters)
        self.gradient = torch.zeros(
            self.layout.n, dtype=self.layout.dtype, device=self.layout.device
        )
        self.penalty: Tensor | None = None
        self.precision: float | None = None
        self.kink: Tensor | None = None
        self.loss = torch.zeros((), device=self.layout.device)
        self._reached = [False] * len(problem.outer_parameters)
        self.only: InnerGradient | None = None
        for i, (weight, _) in enumerate(self._terms):
            self._take(i, weight)
        single = self.only if len(self._terms) == 1 else None
        self.operator: LinearOperator = (
            curvature.operator(single)
            if single is not None
            else Summed([(1.0, self._maker(i)) for i in range(len(self._terms))])
        )

    def _take(self, i: int, weight: float) -> None:
        f, evaluation = self._build(i)
        self.gradient = self.gradient + f.gradient
        self.loss = self.loss + weight * evaluation.loss.detach()
        if f.precision is not None:
            self.precision = max(f.precision, self.precision or 0.0)
        if evaluation.penalty is not None:
            part = weight * _mean_curvature(evaluation.penalty, f.inner, f.layout)
            self.penalty = part if self.penalty is None else self.penalty + part
        if len(self._terms) == 1:
            self.only = f
        else:
            self._reached = [a or b for a, b in zip(self._reached, f.reached, strict=True)]

    def _build(self, i: int) -> tuple[InnerGradient, Evaluation]:
        problem, (weight, evaluate) = self._problem, self._terms[i]
        factor = self.sign * weight
        # A solve runs without gradients, but each of its products may build a graph.
        with torch.enable_grad(), problem.explained_training_errors():
            evaluation = evaluate()
            loss = evaluation.loss if factor == 1 else factor * evaluation.loss
            f = InnerGradient(
                loss,
                problem.inner_parameters,
                problem.outer_parameters,
                evaluation.outputs,
                scale=1.0 if problem.scale is None else problem.scale,
            )
        return f, evaluation

    def _maker(self, i: int) -> Callable[[], LinearOperator]:
        return lambda: self._curvature.operator(self._build(i)[0])

    def joint(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(Hx, Jᵀx) with the exact Hessian, whatever stands for it elsewhere; not counted."""
        if self.only is not None:
            return self.only.joint(x)
        parts = [self._build(i)[0].joint(x) for i in range(len(self._terms))]
        return sum(p[0] for p in parts), sum(p[1] for p in parts)  # type: ignore[return-value]

    @property
    def reached(self) -> list[bool]:
        return self._reached if self.only is None else self.only.reached


class PlainFunction:
    """The same for a curvature that needs first gradients alone: f at θ and beside it.

    Attributes:
        as of :class:`InnerFunction`; ``penalty`` is never known.
        kink: how much the differences bend, see :class:`~hyperopt_torch.SolveReport`.

    Raises:
        RuntimeError: the objective is a loss, which cannot be evaluated beside θ.
    """

    penalty: Tensor | None = None

    def __init__(
        self,
        problem: BilevelProblem,
        objective: InnerObjective,
        curvature: FirstOrderCurvature,
        sign: float = 1.0,
    ) -> None:
        if not objective.repeatable:
            raise RuntimeError(
                f"{type(curvature).__name__} evaluates the training loss beside the current "
                "parameters: give outer_step a closure, outer_step(val_loss, lambda: ...), instead "
                "of the loss itself."
            )
        world = objective.plain_world

        def fresh(evaluate: Callable[..., Evaluation]) -> Callable[[], Evaluation]:
            def evaluated() -> Evaluation:
                with world.fresh():
                    return evaluate(twice=False)

            return evaluated

        whole: dict[str, Any] = {}
        if problem.group is not None:
            problem.group.settle()
            whole = {"total": problem.group.total, "settle": problem.group.settle}
        with problem.explained_training_errors():
            gradient = PlainGradient(
                [(weight, fresh(evaluate)) for weight, evaluate in objective.terms],
                problem.inner_parameters,
                problem.outer_parameters,
                sign=sign,
                scale=1.0 if problem.scale is None else problem.scale,
                step=curvature.step,
                **whole,
            )
        self._gradient = gradient
        self.layout, self.outer_layout = gradient.layout, gradient.outer_layout
        self.operator = curvature.operator(gradient)
        self.gradient, self.loss = gradient.gradient, gradient.loss
        self.precision, self.reached = gradient.precision, gradient.reached

    @property
    def kink(self) -> Tensor:
        return self._gradient.kink


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
