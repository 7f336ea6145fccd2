"""What one hypergradient cost, and whether to trust it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

_GROWTH = 100.0  # of an adjoint over the inner steps
_NEAR = 0.1  # a residual that serves, whatever the tolerance was
_KINK = 0.2  # of a difference of gradients: what is above bends in corners


class Trouble(NamedTuple):
    """One reason not to trust a hypergradient.

    Attributes:
        kind: a name that stays, such as "residual".
        text: what it means and what to do.
    """

    kind: str
    text: str


class SelfCheck(NamedTuple):
    """The first products held against central differences of gradients, once a run.

    Attributes:
        product, cross: relative errors of Hx and of Jᵀx.
        kink: ‖∇f(θ+εx) + ∇f(θ-εx) - 2∇f(θ)‖ / ‖∇f(θ+εx) - ∇f(θ-εx)‖, small where f is smooth.
        tolerance: what the errors may be.
    """

    product: float
    cross: float
    kink: float
    tolerance: float

    @property
    def undecided(self) -> bool:
        """Whether f has corners (ReLU, max-pool) along the way: differences say nothing there."""
        return self.kink > _KINK


@dataclass(frozen=True)
class SolveReport:
    """The record of one hypergradient: a solve of (H + ρI) x = b, or inner steps taken again.

    Numbers that live on the device stay 0-d tensors until somebody reads them: making a report
    never waits for the device; printing it, or calling :meth:`trouble` or :meth:`as_dict`, does,
    once.

    Attributes:
        strategy: the strategy, with its settings.
        matvecs: products with the inner curvature in the whole hypergradient, the closing joint
            product (Hx, Jᵀx) included. A batched product of k columns counts k.
        rhs_norm: ‖b‖, the norm of the outer gradient with respect to the inner parameters.
        solution_norm: ‖x‖.
        inner_gradient_norm: ‖∇f‖ at the current point. The implicit function theorem speaks of
            points where it is zero.
        residual: ‖b - (H + ρI) x‖ / ‖b‖, where known; 0 for b = 0.
        rank: number of directions that a low-rank strategy kept.
        negative_curvature: whether the solve met a direction of nonpositive curvature.
        converged: whether the strategy met its own tolerance; None where it has none.
        gradients: inner gradients beyond those of the training itself, where inner steps are taken
            again.
        growth: ‖adjoint at the first inner step‖ / ‖b‖, of reverse mode through inner steps.
        astray: inner steps after which the parameters were not where the optimizer had put them.
        notes: remarks in words, such as a clamped rank.
        loss: f at the current point.
        hypergradient_norm: ‖dg/dφ‖ over all outer parameters.
        finite: whether losses, products, solution and hypergradient are all finite.
        diverged: whether a series grew instead of converging, and was cut.
        damping: ρ.
        curvature: xᵀ(H + ρI)x, where known.
        precision: machine epsilon of the coarsest dtype that the training loss computes in, where
            that is coarser than the vectors'.
        self_check: of the first hypergradient of a run.
    """

    strategy: str
    matvecs: int
    rhs_norm: Tensor
    solution_norm: Tensor | None = None
    inner_gradient_norm: Tensor | None = None
    residual: Tensor | None = None
    rank: Tensor | int | None = None
    negative_curvature: Tensor | bool | None = None
    converged: Tensor | bool | None = None
    gradients: int | None = None
    growth: Tensor | None = None
    astray: Tensor | None = None
    notes: tuple[str, ...] = ()
    loss: Tensor | None = None
    hypergradient_norm: Tensor | None = None
    finite: Tensor | bool | None = None
    diverged: Tensor | bool | None = None
    damping: Tensor | float | None = None
    curvature: Tensor | None = None
    precision: float | None = None
    self_check: SelfCheck | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, booleans and None, for loggers; one sync."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        check = values.pop("self_check")
        values["self_check_product"] = None if check is None else check.product
        values["self_check_cross"] = None if check is None else check.cross
        values["notes"] = "; ".join(self.notes)
        on_device = {name: v for name, v in values.items() if isinstance(v, Tensor)}
        for name, number in zip(on_device, read_scalars(list(on_device.values())), strict=True):
            kind = on_device[name].dtype
            whole = not kind.is_floating_point and kind != torch.bool
            values[name] = bool(number) if kind == torch.bool else int(number) if whole else number
        return values

    def troubles(self) -> list[Trouble]:
        """What a user should look at before trusting the hypergradient; [] if nothing. One sync."""
        known = self.as_dict()
        found = [Trouble(kind, text) for kind, text in _of_size(known)]
        found += [Trouble(kind, text) for kind, text in _of_the_solve(known)]
        check = self.self_check
        if check is not None and not check.undecided:
            wrong = [
                f"{name} is off by {error:.1%}"
                for name, error in (("Hx", check.product), ("Jᵀx", check.cross))
                if not error <= check.tolerance
            ]
            if wrong:
                found.append(Trouble("self_check", _SELF_CHECK.format(" and ".join(wrong))))
        return found

    def trouble(self) -> list[str]:
        """The texts of :meth:`troubles`."""
        return [text for _, text in self.troubles()]

    def __str__(self) -> str:
        lines = []
        for name, value in self.as_dict().items():
            if name == "notes" or value is None:
                continue
            text = f"{value:.4g}" if isinstance(value, float) else str(value)
            lines.append(f"{name:20} {text}")
        lines += [f"{'note':20} {note}" for note in self.notes]
        lines += [f"{'trouble':20} {text}" for text in self.trouble()]
        return "\n".join(lines)


_SELF_CHECK = (
    "against differences of gradients {}: second derivatives of the training loss are wrong. "
    "Suspects: a custom autograd.Function without a differentiable backward, "
    "weight_norm of torch, old and new (write v * (g / v.norm()) instead), hooks that change "
    "gradients, a random source of the closure's own. To find it leave parts of the loss out"
)


def _of_size(known: dict[str, Any]) -> list[tuple[str, str]]:
    found = []
    sizes = [known[name] for name in ("solution_norm", "growth") if known[name] is not None]
    if known["finite"] is False or not all(map(math.isfinite, sizes)):
        found.append(
            (
                "not_finite",
                "not finite: a NaN or inf is in the losses, the parameters, the products or the "
                "hypergradient. The outer parameters were left as they are. Look for it in the "
                "training loss (torch.autograd.set_detect_anomaly), also in its second derivative: "
                "norms and square roots at 0 have none",
            )
        )
    if known["growth"] is not None and known["growth"] > _GROWTH:
        found.append(
            (
                "unstable",
                f"the adjoint grew {known['growth']:.2g} times over the inner steps: the inner "
                "loop is unstable; lower its learning rate or use a shorter window",
            )
        )
    if known["astray"]:
        found.append(
            (
                "astray",
                f"after {known['astray']} inner step(s) the parameters were not where the "
                "optimizer had put them (a projection, a swap?): that is not differentiated",
            )
        )
    return found


def _of_the_solve(known: dict[str, Any]) -> list[tuple[str, str]]:
    found = []
    if known["negative_curvature"]:
        found.append(
            (
                "negative_curvature",
                "negative curvature: H + damping is not positive definite; raise damping, or use "
                "curvature=GaussNewton() with a closure that returns (loss, outputs)",
            )
        )
    residual = known["residual"]
    if residual is not None and not residual <= 1:
        found.append(
            (
                "residual",
                f"residual {residual:.2g} > 1: further from solving the system than x = 0; raise "
                "damping, rank or max_iter",
            )
        )
    if known["diverged"]:
        found.append(
            (
                "diverged",
                "the series diverged and was cut at its shortest term: H + damping has eigenvalues "
                "below 0 or above 2/scale; lower scale or raise damping",
            )
        )
    if known["converged"] is False and not (residual is not None and residual <= _NEAR):
        found.append(
            (
                "not_converged",
                "the strategy did not reach its tolerance; raise max_iter, tol or damping",
            )
        )
    precision = known["precision"]
    if precision is not None and residual is not None and residual < precision:
        found.append(
            (
                "precision",
                f"the residual of {residual:.1g} is smaller than the rounding of the products, "
                f"{precision:.1g}, for the training loss computes in half precision; for a better "
                "solution give outer_step a closure outside of autocast, outer_step(val, closure)",
            )
        )
    rho, size, energy = known["damping"], known["solution_norm"], known["curvature"]
    if rho and size and energy is not None and rho * size * size > energy / 2 > 0:
        share = rho * size * size / energy
        found.append(
            (
                "damping",
                f"damping is {share:.0%} of the curvature along the solution: the answer is the "
                "damping's more than the loss's; lower damping, or scale the training loss up",
            )
        )
    return found


def read_scalars(tensors: Sequence[Tensor]) -> list[float]:
    """Their values, in one transfer for each device."""
    if not tensors:
        return []
    device = tensors[0].device
    wide = torch.float32 if device.type == "mps" else torch.float64
    stacked = torch.stack([t.detach().to(device=device, dtype=wide).reshape(()) for t in tensors])
    values: list[float] = stacked.tolist()
    return values
