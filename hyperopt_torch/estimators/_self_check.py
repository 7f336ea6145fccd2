"""The first products held against differences of first gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._tensors import FlatLayout, inner_product, seeded_generator
from ..inner_optimizer import standing_in
from ..plain_gradient import STEPS, size_of
from ..recording import InnerObjective
from ..report import SelfCheck
from ._function import InnerFunction
from ._problem import BilevelProblem

_TOLERANCE = 0.02
_NOISE = 100.0  # rounding of the differences counts this many times


def self_check(
    problem: BilevelProblem, objective: InnerObjective, f: InnerFunction
) -> SelfCheck | None:
    """How far one product Hx, and one Jᵀx, are from central differences of first gradients.

        Hx ≈ (∇f(θ + εx) - ∇f(θ - εx)) / 2ε,    and Jᵀx from the same two gradients

    along a random x that moves every tensor by the same fraction of its size. It finds what no list
    can: a custom Function with a wrong second derivative, hooks, a closure that draws from a source
    that nobody knows of. Without a word in half precision, where differences say nothing.

    Cost: two gradients of f and one product, once. One sync.
    """
    layout = f.layout
    step = STEPS.get(layout.dtype)
    full = f.precision is None and set(layout.dtypes) == {layout.dtype}
    if step is None or not full or layout.device.type == "meta":
        return None
    if any(not p.numel() for p in problem.inner_parameters):
        return None
    sizes = [size_of(p) for p in problem.inner_parameters]
    x, epsilon = _direction(layout, sizes, step)
    found = f.joint(x)  # first: the closure may write to tensors that its graph holds
    plus, minus = (_gradients(problem, objective, f, x, e) for e in (epsilon, -epsilon))
    expected = [(p - m) / (2 * epsilon) for p, m in zip(plus, minus, strict=True)]
    # Each tensor counts by its size, as in the direction: none hides behind a larger one.
    scale = torch.cat([s.expand(n) for s, n in zip(sizes, layout.sizes, strict=True)])
    base = [f.gradient, torch.zeros_like(expected[1])]
    bend = _norm((plus[0] + minus[0] - 2 * base[0]) * scale)
    apart = _norm((plus[0] - minus[0]) * scale)
    eps = torch.finfo(layout.dtype).eps
    errors = [
        _relative(found[0] * scale, expected[0] * scale, _norm(plus[0] * scale) * eps / epsilon),
        _relative(found[1], expected[1], _norm(plus[1]) * eps / epsilon),
    ]
    kink = bend / torch.where(apart > 0, apart, 1.0)
    product, cross, kinked = torch.stack([*errors, kink]).tolist()
    return SelfCheck(product, cross, kinked, _TOLERANCE)


def _direction(layout: FlatLayout, sizes: Sequence[Tensor], step: float) -> tuple[Tensor, Tensor]:
    """A random x with ‖x_l‖ about the size of each tensor l, and ε."""
    generator = seeded_generator(0, layout.device)
    noise = torch.randn(layout.n, dtype=layout.dtype, device=layout.device, generator=generator)
    parts = torch.split(noise, layout.sizes)
    x = torch.cat([u * (s / max(len(u), 1) ** 0.5) for u, s in zip(parts, sizes, strict=True)])
    pairs = zip(torch.split(x, layout.sizes), sizes, strict=True)
    longest = torch.stack([u.norm() / s for u, s in pairs]).amax()
    return x, step / longest


def _gradients(
    problem: BilevelProblem,
    objective: InnerObjective,
    f: InnerFunction,
    x: Tensor,
    epsilon: Tensor,
) -> tuple[Tensor, Tensor]:
    """(∇_θ f, ∇_φ f) at θ + εx, with the sign and the weights of ``f``."""
    inner, outer = problem.inner_parameters, problem.outer_parameters
    moved = [
        torch.add(p.detach(), d * epsilon)
        for p, d in zip(inner, f.layout.unflatten(x), strict=True)
    ]
    theta, phi = torch.zeros_like(x), torch.zeros_like(f.outer_layout.flatten(outer)).detach()
    with standing_in(inner, moved), objective.world.fresh():
        for weight, evaluate in objective.terms:
            loss = evaluate().loss
            grads = torch.autograd.grad(loss, [*inner, *outer], allow_unused=True)
            factor = f.sign * weight
            theta = theta + factor * f.layout.flatten(grads[: len(inner)])
            phi = phi + factor * f.outer_layout.flatten(grads[len(inner) :])
    return theta, phi


def _relative(found: Tensor, expected: Tensor, noise: Tensor) -> Tensor:
    size = torch.maximum(_norm(expected), _norm(found)) + _NOISE * noise
    return _norm(found - expected) / torch.where(size > 0, size, 1.0)


def _norm(x: Tensor) -> Tensor:
    return inner_product(x, x).sqrt()
