"""What one hypergradient cost, and whether to trust it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

_GROWTH = 100.0  # of an adjoint over the inner steps
_NEAR = 0.1  # a residual that serves, whatever the tolerance was
_SIZES = ("loss", "rhs_norm", "solution_norm", "hypergradient_norm", "growth")
_KINK = 0.2  # of a difference of gradients: what is above bends in corners


class Trouble(NamedTuple):
    """One reason not to trust a hypergradient.

    Attributes:
        kind: a name that stays, such as "residual": a heading of docs/troubleshooting.md.
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
    kink: float | None
    tolerance: float

    @property
    def undecided(self) -> bool:
        """Whether f has corners (ReLU, max-pool) along the way: differences say nothing there."""
        return self.kink is not None and self.kink > _KINK


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
        self_tuned: whether the strategy chose ρ itself.
        curvature: xᵀ(H + ρI)x, where known.
        precision: machine epsilon of the coarsest dtype that the training loss computes in, where
            that is coarser than the vectors'.
        self_check: of the first hypergradient of a run.
        kink: of products by differences, the largest ‖g₊ + g₋ - 2g₀‖ / ‖g₊ - g₋‖ of a solve: small
            where f is smooth, about 1 where it has kinks.
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
    self_tuned: bool = False
    curvature: Tensor | None = None
    precision: float | None = None
    self_check: SelfCheck | None = None
    kink: Tensor | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, booleans and None, for loggers; one sync."""
        return _flat(plain([vars(self)])[0])

    def troubles(self) -> list[Trouble]:
        """What a user should look at before trusting the hypergradient; [] if nothing. One sync."""
        return troubles_in(plain([vars(self)])[0])

    def trouble(self) -> list[str]:
        """The texts of :meth:`troubles`."""
        return [text for _, text in self.troubles()]

    def __str__(self) -> str:
        known, lines = plain([vars(self)])[0], []
        for name, value in _flat(known).items():
            if name == "notes" or value is None:
                continue
            text = f"{value:.4g}" if isinstance(value, float) else str(value)
            lines.append(f"{name:20} {text}")
        lines += [f"{'note':20} {note}" for note in self.notes]
        lines += [f"{'trouble':20} {text}" for _, text in troubles_in(known)]
        return "\n".join(lines)


def plain(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same dicts with numbers in place of 0-d tensors: one transfer for each device.

    All reports of a run can be read at once, as :class:`~hyperopt_torch.HealthLog` does.
    """
    found = [dict(row) for row in rows]
    there: dict[torch.device, list[tuple[dict[str, Any], str]]] = {}
    for row in found:
        for name, value in row.items():
            if isinstance(value, Tensor):
                there.setdefault(value.device, []).append((row, name))
    for device, places in there.items():
        wide = torch.float32 if device.type == "mps" else torch.float64
        tensors = [row[name].detach().reshape(()) for row, name in places]
        numbers = torch.stack([t.to(wide) for t in tensors]).tolist()
        for (row, name), tensor, number in zip(places, tensors, numbers, strict=True):
            kind = tensor.dtype
            whole = not kind.is_floating_point and kind != torch.bool
            row[name] = bool(number) if kind == torch.bool else int(number) if whole else number
    return found


def _flat(known: dict[str, Any]) -> dict[str, Any]:
    """Nothing nested: for loggers."""
    check: SelfCheck | None = known["self_check"]
    flat = {name: value for name, value in known.items() if name != "self_check"}
    flat["self_check_product"] = None if check is None else check.product
    flat["self_check_cross"] = None if check is None else check.cross
    flat["notes"] = "; ".join(known["notes"])
    return flat


def troubles_in(known: Mapping[str, Any]) -> list[Trouble]:
    """The troubles of a report whose fields were read by :func:`plain`."""
    if not _is_finite(known):  # the cause; what else the numbers seem to say is its consequence
        return [Trouble("not_finite", _TEXTS["not_finite"])]
    found = [*_of_the_steps(known), *_of_the_products(known)]
    if known["rhs_norm"] != 0 or known["solution_norm"]:  # b = 0 has the solution x = 0: exact
        found += _of_the_solve(known)
    found.sort(key=lambda one: list(_TEXTS).index(one[0]))
    return [Trouble(kind, _TEXTS[kind].format(**numbers)) for kind, numbers in found]


