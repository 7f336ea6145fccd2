"""The inner steps on record at other φ: taken again, or, in the limit, by tangents."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._graph import check_twice_differentiable, graph_leaves, graph_nodes
from .._tensors import FlatLayout, inner_product
from ..inner_optimizer import Change, standing_in, unchanged
from ..recording import State, World, check_repeatable, copied
from ._linearised import THETA, Point, Update
from ._problem import BilevelProblem
from ._trajectory import RecordedStep, again_checked, follow, plus, records_of


class Runs:
    """The inner steps on record, taken again from their start at other φ.

    Attributes:
        reached: ids of the tensors that any of the losses depended on.
    """

    def __init__(
        self,
        problem: BilevelProblem,
        steps: list[RecordedStep],
        world: World,
        started: list[int],
    ) -> None:
        self._problem, self._steps, self._world, self._started = problem, steps, world, started
        self._changes: list[Change] = []
        self.reached: set[int] = set()
        if all(step.seen is None for step in steps):
            self._changes = [unchanged] * len(steps)

    @property
    def ready(self) -> bool:
        """Whether it is known what became of the gradient: otherwise the first run must be at φ."""
        return bool(self._changes)

    def __call__(self, values: Sequence[Tensor]) -> list[Tensor]:
        """θ at the end, with these ``values`` of the outer parameters."""
        initial = [values[i] for i in self._started] if self._started else None
        with standing_in(self._problem.outer_parameters, values):
            end, depended = follow(self._problem, self._steps, self._world, self._changes, initial)
        self.reached.update(depended)
        return end

    def check_repeatable(self) -> None:
        """RuntimeError unless the first step's closures give the recorded losses again."""
        step = self._steps[0]
        assert step.parameters is not None
        agree: list[Tensor] = []
        inner = self._problem.inner_parameters
        with standing_in(inner, step.parameters), self._world.fresh(step.records):
            for record in step.records:
                again_checked(record, agree)
        check_repeatable(self._problem.in_all_processes(agree))


def exact_slopes(
    problem: BilevelProblem,
    steps: list[RecordedStep],
    world: World,
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
    tuned = [t for t in problem.learned() if any(t is phi for phi in outer)]
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
    agree: list[Tensor] = []
    with world.fresh(records_of(steps)):
        for step in steps:
            gradients: list[Tensor | None] = [None] * len(inner)
            moved: list[list[Tensor | None]] = [[None] * len(inner) for _ in U]
            with standing_in(inner, parameters), problem.explained_training_errors():
                for weight, record in zip(step.weights, step.records, strict=True):
                    loss = again_checked(record, agree).loss
                    nodes = graph_nodes(loss)
                    check_twice_differentiable(nodes)
                    reached.update(map(id, graph_leaves(nodes)))
                    grads = torch.autograd.grad(
                        loss, [*inner, *outer], create_graph=True, allow_unused=True
                    )
                    own = [None if g is None else g.detach() for g in grads[: len(inner)]]
                    gradients = [plus(s, weight, g) for s, g in zip(gradients, own, strict=True)]
                    for j, (t, u) in enumerate(zip(tangents, directions, strict=True)):
                        parts = _gradient_tangent(grads, inner, t, u)
                        moved[j] = [
                            plus(s, weight, g) for s, g in zip(moved[j], parts, strict=True)
                        ]
            gradients = problem.over_processes(gradients)
            moved = [problem.over_processes(parts) for parts in moved]
            change = step.change_from(gradients)
            update = Update(
                problem.inner, step.settings, parameters, state, gradients, change, inner, tuned
            )
            tangents = [update.push(t, g, e) for t, g, e in zip(tangents, moved, eta, strict=True)]
            parameters = [update.result[i, THETA].detach() for i in range(len(inner))]
            state = update.next_state()
    check_repeatable(problem.in_all_processes(agree))
    slopes = [dot([t.get((i, THETA)) for i in range(len(inner))], b) for t in tangents]
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


def dot(x: Sequence[Tensor | None], y: Sequence[Tensor | None]) -> Tensor:
    """Σ xᵀy in float64 over the pairs that exist."""
    products = [
        inner_product(a.flatten(), b.flatten())
        for a, b in zip(x, y, strict=True)
        if a is not None and b is not None
    ]
    return torch.stack(products).sum() if products else torch.zeros((), dtype=torch.float64)
