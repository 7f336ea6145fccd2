"""The two levels as an estimator sees them, and what all estimators do with them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .._graph import check_differentiable, explained
from .._tensors import dense, here, trainable
from ..distributed import Group
from ..inner_optimizer import Facts, Prober, learned, parameters_of
from ..plain_gradient import plain_gradients
from ..recording import OUTSIDE, InnerObjective, StreamReader, World


@dataclass
class BilevelProblem:
    """The two levels as an estimator sees them, at one moment.

    Attributes:
        inner: the optimizers of θ, as they are beneath any wrapper.
        outer: the optimizer of φ.
        objective: the inner objective; None before there is one.
        keep_outer_graph: whether the validation loss must survive, as for a pure query.
        averaged: where the validation loss was computed with an average of θ instead, its tensors.
        scale: what losses are multiplied by against underflow, and gradients divided by.
        hook_zeros: where hooks on inner parameters left no gradient in the last step, by number.
        untouched: whether ``.grad`` is known to be as the backward pass left it.
        self_check: whether to hold the first products against differences of gradients.
        reader: of the random streams, where there is one that knows where they stand.
        group: the processes that share the inner problem, each with its own batch; None: this one.
        begins: whether the evaluation at hand is the first micro-batch of an inner step.
    """

    inner: Sequence[Optimizer]
    outer: Optimizer
    objective: InnerObjective | None = None
    keep_outer_graph: bool = False
    averaged: Sequence[Tensor] | None = None
    scale: Tensor | None = None
    hook_zeros: Mapping[int, Tensor] = field(default_factory=dict)
    untouched: bool = False
    self_check: bool = False
    reader: StreamReader | None = None
    group: Group | None = None
    begins: bool = False

    def __post_init__(self) -> None:
        self.inner_parameters = trainable(p for o in self.inner for p in parameters_of(o))
        self.outer_parameters = trainable(parameters_of(self.outer))
        check_levels(self.inner_parameters, self.outer_parameters)

    @property
    def name(self) -> str:
        """The inner optimizers, for messages."""
        return " and ".join(dict.fromkeys(type(o).__name__ for o in self.inner))

    def learned(self) -> list[Tensor]:
        """Hyperparameters of the inner optimizers that are to be learned."""
        return [phi for optimizer in self.inner for phi in learned(optimizer)]

    def known_objective(self) -> InnerObjective:
        """The inner objective, or RuntimeError with the remedy."""
        if self.objective is None:
            raise RuntimeError(
                "There is no training loss to differentiate: call inner_step(closure) with a "
                "closure before outer_step(val_loss), or pass the loss at the current parameters, "
                "outer_step(val_loss, train_loss). The tensor given to inner_step(loss) cannot "
                "serve again: the parameters have moved since."
            )
        return self.objective

    def _unscaled(self, gradient: Tensor) -> Tensor:
        if self.scale is None:
            return gradient
        # A scale of 2^16 is infinite in float16, and small numbers are zero.
        return _at_least_single(gradient) / self.scale

    def over_processes(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Those of the mean loss of all processes, from those of this one."""
        return list(gradients) if self.group is None else self.group.mean_where(gradients)

    def in_all_processes(self, agree: Sequence[Tensor]) -> list[Tensor]:
        """() bools: whether what is true here is true in every process."""
        if self.group is None or not agree:
            return list(agree)
        share = self.group.mean([torch.stack(list(agree)).double()])[0]
        return list((share == 1).unbind())

    def explained_training_errors(self) -> AbstractContextManager[None]:
        """Around a differentiation of the training loss: what went wrong, in the user's terms."""
        if self.objective is None or self.objective.repeatable:
            freed = OUTSIDE + " Or it called backward(): it must only compute and return the loss."
        else:
            freed = (
                "The graph of the training loss was freed by an earlier backward pass, such as "
                "that of inner_step: pass the loss at the current parameters, computed anew."
            )
        moved = (
            "The training loss was computed before the parameters moved: pass the loss at the "
            "current parameters, computed after inner_step, or a closure. " + OUTSIDE
        )
        return explained(freed=freed, moved=moved)

    def outer_gradients(
        self, outer_loss: Tensor, *, plain: bool = False
    ) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None]]:
        """(∂g/∂θ, ∂g/∂φ), one per trainable parameter; None where there is no path.

        Args:
            plain: whether by ``backward()``, which also reaches what a reentrant checkpoint hides.

        Raises:
            RuntimeError: the loss is detached, depends on no inner parameter, or was computed
                before the inner parameters moved.
        """
        check_outer_loss(outer_loss)
        if not plain:
            check_differentiable(outer_loss, "validation")
        inner = self.inner_parameters if self.averaged is None else list(self.averaged)
        split = len(inner)
        # Activation checkpoints run modules again.
        with (
            World([], inner[0].device, self.reader),
            explained(
                freed="The graph of the validation loss was freed by an earlier call: compute the "
                "validation loss anew for every outer_step.",
                moved="The validation loss was computed before the parameters moved: compute it "
                "after inner_step and before outer_step.",
            ),
        ):
            loss = outer_loss if self.scale is None else outer_loss * self.scale
            grads = (plain_gradients if plain else graph_gradients)(
                loss, inner + self.outer_parameters, self.keep_outer_graph
            )
        grads = tuple(None if g is None else self._unscaled(dense(g)) for g in grads)
        if all(g is None for g in grads[:split]):
            raise RuntimeError(
                "The validation loss depends on none of the inner parameters: does the inner "
                "optimizer hold the parameters of the model that the loss was computed with?"
            )
        return grads[:split], grads[split:]

    def mean_of(self, closures: Sequence[Callable[[], Tensor]], *, plain: bool = False) -> Tensor:
        """The mean of several outer losses, one graph alive at a time.

        A scalar with their mean value and their mean gradient, linear in θ and φ: whoever
        differentiates it once cannot tell the difference.

        Args:
            plain: as for :meth:`outer_gradients`.
        """
        inner = self.inner_parameters if self.averaged is None else self.averaged
        tensors, weight = [*inner, *self.outer_parameters], 1 / len(closures)
        value = torch.zeros((), device=tensors[0].device)
        total: list[Tensor | None] = [None] * len(tensors)
        for closure in closures:
            loss = closure()
            b, c = self.outer_gradients(loss, plain=plain)
            value = value + weight * loss.detach()
            for i, g in enumerate([*b, *c]):
                if g is not None:
                    total[i] = weight * g if (known := total[i]) is None else known + weight * g
        pairs = zip(total, tensors, strict=True)
        parts = [(g, here(t)) for g, t in pairs if g is not None]
        linear = [(g * (t - t.detach())).sum() for g, t in parts]
        return torch.stack([part.to(value.dtype) for part in linear]).sum() + value


