"""Reverse mode through the inner steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._tensors import inner_product
from ..errors import check_count
from ..inner_optimizer import learned, standing_in, step_hooks
from ..operators import InnerGradient
from ..recording import (
    RecordedStep,
    again,
    buffers_at,
    check_repeatable,
    same_loss,
    set_random_state,
)
from ..report import SolveReport
from ._linearised import THETA, Point, Update
from ._trajectory import TrajectoryEstimator
from .base import BilevelProblem, combined

_ASTRAY = 1e-2  # of a step: a larger gap to the next point on record is no rounding


class Unrolled(TrajectoryEstimator):
    """dg/dφ through the inner steps since the last outer step, by adjoint recursion.

    α_T = ∂g/∂θ, and for every step θ_{t+1} = Θ_t(θ_t, φ) on record, the newest first,

        h += (∂Θ_t/∂φ)ᵀ α_{t+1},    α_t = (∂Θ_t/∂θ)ᵀ α_{t+1};    dg/dφ = ∂g/∂φ + h

    where θ includes the state of the inner optimizer. Each step is restored, its gradient rebuilt
    once, and the adjoint is pulled through the optimizer's own update and through the gradient. It
    needs no optimum, and it can tune what only the steps know: learning rates, momenta, the
    starting point.

    Args:
        window: K >= 1, the last K steps alone (truncated backpropagation, whose bias falls as the
            inner loop contracts); None: all since the last outer step.

    Raises:
        ValueError: ``window`` is no count; or the inner optimizer has no ``differentiable`` form
            (LBFGS, SparseAdam and others), or hooks around its step: ``PZOBO`` works with these.
        RuntimeError: at ``outer_step``: no inner step was taken with a closure, or a closure is not
            repeatable.

    Exact limit: it is exact, to rounding. From a converged point, many steps approach the implicit
    hypergradient.

    Trouble: an adjoint that grows over the window, as in unstable inner loops, is reported, and so
    are steps after which the parameters were not where the optimizer had put them (a projection, a
    step that a GradScaler skipped), which are not differentiated.

    Cost: K gradients, each with one joint product; one step's graph at a time, and snapshots of
    parameters and optimizer state (buffers where they change) for each step. One sync.

    Example:
        >>> from hyperopt_torch import BilevelOptimizer
        >>> w = torch.zeros((), requires_grad=True)
        >>> phi = torch.ones((), requires_grad=True)
        >>> bilevel = BilevelOptimizer(
        ...     torch.optim.SGD([w], lr=0.5), torch.optim.SGD([phi], lr=1.0), estimator=Unrolled()
        ... )
        >>> for _ in range(2):  # w: 0, 1/2, 3/4
        ...     _ = bilevel.inner_step(lambda: (w - phi) ** 2 / 2)
        >>> bilevel.hypergradient((w - 3) ** 2 / 2)[0].item()  # (3/4 - 3) · 3/4
        -1.6875

    Reference: Maclaurin, Duvenaud & Adams, ICML 2015; Franceschi et al., ICML 2017; truncation:
    Shaban et al., AISTATS 2019.
    """

    def __init__(self, window: int | None = None) -> None:
        self.window = None if window is None else check_count("window", window)
        super().__init__(self.window, every_step=True)

    def __repr__(self) -> str:
        return f"Unrolled(window={self.window})"

    def check(self, problem: BilevelProblem) -> None:
        name = type(problem.inner).__name__
        if "differentiable" not in problem.inner.defaults:
            raise ValueError(
                f"{name} has no `differentiable` form, so Unrolled cannot differentiate its step; "
                "estimator=PZOBO(), which only runs it, can."
            )
        if step_hooks(problem.inner):
            raise ValueError(
                f"Unrolled does not see what the hooks around {name}.step() do, such as clipping; "
                "estimator=PZOBO(), which only runs them, does."
            )

    def estimate(self, problem: BilevelProblem, outer_loss: Tensor) -> list[Tensor | None]:
        self.check(problem)
        b, direct = problem.outer_gradients(outer_loss)
        steps = self.recorded(problem)
        sweep = _Sweep(problem, b)
        after = [p.detach() for p in problem.inner_parameters]
        for step in reversed(steps):
            sweep.back(step, after)
            assert step.parameters is not None
            after = step.parameters
        check_repeatable(sweep.agree)
        indirect = sweep.indirect
        for theta, phi in enumerate(self.started_from(problem)):
            sweep.reached[phi] = True
            if (theta, THETA) in sweep.adjoint:
                indirect[phi] = indirect[phi] + sweep.adjoint[theta, THETA]
        self.report = sweep.report(repr(self), len(steps), b)
        return combined(
            direct,
            indirect,
            sweep.reached,
            "No inner step on record depends on any outer parameter, so the hypergradient is the "
            "direct term ∂g/∂φ alone.",
        )


class _Sweep:
    """The adjoint recursion: what it carries from step to step, backwards."""

    def __init__(self, problem: BilevelProblem, b: Sequence[Tensor | None]) -> None:
        self.problem = problem
        outer = problem.outer_parameters
        self.learned = [phi for phi in learned(problem.inner) if any(phi is o for o in outer)]
        self.adjoint: Point = {(i, THETA): g for i, g in enumerate(b) if g is not None}
        self.indirect = [torch.zeros_like(phi) for phi in outer]
        tuned = {id(phi) for phi in self.learned}
        self.reached = [id(phi) in tuned for phi in outer]
        self.agree: list[Tensor] = []
        self.astray: list[Tensor] = []
        self.gradient: Tensor | None = None  # ∇f of the newest step

    def back(self, step: RecordedStep, after: list[Tensor]) -> None:
        """From α_{t+1} to α_t; ``after`` is θ_{t+1} as it was on the way."""
        assert step.parameters is not None
        assert step.state is not None
        problem = self.problem
        inner, outer = problem.inner_parameters, problem.outer_parameters
        set_random_state(inner[0].device, step.random)
        with standing_in(inner, step.parameters), buffers_at(step.buffers):
            with problem.explained_training_errors():
                evaluation = again(step)
                f = InnerGradient(evaluation.loss, inner, outer)
            self.agree.append(same_loss(step.loss, evaluation.loss.detach()))
            self.gradient = f.gradient if self.gradient is None else self.gradient
            gradients = [
                g if used else None
                for g, used in zip(f.layout.unflatten(f.gradient), f.used, strict=True)
            ]
            update = Update(
                problem.inner,
                step.settings,
                step.parameters,
                step.state,
                gradients,
                inner,
                self.learned,
            )
            self.astray.append(_astray(update, step.parameters, after))
            self.adjoint, pulled, eta = update.pull(self.adjoint)
            Hx, cross = f.joint(f.layout.flatten(pulled))
        for i, part in enumerate(f.layout.unflatten(Hx)):
            if f.used[i]:
                known = self.adjoint.get((i, THETA))
                self.adjoint[i, THETA] = part if known is None else known + part
        for j, part in enumerate(f.outer_layout.unflatten(cross)):
            if f.reached[j]:
                self.reached[j] = True
                self.indirect[j] = self.indirect[j] + part
            if id(outer[j]) in eta:
                self.indirect[j] = self.indirect[j] + eta[id(outer[j])]

    def report(self, strategy: str, steps: int, b: Sequence[Tensor | None]) -> SolveReport:
        size = _norm([g for g in b if g is not None])
        start = _norm([g for (_, name), g in self.adjoint.items() if name == THETA])
        return SolveReport(
            strategy=strategy,
            matvecs=steps,
            rhs_norm=size,
            inner_gradient_norm=None if self.gradient is None else _norm([self.gradient]),
            gradients=steps,
            growth=start / torch.where(size > 0, size, 1.0),
            astray=torch.stack(self.astray).sum(),
        )


def _astray(update: Update, before: list[Tensor], after: list[Tensor]) -> Tensor:
    """Whether the recorded next point is not the one that the update leads to; 0-d bool."""
    gap, size, move = [], [], []
    for i, (old, new) in enumerate(zip(before, after, strict=True)):
        gap.append(update.result[i, THETA].detach() - new)
        size.append(new)
        move.append(new - old)
    eps = torch.finfo(before[0].dtype).eps
    return _norm(gap) > _ASTRAY * _norm(move) + 8 * eps * _norm(size)


def _norm(tensors: list[Tensor]) -> Tensor:
    if not tensors:
        return torch.zeros((), dtype=torch.float64)
    squares = [inner_product(t.flatten(), t.flatten()) for t in tensors]
    return torch.stack(squares).sum().sqrt()