_Found = Iterator[tuple[str, dict[str, Any]]]  # a kind, and the numbers in its text


def _is_finite(known: Mapping[str, Any]) -> bool:
    sizes = [known[name] for name in _SIZES if known[name] is not None]
    return known["finite"] is not False and all(map(math.isfinite, sizes))


def _of_the_steps(known: Mapping[str, Any]) -> _Found:
    if known["growth"] is not None and known["growth"] > _GROWTH:
        yield "unstable", {"growth": known["growth"]}
    if known["astray"]:
        yield "astray", {"steps": known["astray"]}


def _of_the_products(known: Mapping[str, Any]) -> _Found:
    if known["kink"] is not None and known["kink"] > _KINK:
        yield "kink", {"kink": known["kink"]}
    check: SelfCheck | None = known["self_check"]
    if check is None or check.undecided:
        return
    errors = {"Hx": check.product, "Jᵀx": check.cross}
    wrong = [f"{name} is off by {e:.1%}" for name, e in errors.items() if not e <= check.tolerance]
    if wrong:
        yield "self_check", {"wrong": " and ".join(wrong)}


def _of_the_solve(known: Mapping[str, Any]) -> _Found:
    residual, precision = known["residual"], known["precision"]
    if known["negative_curvature"]:
        yield "negative_curvature", {}
    if residual is not None and not residual <= 1:  # NaN is no number below 1
        yield "residual", {"residual": residual}
    if known["diverged"]:
        yield "diverged", {}
    if known["converged"] is False and not (residual is not None and residual <= _NEAR):
        yield "not_converged", {}
    if precision is not None and residual is not None and residual < precision:
        yield "precision", {"residual": residual, "precision": precision}
    rho, size, energy = known["damping"], known["solution_norm"], known["curvature"]
    outweighs = rho and size and energy is not None and rho * size * size > energy / 2 > 0
    if outweighs and not known["self_tuned"]:  # else it is what the system called for
        yield "damping", {"share": rho * size * size / energy}


_TEXTS = {  # in the order in which they are told: what spoils most comes first
    "not_finite": "not finite: a NaN or inf is in the losses, the parameters, the products or the "
    "hypergradient. The outer parameters were left as they are. Look for it in the training loss "
    "(torch.autograd.set_detect_anomaly), also in its second derivative: norms and square roots "
    "at 0 have none",
    "self_check": "against differences of gradients {wrong}: second derivatives of the training "
    "loss are wrong. Suspects: a custom autograd.Function without a differentiable backward, "
    "weight_norm of torch, old and new (write v * (g / v.norm()) instead), hooks that change "
    "gradients, a random source of the closure's own. To find it leave parts of the loss out",
    "kink": "differences of gradients bend by {kink:.0%}: the training loss has kinks (ReLU, "
    "max-pool) within the step, where they are no second derivatives; use a strategy that asks for "
    "few products (Identity(), Nystrom()), a smooth activation, or exact products",
    "unstable": "the adjoint grew {growth:.2g} times over the inner steps: the inner loop is "
    "unstable; lower its learning rate or use a shorter window",
    "astray": "after {steps} inner step(s) the parameters were not where the optimizer had put "
    "them (a projection, a swap?): that is not differentiated",
    "negative_curvature": "negative curvature: H + damping is not positive definite; raise "
    "damping, or use curvature=GaussNewton() with a closure that returns (loss, outputs)",
    "residual": "residual {residual:.2g} > 1: further from solving the system than x = 0; raise "
    "damping, rank or max_iter",
    "diverged": "the series diverged and was cut at its shortest term: H + damping has "
    "eigenvalues below 0 or above 2/scale; lower scale or raise damping",
    "not_converged": "the strategy did not reach its tolerance; raise max_iter, tol or damping",
    "precision": "the residual of {residual:.1g} is smaller than the rounding of the products, "
    "{precision:.1g}, for the training loss computes in half precision; for a better solution "
    "give outer_step a closure outside of autocast, outer_step(val, closure)",
    "damping": "damping is {share:.0%} of the curvature along the solution: the answer is the "
    "damping's more than the loss's; lower damping, or scale the training loss up",
}
KINDS = tuple(_TEXTS)  # of trouble
