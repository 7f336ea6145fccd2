"""What happened to the gradient between the backward pass and the optimizer's step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_SAME = 1e-3  # relative: what is nearer is rounding
Gradients = list[Tensor | None]  # one for each inner parameter; None where there is none
Change = Callable[[Gradients], Gradients]
_Hooks = list[Callable[[Tensor], Tensor | None]]


def unchanged(raw: Gradients) -> Gradients:
    """The gradient of the loss itself: what an optimizer sees in a plain loop."""
    return raw


@dataclass(frozen=True)
class SeenGradient:
    """How the gradient looked when the optimizer saw it, kept in a few numbers.

    A replayed step computes the gradient of the loss; the optimizer may have seen it clipped by
    ``torch.nn.utils.clip_grad_norm_`` or ``clip_grad_value_``, divided, or changed by hooks on the
    parameters.

    Attributes:
        norms: (P,) of each parameter's gradient, zero where there was none.
        largest: () of all entries, in absolute value.
        hooks: those on each parameter at that time; None where there were none at all.
    """

    norms: Tensor
    largest: Tensor
    hooks: list[_Hooks] | None

    @classmethod
    def of(cls, parameters: Sequence[Tensor], untouched: bool) -> SeenGradient | None:
        """Read off ``.grad``; waits for nothing.

        None where nobody can have changed it: it is ``untouched`` since the backward pass, and
        there are no hooks.
        """
        hooks = [list((p._backward_hooks or {}).values()) for p in parameters]
        if (untouched and not any(hooks)) or all(p.grad is None for p in parameters):
            return None
        norms, largest = _print([p.grad for p in parameters])
        return cls(norms, largest, hooks if any(hooks) else None)

    def change_from(self, raw: Gradients) -> Change:
        """What led from the gradient ``raw`` of that step to what was seen; differentiable.

        Clipping by norm or by value, a constant factor: whichever explains the numbers, decided on
        the device. Hooks are called only where the numbers say that they changed something: one
        that logs has no business here.
        """
        raw = [None if g is None else g.detach() for g in raw]
        if all(g is None for g in raw):
            return unchanged
        if self.hooks is not None and not bool(_gap(_print(raw)[0], self.norms) <= _SAME):
            hooks = self.hooks
            clip = self._clipping([_hooked(g, own) for g, own in zip(raw, hooks, strict=True)])
            return lambda g: clip([_hooked(x, own) for x, own in zip(g, hooks, strict=True)])
        return self._clipping(raw)

    def _clipping(self, raw: Gradients) -> Change:
        norms, _ = _print(raw)
        own, then = norms.norm(), self.norms.norm()
        factor = then / torch.where(own > 0, own, 1.0)
        same = _gap(norms, self.norms) <= _SAME
        by_norm = ~same & (_gap(norms * factor, self.norms) <= _SAME)
        clamped, _ = _print([None if g is None else self._clamped(g) for g in raw])
        by_value = ~same & ~by_norm & (_gap(clamped, self.norms) <= _SAME)
        shorter = factor < 1  # clipping shortens, to a length that depends on no gradient

        def clip(gradients: Gradients) -> Gradients:
            norm = _norm([g for g in gradients if g is not None])
            scale = torch.where(shorter, then / torch.where(norm > 0, norm, 1.0), factor)
            return [
                g
                if g is None
                else torch.where(
                    by_norm,
                    g * scale.to(g.dtype),
                    torch.where(by_value, self._clamped(g), g),
                )
                for g in gradients
            ]

        return clip

    def _clamped(self, gradient: Tensor) -> Tensor:
        limit = self.largest.to(gradient.dtype)
        return gradient.clamp(-limit, limit)


def _hooked(gradient: Tensor | None, hooks: _Hooks) -> Tensor | None:
    for hook in hooks:
        changed = None if gradient is None else hook(gradient)
        gradient = gradient if changed is None else changed
    return gradient


def _norm(gradients: Sequence[Tensor]) -> Tensor:
    """Of all of them together, in float32 at least."""
    norms = torch._foreach_norm(list(gradients))
    total: Tensor = torch.linalg.vector_norm(torch.stack([n.to(_wide(n)) for n in norms]))
    return total


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _print(gradients: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    """((P,) norms, () largest entry) without a graph; some gradient must be there."""
    some = next(g for g in gradients if g is not None)
    with torch.no_grad():
        zero = some.new_zeros(())
        dense = [zero if g is None or not g.numel() else g.detach().to_dense() for g in gradients]
        norms = torch.stack([n.to(_wide(some)) for n in torch._foreach_norm(dense)])
        largest = torch.stack([n.to(_wide(some)) for n in torch._foreach_norm(dense, torch.inf)])
        return norms, largest.amax()


def _gap(norms: Tensor, then: Tensor) -> Tensor:
    size = torch.linalg.vector_norm(then).clamp(min=torch.finfo(then.dtype).tiny)
    gap: Tensor = torch.linalg.vector_norm(norms - then) / size
    return gap
