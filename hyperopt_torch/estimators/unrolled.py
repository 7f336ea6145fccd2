"""Reverse mode through the inner steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from .._tensors import FlatLayout, inner_product
from ..errors import check_count
from ..inner_optimizer import standing_in, step_hooks
from ..operators import InnerGradient
from ..recording import World, check_repeatable
from ..report import SolveReport
from ._linearised import THETA, Point, Update
from ._problem import BilevelProblem, combined
from ._trajectory import (
    RecordedStep,
    TrajectoryEstimator,
    again_checked,
    all_skipped,
    plus,
    world_of,
)

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
        super().check(problem)
        for optimizer in problem.inner:
            self._check(optimizer)

    def _check(self, optimizer: Optimizer) -> None:
        name = type(optimizer).__name__
        if "differentiable" not in optimizer.defaults:
            raise ValueError(
                f"{name} has no `differentiable` form, so Unrolled cannot differentiate its step; "
                "estimator=PZOBO(), which only runs it, can."
            )
        if step_hooks(optimizer):
            raise ValueError(
                f"Unrolled does not see what the hooks around {name}.step() do, such as clipping; "
                "estimator=PZOBO(), which only runs them, does."
            )

    def estimate(self, problem: BilevelProblem, outer_loss: Tensor) -> list[Tensor | None]:
        self.check(problem)
        b, direct = self.outer_gradients(problem, outer_loss)
        steps = self.recorded(problem)
        if not steps:
            self.report, nothing = all_skipped(repr(self), problem, b, direct)
            return nothing
        after = [p.detach() for p in problem.inner_parameters]
        with world_of(problem, steps) as world:
            sweep = _Sweep(problem, b, world)
            for step in reversed(steps):
                sweep.back(step, after)
                assert step.parameters is not None
                after = step.parameters
        check_repeatable(problem.in_all_processes(sweep.agree))
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

    def __init__(self, problem: BilevelProblem, b: Sequence[Tensor | None], world: World) -> None:
        self.problem, self.world = problem, world
        outer = problem.outer_parameters
        self.learned = [phi for phi in problem.learned() if any(phi is o for o in outer)]
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
        with standing_in(inner, step.parameters):
            terms = _Terms(problem, step, self.world, self.agree)
            self.gradient = terms.gradient if self.gradient is None else self.gradient
            update = Update(
                problem.inner,
                step.settings,
                step.parameters,
                step.state,
                terms.gradients,
                step.change_from(terms.gradients),
                inner,
                self.learned,
            )
            self.astray.append(_astray(update, step.parameters, after))
            self.adjoint, pulled, eta = update.pull(self.adjoint)
            Hx, cross = terms.joint(pulled)
        for i, part in enumerate(Hx):
            if part is not None:
                known = self.adjoint.get((i, THETA))
                self.adjoint[i, THETA] = part if known is None else known + part
        for j, part in enumerate(cross):
            if part is not None:
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


class _Terms:
    """∇f of one step, f = Σ w_i f_i over its micro-batches, and its derivative.

    The graph of a single batch is kept; of several, one is alive at a time.

    Attributes:
        gradient: (n,) ∇f.
        gradients: the same, for each parameter; None where f does not depend on it.
    """

    def __init__(
        self, problem: BilevelProblem, step: RecordedStep, world: World, agree: list[Tensor]
    ) -> None:
        self._problem, self._step, self._world = problem, step, world
        self._only: InnerGradient | None = None
        self.gradients: list[Tensor | None] = [None] * len(problem.inner_parameters)
        for weight, f in self._each(agree):
            self._only = f if len(step.records) == 1 else None
            parts = zip(f.layout.unflatten(f.gradient), f.used, strict=True)
            self.gradients = [
                plus(total, weight, g if used else None)
                for total, (g, used) in zip(self.gradients, parts, strict=True)
            ]
        self.gradients = problem.over_processes(self.gradients)
        self.gradient = FlatLayout(problem.inner_parameters).flatten(self.gradients)

    def _each(self, agree: list[Tensor]) -> Iterator[tuple[float, InnerGradient]]:
        problem, step = self._problem, self._step
        with self._world.fresh(step.records):
            for weight, record in zip(step.weights, step.records, strict=True):
                with problem.explained_training_errors():
                    evaluation = again_checked(record, agree)
                    inner, outer = problem.inner_parameters, problem.outer_parameters
                    scale = 1.0 if problem.scale is None else problem.scale
                    gradient = InnerGradient(evaluation.loss, inner, outer, scale=scale)
                del evaluation
                yield weight, gradient
                del gradient

    def joint(
        self, pulled: Sequence[Tensor | None]
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """(Hx, Jᵀx) for each parameter of the levels; None where f does not depend on it."""
        problem = self._problem
        Hx: list[Tensor | None] = [None] * len(problem.inner_parameters)
        cross: list[Tensor | None] = [None] * len(problem.outer_parameters)
        only = self._only
        for weight, f in self._each([]) if only is None else [(1.0, only)]:
            if len(self._step.records) == 1:
                weight = self._step.weights[0]
            product, pulled_cross = f.joint(f.layout.flatten(pulled))
            parts = zip(f.layout.unflatten(product), f.used, strict=True)
            Hx = [plus(a, weight, g if u else None) for a, (g, u) in zip(Hx, parts, strict=True)]
            parts = zip(f.outer_layout.unflatten(pulled_cross), f.reached, strict=True)
            cross = [
                plus(a, weight, g if u else None) for a, (g, u) in zip(cross, parts, strict=True)
            ]
        both = problem.over_processes([*Hx, *cross])
        return both[: len(Hx)], both[len(Hx) :]


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
