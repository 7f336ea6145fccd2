"""Zeroth order on the response Jacobian: perturbed inner runs instead of second derivatives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._graph import check_twice_differentiable, graph_leaves, graph_nodes
from .._tensors import FlatLayout, draw_seed, inner_product, seeded_generator, seeded_rng
from ..errors import check_choice, check_count, check_number
from ..inner_optimizer import learned, standing_in, step_hooks
from ..recording import (
    RecordedStep,
    State,
    again,
    buffers_at,
    check_repeatable,
    copied,
    earliest,
    same_loss,
    set_random_state,
)
from ..report import SolveReport
from ._linearised import THETA, Point, Update
from ._trajectory import TrajectoryEstimator, follow
from .base import BilevelProblem, combined

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
        self.num_directions = check_count("num_directions", num_directions)
        self.smoothing = None if smoothing is None else check_number("smoothing", smoothing)
        self.directions = check_choice("directions", directions, ("gaussian", "per_tensor"))
        self.antithetic = bool(antithetic)
        self.seed = draw_seed(generator)
        self._draws = 0

    def __repr__(self) -> str:
        return (
            f"PZOBO(num_directions={self.num_directions}, smoothing={self.smoothing}, "
            f"directions={self.directions!r}, antithetic={self.antithetic})"
        )

    def check(self, problem: BilevelProblem) -> None:
        if self.smoothing == 0 and (
            "differentiable" not in problem.inner.defaults or step_hooks(problem.inner)
        ):
            raise ValueError(
                f"Invalid smoothing: 0; {type(problem.inner).__name__} has no `differentiable` "
                "form, or hooks around its step, so the limit itself cannot be taken. Expected "
                "smoothing > 0, or None."
            )

    def estimate(self, problem: BilevelProblem, outer_loss: Tensor) -> list[Tensor | None]:
        self.check(problem)
        b, direct = problem.outer_gradients(outer_loss)
        steps = self.recorded(problem)
        layout = FlatLayout(problem.outer_parameters)
        U = self._draw(layout)  # (Q, h)
        started = self.started_from(problem)
        if self.smoothing == 0:
            slopes, reached = _exact(problem, steps, started, b, layout, U)
        else:
            slopes, reached = self._differences(problem, steps, started, b, layout, U)
        tuned = {id(t) for t in learned(problem.inner)} | reached
        tuned |= {id(problem.outer_parameters[i]) for i in started}
        indirect = slopes.to(U.dtype) @ U / self.num_directions
        runs = self.num_directions * (2 if self.antithetic and self.smoothing != 0 else 1)
        self.report = SolveReport(
            strategy=repr(self),
            matvecs=0,
            rhs_norm=_dot(b, b).sqrt(),
            gradients=len(steps) * (1 if self.smoothing == 0 else runs),
        )
        return combined(
            direct,
            layout.unflatten(indirect),
            [id(phi) in tuned for phi in problem.outer_parameters],
            "No inner step on record depends on any outer parameter, so the hypergradient is the "
            "direct term ∂g/∂φ alone.",
        )

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
        steps: list[RecordedStep],
        started: list[int],
        b: Sequence[Tensor | None],
        layout: FlatLayout,
        U: Tensor,
    ) -> tuple[Tensor, set[int]]:
        """((Q,) ⟨δ_j, b⟩, ids of what the losses depended on)."""
        outer = problem.outer_parameters
        phi = layout.flatten([t.detach() for t in outer])
        mu = self._radius(problem, phi)
        base = [p.detach().clone() for p in problem.inner_parameters]

        def run(shift: Tensor) -> list[Tensor]:
            values = [
                value.to(t.dtype)
                for value, t in zip(layout.unflatten(phi + shift), outer, strict=True)
            ]
            initial = [values[i] for i in started] if started else None
            with standing_in(outer, values):
                end, depended = follow(problem, steps, initial)
            reached.update(depended)
            return end

        reached: set[int] = set()
        check_repeatable([_first_loss_again(problem, steps[0])])
        slopes = []
        for u in U:
            ahead = run(mu * u)
            back = run(-mu * u) if self.antithetic else base
            gap = [x - y for x, y in zip(ahead, back, strict=True)]
            slopes.append(_dot(gap, b) / (2 * mu if self.antithetic else mu))
        return torch.stack(slopes), reached

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
        self.seed, self._draws = state_dict["seed"], state_dict["draws"]


def _first_loss_again(problem: BilevelProblem, step: RecordedStep) -> Tensor:
    """Whether the closure gives the recorded loss at the recorded point; 0-d bool."""
    assert step.parameters is not None
    set_random_state(problem.inner_parameters[0].device, step.random)
    with standing_in(problem.inner_parameters, step.parameters), buffers_at(step.buffers):
        return same_loss(step.loss, again(step).loss.detach())


def _exact(
    problem: BilevelProblem,
    steps: list[RecordedStep],
    started: list[int],
    b: Sequence[Tensor | None],
    layout: FlatLayout,
    U: Tensor,
) -> tuple[Tensor, set[int]]:
    """The limit of the differences: tangents pushed through the steps."""
    first = steps[0]
    assert first.parameters is not None
    assert first.state is not None
    inner, outer = problem.inner_parameters, problem.outer_parameters
    tuned = [t for t in learned(problem.inner) if any(t is phi for phi in outer)]
    directions = [layout.unflatten(u) for u in U]
    tangents: list[Point] = [
        {(theta, THETA): u[phi] for theta, phi in enumerate(started)} for u in directions
    ]
    eta = [
        {id(phi): d for phi, d in zip(outer, u, strict=True) if any(phi is t for t in tuned)}
        for u in directions
    ]
    parameters = [p.clone() for p in first.parameters]
    state: State = copied(first.state)
    reached: set[int] = set()
    agree = []
    with buffers_at(earliest(steps)):
        for step in steps:
            set_random_state(inner[0].device, step.random)
            with standing_in(inner, parameters), problem.explained_training_errors():
                loss = again(step).loss
                agree.append(same_loss(step.loss, loss.detach()))
                nodes = graph_nodes(loss)
                check_twice_differentiable(nodes)
                reached.update(map(id, graph_leaves(nodes)))
                grads = torch.autograd.grad(
                    loss, [*inner, *outer], create_graph=True, allow_unused=True
                )
                moved = [
                    _gradient_tangent(grads, inner, t, u)
                    for t, u in zip(tangents, directions, strict=True)
                ]
            gradients = [None if g is None else g.detach() for g in grads[: len(inner)]]
            update = Update(
                problem.inner, step.settings, parameters, state, gradients, inner, tuned
            )
            tangents = [update.push(t, g, e) for t, g, e in zip(tangents, moved, eta, strict=True)]
            parameters = [update.result[i, THETA].detach() for i in range(len(inner))]
            state = update.next_state()
    check_repeatable(agree)
    slopes = [_dot([t.get((i, THETA)) for i in range(len(inner))], b) for t in tangents]
    return torch.stack(slopes), reached


def _gradient_tangent(
    grads: tuple[Tensor | None, ...], inner: list[Tensor], tangent: Point, u: list[Tensor]
) -> list[Tensor | None]:
    """H θ̇ + J u, from the gradients with respect to both levels: their graph is symmetric."""
    directions = [*(tangent.get((i, THETA)) for i in range(len(inner))), *u]
    live = [
        (g, d)
        for g, d in zip(grads, directions, strict=True)
        if g is not None and d is not None and g.requires_grad
    ]
    if not live:
        return [None] * len(inner)
    return list(
        torch.autograd.grad(
            [g for g, _ in live],
            inner,
            [d.to(g.dtype) for g, d in live],
            retain_graph=True,
            allow_unused=True,
        )
    )


def _dot(x: Sequence[Tensor | None], y: Sequence[Tensor | None]) -> Tensor:
    """Σ xᵀy in float64 over the pairs that exist."""
    products = [
        inner_product(a.flatten(), b.flatten())
        for a, b in zip(x, y, strict=True)
        if a is not None and b is not None
    ]
    return torch.stack(products).sum() if products else torch.zeros((), dtype=torch.float64)
