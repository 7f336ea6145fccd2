"""What a training closure may return, and what it means."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten


class PerSample(NamedTuple):
    """f = mean(weights · losses) + penalty, in its parts: for a training closure to return.

    A single number tells a strategy less: the Fisher matrix of a weighted loss is made of the rows
    √w_i ∇ℓ_i, and the curvature of the penalty comes on top.

    Attributes:
        losses: (B,) one loss ℓ_i a sample, without its weight.
        weights: (B,) weights w_i >= 0, differentiable in the outer parameters; None: all one.
        penalty: scalar, such as a weight decay, differentiable in both levels; None: zero.

    Example:
        >>> losses = torch.tensor([1.0, 3.0], requires_grad=True)
        >>> evaluate(PerSample(losses, torch.tensor([2.0, 1.0]), 0.5)).loss.item()
        3.0
    """

    losses: Tensor
    weights: Tensor | None = None
    penalty: Tensor | float | None = None


TrainLoss = Tensor | PerSample | tuple[Any, Any] | Callable[[], Any] | list[Callable[[], Any]]


@dataclass(slots=True)
class Evaluation:
    """One evaluation of the training loss, its graph alive.

    Attributes:
        loss: the scalar inner objective f = mean(weights · per_sample) + penalty.
        per_sample: (B,) losses, where the closure returned them.
        outputs: the model's outputs, where the closure returned ``(loss, outputs)``.
        weights: (B,) their weights, where the closure returned them.
        penalty: the scalar penalty, where the closure returned it.
    """

    loss: Tensor
    per_sample: Tensor | None = None
    outputs: Any = None
    weights: Tensor | None = None
    penalty: Tensor | None = None

    @property
    def batch_size(self) -> int | None:
        """B, from the per-sample losses, or from the outputs if their first dimensions agree."""
        told = tree_flatten(self.outputs if self.per_sample is None else self.per_sample)[0]
        sizes = {len(t) for t in told if isinstance(t, Tensor) and t.ndim > 0}
        return sizes.pop() if len(sizes) == 1 else None


def evaluate(train_loss: TrainLoss) -> Evaluation:
    """Calls the closure, if it is one, and reads what came back.

    Raises:
        TypeError: what came back is no tensor, no ``PerSample`` and no ``(loss, outputs)``.
        ValueError: the loss has more than one dimension, or no entries; or the parts of a
            ``PerSample`` do not fit together.
        RuntimeError: the loss carries no graph.
    """
    value: Any = train_loss
    if callable(train_loss):
        if torch.is_grad_enabled():
            value = train_loss()
        else:
            with torch.enable_grad():
                value = train_loss()
    outputs = None
    if isinstance(value, tuple) and not isinstance(value, PerSample) and len(value) == 2:
        value, outputs = value
    losses, weights, penalty = value if isinstance(value, PerSample) else PerSample(value)
    _check_losses(losses)
    if isinstance(value, PerSample):
        _check_parts(value)
    if losses.ndim == 0:
        return Evaluation(losses, outputs=outputs)
    with torch.enable_grad():
        loss = (losses if weights is None else weights * losses).mean()
        loss = loss if penalty is None else loss + penalty
    known = penalty if isinstance(penalty, Tensor) else None
    return Evaluation(loss, losses, outputs, weights, known)


def _check_losses(losses: Any) -> None:
    if not isinstance(losses, Tensor):
        raise TypeError(
            f"The training closure returned {type(losses).__name__}; it must return the loss: a "
            "scalar tensor, a 1-D tensor of per-sample losses, PerSample(losses, weights, "
            "penalty), or (loss, outputs). Is a `return` missing?"
        )
    if losses.ndim > 1 or losses.numel() == 0:
        raise ValueError(
            f"The training loss has shape {tuple(losses.shape)}; expected a scalar, or a 1-D "
            "tensor of per-sample losses."
        )
    if not losses.requires_grad:
        raise RuntimeError(
            "The training loss is detached: it carries no graph to differentiate. Compute it from "
            "the parameters outside torch.no_grad(), without .detach(), .item() or .data."
        )


def _check_parts(parts: PerSample) -> None:
    """ValueError unless (B,) losses, (B,) weights or None, and a scalar penalty, number or None."""

    def described(part: Any) -> str:
        return f"shape {tuple(part.shape)}" if isinstance(part, Tensor) else repr(part)

    losses, weights, penalty = parts
    if losses.ndim != 1:
        raise ValueError("PerSample needs the losses one by one, (B,); their mean is no use to it.")
    if weights is not None and (not isinstance(weights, Tensor) or weights.shape != losses.shape):
        raise ValueError(
            f"Invalid weights in PerSample: {described(weights)}; expected one weight a loss, a "
            f"tensor of shape {tuple(losses.shape)}."
        )
    scalar = penalty.ndim == 0 if isinstance(penalty, Tensor) else isinstance(penalty, (int, float))
    if penalty is not None and not scalar:
        raise ValueError(
            f"Invalid penalty in PerSample: {described(penalty)}; expected a scalar tensor."
        )
