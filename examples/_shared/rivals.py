"""The rivals in LancBiO's paper: what each makes of v = A⁻¹b, and F2SA, which has no v."""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hyperopt_torch import IHVP, LancBiO, Solution
from hyperopt_torch.operators import LinearOperator

if TYPE_CHECKING:
    from .single_loop import Problem


class Direct(IHVP):
    """v = 0: the direct term ∂f/∂φ alone. What a hypergradient has to be better than."""

    def solve(self, operator: LinearOperator, rhs: Tensor) -> Solution:
        return Solution(torch.zeros_like(rhs), residual=torch.ones_like(rhs[0]))


class SOBA(IHVP):
    """v as it stands; then it takes one step of gradient descent, v ← v + η (b - Av).

    One joint product gives Jᵀv and that step. Where θ takes one step at the same point, θ, v and φ
    move together: Dagréou, Ablin, Vaiter & Moreau, NeurIPS 2022, with full batches.
    """

    def __init__(self, step_size: float) -> None:
        super().__init__()
        self.step_size = step_size

    def solve(self, operator: LinearOperator, rhs: Tensor) -> Solution:
        v = self.state.get("v", torch.zeros_like(rhs))
        Av, cross = operator.joint(v)
        self.state["v"] = v + self.step_size * (rhs - Av)
        return Solution(v, cross, (rhs - Av).norm() / rhs.norm())


class AmIGO(IHVP):
    """``steps`` steps of gradient descent on ½vᵀAv - bᵀv from the last v.

    The form of Arbel & Mairal, ICLR 2022, that descends; its other form is warm conjugate
    gradients. One joint product more closes it.
    """

    def __init__(self, steps: int, step_size: float) -> None:
        super().__init__()
        self.steps, self.step_size = steps, step_size

    def solve(self, operator: LinearOperator, rhs: Tensor) -> Solution:
        v = self.state.get("v", torch.zeros_like(rhs))
        for _ in range(self.steps):
            v = v + self.step_size * (rhs - operator @ v)
        self.state["v"] = v
        Av, cross = operator.joint(v)
        return Solution(v, cross, (rhs - Av).norm() / rhs.norm())


class RandomTerm(IHVP):
    """v = Qη (I - ηA)ᵖ b, p uniform on 0, ..., Q - 1: in the mean Q terms of the Neumann series.

    What BSA (Ghadimi & Wang, 2018) and TTSA (Hong, Wai, Wang & Yang, 2020) take for A⁻¹b. Without
    the factor Q it would be the mean of the terms, not their sum. The numbers p come from a stream
    of their own, seeded by ``torch.manual_seed``.
    """

    def __init__(self, num_terms: int, step_size: float) -> None:
        super().__init__()
        self.num_terms, self.step_size = num_terms, step_size
        self._stream = torch.Generator().manual_seed(torch.initial_seed())

    def solve(self, operator: LinearOperator, rhs: Tensor) -> Solution:
        v = self.num_terms * self.step_size * rhs
        for _ in range(int(torch.randint(self.num_terms, (), generator=self._stream))):
            v = v - self.step_size * (operator @ v)
        Av, cross = operator.joint(v)
        return Solution(v, cross, (rhs - Av).norm() / rhs.norm())


class GrowingLancBiO(LancBiO):
    """The published schedule of the subspace: m = 1, times ``factor`` each ``every`` solves.

    m is rounded up, and ``subspace_dim`` bounds it.
    """

    def __init__(self, subspace_dim: int, factor: float, every: int, safeguard: bool) -> None:
        super().__init__(subspace_dim, safeguard=safeguard)
        self.factor, self.every = factor, every

    def solve(self, operator: LinearOperator, rhs: Tensor) -> Tensor | Solution:
        found = super().solve(operator, rhs)
        solves = self.state["solves"] = self.state.get("solves", 0) + 1
        m = 1
        for _ in range(solves // self.every):
            m = min(self.subspace_dim, ceil(self.factor * m))
        if self.state["step"] >= m:
            self.state["step"] = self.subspace_dim  # the next solve starts anew
        return found


class F2SA:
    """First-order: z minimizes the inner loss g, y the sum g + f/λ, and φ moves along

        ∂f/∂φ(y) + λ (∂g/∂φ(y) - ∂g/∂φ(z)),

    which tends to the hypergradient as λ grows; its bias is of order 1/λ. No product, no v. The
    rates of Kwon, Kwon, Wright & Nowak, ICML 2023: of z γ, of y γ/(2λ) on f + λg, of φ as 1/λ; and
    λ ∝ (k + 1)^(1/3) with γ constant on full batches, λ ∝ (k + 1)^(1/7), γ ∝ (k + 1)^(-4/7) on
    mini-batches. z is the problem's ``inner``: it is what one would use.
    """

    residual: float | None = None
    products = 0

    def __init__(self, problem: Problem, inner_steps: int) -> None:
        self.problem, self.inner_steps = problem, inner_steps
        self.optimizer = problem.optimizer()
        self.rate = self.optimizer.param_groups[0]["lr"] * problem.scale.rates["f2sa"]
        self.z, self.y = (problem.inner.detach().clone() for _ in range(2))

    def step(self, k: int) -> None:
        problem, noisy = self.problem, self.problem.noisy
        growth = (k + 1) ** (1 / 7 if noisy else 1 / 3)
        lam = problem.scale.penalty * growth
        gamma = problem.inner_lr * (k + 1) ** (-4 / 7 if noisy else 0.0)
        for _ in range(self.inner_steps):
            problem.draw()
            self.z -= gamma * self._inner_gradient(self.z)
            slope = self._outer_gradient(self.y) / lam + self._inner_gradient(self.y)
            self.y -= gamma / 2 * slope
        problem.draw()
        self.optimizer.param_groups[0]["lr"] = self.rate * gamma / problem.inner_lr / growth
        problem.outer.grad = self.hypergradient(lam)
        self.optimizer.step()
        problem.inner.data.copy_(self.z)

    def hypergradient(self, lam: float) -> Tensor:
        at_y, at_z = (self._gradient(at, self.problem.train_loss, 1) for at in (self.y, self.z))
        return self._gradient(self.y, self.problem.val_loss, 1) + lam * (at_y - at_z)

    def _inner_gradient(self, at: Tensor) -> Tensor:
        return self._gradient(at, self.problem.train_loss, 0)

    def _outer_gradient(self, at: Tensor) -> Tensor:
        return self._gradient(at, self.problem.val_loss, 0)

    def _gradient(self, at: Tensor, loss: Any, level: int) -> Tensor:
        """Of ``loss`` at θ = ``at``: by θ (level 0) or by φ (level 1)."""
        self.problem.inner.data.copy_(at)
        variable = (self.problem.inner, self.problem.outer)[level]
        return torch.autograd.grad(loss(), variable, allow_unused=True, materialize_grads=True)[0]
