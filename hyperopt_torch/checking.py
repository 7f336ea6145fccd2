"""A hypergradient held against finite differences of the inner problem, solved again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._tensors import FlatLayout, inner_product, seeded_generator
from .bilevel import BilevelOptimizer
from .errors import check_count, check_number
from .estimators import BilevelProblem
from .inner_optimizer import parameters_of
from .recording import InnerObjective, evaluate


class HypergradientCheck(NamedTuple):
    """Slopes of the validation loss along a few directions of φ.

    Attributes:
        expected: (k,) by central differences, the inner problem solved again on both sides.
        found: (k,) by the hypergradient.
        error: ‖found - expected‖ / ‖expected‖.
        stationarity: the largest ‖∇f‖ after a solve over the largest before one: where it is not
            small the inner problem was not solved, and ``expected`` means little.
    """

    expected: Tensor
    found: Tensor
    error: float
    stationarity: float


def check_hypergradient(
    bilevel: BilevelOptimizer,
    train_loss: Callable[[], Any],
    val_loss: Callable[[], Tensor],
    *,
    directions: int = 2,
    step: float | None = None,
    max_iter: int = 500,
    seed: int = 0,
) -> HypergradientCheck:
    """How far the hypergradient at the inner optimum is from the slope of the validation loss.

    Solves the inner problem by LBFGS, where it stands and at φ ± εu for random unit u, and
    differences the validation loss. Everything is put back: θ, φ, buffers, random streams.

    Args:
        bilevel: with the strategy to be checked.
        train_loss: closure, the whole inner objective (without the optimizer's own weight decay,
            which is added), on a fixed batch.
        val_loss: closure, the outer objective.
        directions: k >= 1.
        step: ε > 0; None: 3e-2 (float64: 1e-3) times 1 + ‖φ‖.
        max_iter: LBFGS iterations of each solve.
        seed: of the directions.

    Raises:
        ValueError: an argument is out of its range.

    Cost: 2k + 1 solves of the inner problem: for small problems.

    Example:
        >>> from hyperopt_torch import ConjugateGradient
        >>> w = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        >>> phi = torch.ones(2, dtype=torch.float64, requires_grad=True)
        >>> bilevel = BilevelOptimizer(
        ...     torch.optim.SGD([w], lr=0.1), torch.optim.SGD([phi], lr=0.1), ConjugateGradient(2)
        ... )
        >>> found = check_hypergradient(
        ...     bilevel, lambda: (w**4 + (w - phi) ** 2).sum(), lambda: ((w - 1) ** 2).sum()
        ... )
        >>> found.error < 1e-4
        True
    """
    check_count("directions", directions)
    check_count("max_iter", max_iter)
    solver = _Solver(bilevel, train_loss, val_loss, max_iter)
    outer = solver.problem.outer_parameters
    layout = FlatLayout(outer)
    phi = layout.flatten([p.detach() for p in outer]).clone()
    if step is None:
        # A line search finds the optimum to √eps only: the step must be long beside that.
        step = (1e-3 if layout.dtype == torch.float64 else 3e-2) * (1 + float(phi.norm()))
    check_number("step", step, positive=True)
    generator = seeded_generator(seed, phi.device)
    U = torch.randn(directions, layout.n, dtype=phi.dtype, device=phi.device, generator=generator)
    U = U / U.norm(dim=1, keepdim=True)
    with solver:
        solver.solve()
        grads = bilevel.hypergradient(val_loss(), train_loss)
        mine = {id(p): g for p, g in zip(parameters_of(bilevel.outer), grads, strict=True)}
        found = U @ layout.flatten([mine[id(p)] for p in outer])
        slopes = []
        for u in U:
            ahead = solver.value_at(layout.unflatten(phi + step * u))
            back = solver.value_at(layout.unflatten(phi - step * u))
            slopes.append((ahead - back) / (2 * step))
    expected = torch.stack(slopes).to(found)
    size = expected.norm()
    error = float((found - expected).norm() / torch.where(size > 0, size, 1.0))
    return HypergradientCheck(expected, found, error, solver.stationarity)


class _Solver:
    """Solves the inner problem from where θ stands; a context that puts θ and φ back."""

    def __init__(
        self,
        bilevel: BilevelOptimizer,
        train_loss: Callable[[], Any],
        val_loss: Callable[[], Tensor],
        max_iter: int,
    ) -> None:
        self.problem: BilevelProblem = bilevel.problem()
        self.stationarity, self._start = 0.0, 0.0
        self._train, self._val, self._max_iter = train_loss, val_loss, max_iter
        self._sign, self._decay = bilevel.inner_facts()
        both = [*self.problem.inner_parameters, *self.problem.outer_parameters]
        self._own = [(p, p.detach().clone(), p.grad) for p in both]
        self._world = InnerObjective.given(train_loss, both[0].device).world

    def __enter__(self) -> _Solver:
        self._world.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        with torch.no_grad():
            for p, value, grad in self._own:
                p.copy_(value)
                p.grad = grad
        self._world.__exit__(*error)

    def solve(self) -> None:
        inner = self.problem.inner_parameters
        self._start = max(self._start, self._gradient_norm())
        eps = torch.finfo(inner[0].dtype).eps
        lbfgs = torch.optim.LBFGS(
            inner,
            max_iter=self._max_iter,
            tolerance_grad=eps,
            tolerance_change=1e-3 * eps,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            lbfgs.zero_grad()
            loss = self._objective()
            grads = torch.autograd.grad(loss, inner, allow_unused=True)
            for p, g in zip(inner, grads, strict=True):
                p.grad = g
            return loss

        after = best = self._gradient_norm()
        for _ in range(20):  # each begins anew: a line search may give up on rounding
            lbfgs.state.clear()
            lbfgs.step(closure)  # type: ignore[no-untyped-call]
            after = self._gradient_norm()
            if not after < 0.5 * best:
                break
            best = after
        self.stationarity = max(self.stationarity, after / (self._start or 1.0))

    def value_at(self, phi: Sequence[Tensor]) -> Tensor:
        """The validation loss at these outer parameters, the inner problem solved."""
        with torch.no_grad():
            for p, value in zip(self.problem.outer_parameters, phi, strict=True):
                p.copy_(value)
        self.solve()
        value = self._val().detach()
        with torch.no_grad():
            own = {id(p): v for p, v, _ in self._own}
            for p in self.problem.outer_parameters:
                p.copy_(own[id(p)])
        return value

    def _objective(self) -> Tensor:
        loss = self._sign * evaluate(self._train).loss
        for p, decay in zip(self.problem.inner_parameters, self._decay, strict=True):
            if decay:
                loss = loss + decay / 2 * p.square().sum()
        return loss

    def _gradient_norm(self) -> float:
        inner = self.problem.inner_parameters
        grads = torch.autograd.grad(self._objective(), inner, allow_unused=True)
        known = [g.flatten() for g in grads if g is not None]
        return float(torch.stack([inner_product(g, g) for g in known]).sum().sqrt())