def graph_gradients(
    loss: Tensor, tensors: Sequence[Tensor], retain_graph: bool
) -> tuple[Tensor | None, ...]:
    """∂loss/∂t for each tensor, None where there is no path, by ``torch.autograd.grad``."""
    return torch.autograd.grad(loss, tensors, allow_unused=True, retain_graph=retain_graph)


def _at_least_single(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def check_levels(inner: Sequence[Tensor], outer: Sequence[Tensor]) -> None:
    """ValueError unless the two levels are nonempty, disjoint, real and on one device."""
    for level, tensors in (("inner", inner), ("outer", outer)):
        if not tensors:
            raise ValueError(
                f"The {level} optimizer holds no parameter that requires a gradient: "
                "is everything frozen?"
            )
    both = {id(t) for t in inner} & {id(t) for t in outer}
    if both:
        shape = next(tuple(t.shape) for t in inner if id(t) in both)
        raise ValueError(
            f"A tensor of shape {shape} is in both the inner and the outer optimizer; each "
            "parameter belongs to one level."
        )
    devices = {t.device for t in [*inner, *outer]}
    if len(devices) > 1:
        raise ValueError(
            f"The parameters are on several devices: {', '.join(sorted(map(str, devices)))}; move "
            "the model and the outer parameters to one."
        )
    if any(t.is_complex() for t in [*inner, *outer]):
        raise ValueError("Complex parameters are not supported; optimize torch.view_as_real(...).")


def check_outer_loss(loss: Any) -> None:
    """Raises unless ``loss`` is a scalar tensor with a graph."""
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"The validation loss is a {type(loss).__name__}; expected a scalar tensor"
            + (": call it, outer_step(val_loss())." if callable(loss) else ".")
        )
    if loss.numel() != 1:
        raise ValueError(
            f"The validation loss has shape {tuple(loss.shape)}; expected a scalar: reduce it, "
            "for example with .mean()."
        )
    if not loss.requires_grad:
        raise RuntimeError(
            "The validation loss is detached: it carries no graph to differentiate. Compute it "
            "outside torch.no_grad(), without .detach(), .item() or .data."
        )


def combined(
    direct: Sequence[Tensor | None],
    indirect: Sequence[Tensor],
    reached: Sequence[bool],
    if_none: str,
) -> list[Tensor | None]:
    """The direct term plus the indirect one, per outer parameter; None where neither exists.

    Args:
        reached: whether the indirect term exists.
        if_none: a warning for when it exists for no parameter at all.
    """
    if not any(reached):
        if all(c is None for c in direct):
            raise RuntimeError(
                "No outer parameter has any influence: neither the training loss nor the "
                "validation loss depends on them. Does the training closure use the parameters in "
                "the outer optimizer?"
            )
        warnings.warn(if_none, stacklevel=5)
    return [
        c if not exists else part if c is None else c + part
        for c, part, exists in zip(direct, indirect, reached, strict=True)
    ]


def all_facts(prober: Prober, problem: BilevelProblem) -> Facts:
    """Of all inner optimizers together."""
    found = []
    for optimizer in problem.inner:
        own = set(map(id, parameters_of(optimizer)))
        parameters = [p for p in problem.inner_parameters if id(p) in own]
        found.append((parameters, prober.facts(optimizer, parameters)))
    if len({facts.sign for _, facts in found}) > 1:
        raise ValueError(
            "Some inner optimizers minimise and some maximise: that is a saddle point, no "
            "optimum of one inner objective. Use estimator=Unrolled() or PZOBO()."
        )
    decay = {id(p): d for ps, facts in found for p, d in zip(ps, facts.decay, strict=True)}
    return Facts(
        found[0][1].sign,
        [decay[id(p)] for p in problem.inner_parameters],
        tuple(note for _, facts in found for note in facts.notes),
    )
