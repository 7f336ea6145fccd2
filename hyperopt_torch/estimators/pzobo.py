"""Zeroth order on the response Jacobian: perturbed inner runs instead of second derivatives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._tensors import FlatLayout, draw_seed, seeded_generator, seeded_rng
from ..errors import check_choice, check_count, check_number
from ..inner_optimizer import step_hooks
from ..recording import Record
from ..report import SolveReport
from ._perturbed import Runs, dot, exact_slopes
from ._problem import BilevelProblem, combined
from ._trajectory import TrajectoryEstimator, all_skipped, world_of

_SMOOTHING = {torch.float64: 1e-5, torch.float32: 1e-3}  # relative to 1 + rms(φ)
_SMOOTHING_LOW = 3e-2  # in half precision


class PZOBO(TrajectoryEstimator):
    """dg/dφ = ∂g/∂φ + (1/Q) Σ_j ⟨δ_j, ∂g/∂θ⟩ u_j, where δ_j ≈ (∂θ_T/∂φ) u_j.

    The inner steps since the last outer step are taken again from the same start with φ + μu_j, on
    the same batches and random numbers, and δ_j = (θ_T(φ + μu_j) - θ_T(φ)) / μ. No second
    derivative is needed, and any inner optimizer will do. With mini-batch closures this is PZOBO-S.

    Args:
        num_directions: Q >= 1.
        smoothing: μ >= 0. None: 1e-3 (float64: 1e-5, half precision: 3e-2) times 1 + rms(φ). 0: the
            limit μ -> 0 itself, by forward mode through the steps, for inner optimizers that have
            a ``differentiable`` form.
        directions: "gaussian", u ~ N(0, I), for which the mean over u is the derivative of the
            smoothed response; "per_tensor", as in the paper's public code: unit length in each
            outer tensor, which shrinks the second term by the size of the tensor.
        antithetic: whether to run -u_j beside each u_j: central differences, error O(μ²), at twice
            the cost. Without effect on the limit.
        generator: where to take the seed from; None: from ``torch.manual_seed``'s seed.

    Raises:
        ValueError: an argument is out of its range; or ``smoothing=0`` with an inner optimizer that
            has no ``differentiable`` form, or that has hooks around its step.
        RuntimeError: at ``outer_step``: no inner step was taken with a closure, or the closure is
            not repeatable.

    Exact limit: Q -> ∞ with smoothing=0: the hypergradient through the inner steps.

    Trouble: in h outer entries the second term has an expected cosine of about √(Q / (Q + h + 1))
    with the true one: a random search direction where h is large. Outer parameters that no inner
    step depends on get their direct term alone, not noise.

    Cost: for T inner steps QT gradients (2QT antithetic), and one loss to see whether the closure
    is repeatable. Exact form: T gradients and QT double backward passes. Two copies of the inner
    parameters; one sync.

    Example:
        >>> from hyperopt_torch import BilevelOptimizer
        >>> w = torch.zeros((), requires_grad=True)
        >>> phi = torch.ones((), requires_grad=True)
        >>> bilevel = BilevelOptimizer(
        ...     torch.optim.SGD([w], lr=0.5),
        ...     torch.optim.SGD([phi], lr=1.0),
        ...     estimator=PZOBO(directions="per_tensor", smoothing=0.0),
        ... )
        >>> for _ in range(2):  # w: 0, 1/2, 3/4
        ...     _ = bilevel.inner_step(lambda: (w - phi) ** 2 / 2)
        >>> bilevel.hypergradient((w - 3) ** 2 / 2)[0].item()  # (3/4 - 3) · 3/4 · u², u = ±1
        -1.6875

    Reference: Sow, Ji & Liang, "On the convergence theory for Hessian-free bilevel algorithms",
    NeurIPS 2022.
    """

    def __init__(
        self,
        num_directions: int = 1,
        *,
        smoothing: float | None = None,
        directions: str = "gaussian",
        antithetic: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(window=None, every_step=False)
        self._after: list[Tensor] | None = None  # θ after the last step
        self._astray: Tensor | None = None
        self.num_directions = check_count("num_directions", num_directions)
        self.smoothing = None if smoothing is None else check_number("smoothing", smoothing)
        self.directions = check_choice("directions", directions, ("gaussian", "per_tensor"))
        self.antithetic = bool(antithetic)
        self.seed = draw_seed(generator)
        self._draws = 0
        self._agreed = False

    def __repr__(self) -> str:
        return (
            f"PZOBO(num_directions={self.num_directions}, smoothing={self.smoothing}, "
            f"directions={self.directions!r}, antithetic={self.antithetic})"
        )

    def check(self, problem: BilevelProblem) -> None:
        super().check(problem)
        exact = all("differentiable" in o.defaults and not step_hooks(o) for o in problem.inner)
        if self.smoothing == 0 and not exact:
            raise ValueError(
                f"Invalid smoothing: 0; {problem.name} has no `differentiable` "
                "form, or hooks around its step, so the limit itself cannot be taken. Expected "
                "smoothing > 0, or None."
            )

    def estimate(self, problem: BilevelProblem, outer_loss: Tensor) -> list[Tensor | None]:
        self.check(problem)
        b, direct = self.outer_gradients(problem, outer_loss)
        self._agree(problem)
        steps = self.recorded(problem)
        if not steps:
            self.report, nothing = all_skipped(repr(self), problem, b, direct)
            return nothing
        layout = FlatLayout(problem.outer_parameters)
        U = self._draw(layout)  # (Q, h)
        started = self.started_from(problem)
        astray = self._moved(problem)
        with world_of(problem, steps) as world:
            if self.smoothing == 0:
                slopes, reached = exact_slopes(problem, steps, world, started, b, layout, U)
            else:
                run = Runs(problem, steps, world, started)
                slopes, reached = self._differences(problem, run, b, layout, U, astray)
        tuned = {id(t) for t in problem.learned()} | reached
        tuned |= {id(problem.outer_parameters[i]) for i in started}
        indirect = slopes.to(U.dtype) @ U / self.num_directions
        runs = self.num_directions * (2 if self.antithetic and self.smoothing != 0 else 1)
        self.report = SolveReport(
            strategy=repr(self),
            matvecs=0,
            rhs_norm=dot(b, b).sqrt(),
            gradients=len(steps) * (1 if self.smoothing == 0 else runs),
            astray=astray,
        )
        return combined(
            direct,
            layout.unflatten(indirect),
            [id(phi) in tuned for phi in problem.outer_parameters],
            "No inner step on record depends on any outer parameter, so the hypergradient is the "
            "direct term ∂g/∂φ alone.",
        )

    def _agree(self, problem: BilevelProblem) -> None:
        """Once: the directions of the first process, in all of them."""
        if problem.group is not None and not self._agreed:
            self._agreed = True
            self.seed = problem.group.seed(self.seed, problem.outer_parameters[0].device)

    def observe(self, problem: BilevelProblem, records: Sequence[Record]) -> None:
        self._astray, self._after = self._moved(problem), None
        super().observe(problem, records)

    def stepped(self, problem: BilevelProblem) -> None:
        self._after = [p.detach().clone() for p in problem.inner_parameters]

    def restart(self) -> None:
        super().restart()
        self._after, self._astray = None, None

    def _moved(self, problem: BilevelProblem) -> Tensor | None:
        """How often θ was not where the last step had put it; 0-d, None if there was no step."""
        if self._after is None or not self._steps:
            return self._astray
        pairs = zip(self._after, problem.inner_parameters, strict=True)
        moved = [(x != p.detach()).any() for x, p in pairs if x.shape == p.shape]
        count = torch.stack(moved).any().long()
        return count if self._astray is None else self._astray + count

    def _draw(self, layout: FlatLayout) -> Tensor:
        """(Q, h) directions."""
        rng = seeded_rng(self.seed, self._draws)
        self._draws += 1
        generator = seeded_generator(rng.getrandbits(62), layout.device)
        shape = (self.num_directions, layout.n)
        U = torch.randn(shape, dtype=layout.dtype, device=layout.device, generator=generator)
        if self.directions == "per_tensor":
            parts = torch.split(U, layout.sizes, dim=1)
            U = torch.cat([u / u.norm(dim=1, keepdim=True) for u in parts], dim=1)
        return U

    def _differences(
        self,
        problem: BilevelProblem,
        run: Runs,
        b: Sequence[Tensor | None],
        layout: FlatLayout,
        U: Tensor,
        astray: Tensor | None,
    ) -> tuple[Tensor, set[int]]:
        """((Q,) ⟨δ_j, b⟩, ids of what the losses depended on)."""
        phi = layout.flatten([t.detach() for t in problem.outer_parameters])
        mu = self._radius(problem, phi)
        run.check_repeatable()
        base = [p.detach().clone() for p in problem.inner_parameters]
        # Where θ is not where the steps lead to, neither are the other runs.
        if not run.ready or (astray is not None and not self.antithetic and bool(astray)):
            base = run(layout.unflatten(phi))
        slopes = []
        for u in U:
            ahead = run(layout.unflatten(phi + mu * u))
            back = run(layout.unflatten(phi - mu * u)) if self.antithetic else base
            gap = [x - y for x, y in zip(ahead, back, strict=True)]
            slopes.append(dot(gap, b) / (2 * mu if self.antithetic else mu))
        return torch.stack(slopes), run.reached

    def _radius(self, problem: BilevelProblem, phi: Tensor) -> Tensor:
        """μ, a 0-d tensor."""
        if self.smoothing is not None:
            return torch.full((), self.smoothing, dtype=phi.dtype, device=phi.device)
        dtypes = {p.dtype for p in [*problem.inner_parameters, *problem.outer_parameters]}
        base = max(_SMOOTHING.get(dtype, _SMOOTHING_LOW) for dtype in dtypes)
        return base * (1 + phi.square().mean().sqrt())

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self.seed, "draws": self._draws}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        if not isinstance(state_dict, Mapping) or not {"seed", "draws"} <= state_dict.keys():
            raise ValueError(f"This is no state of {type(self).__name__}: {state_dict!r:.80}")
        self.seed, self._draws = state_dict["seed"], state_dict["draws"]
