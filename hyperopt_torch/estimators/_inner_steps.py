"""What a strategy is shown of an inner step: of all its micro-batches, in all processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from .._tensors import FlatLayout
from ..distributed import Group
from ..ihvp.base import InnerStep
from ..recording import Evaluation, Record, sample_rows
from ._problem import BilevelProblem

_WITH_BIAS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # a bias entry for each row of a weight


def inner_step_of(
    problem: BilevelProblem, evaluation: Evaluation, wanted: Callable[[int], Sequence[int]]
) -> InnerStep:
    """One micro-batch before its backward pass, without its gradient; of all processes.

    Args:
        wanted: batch size -> the samples whose own gradients are to be taken.
    """
    parameters, losses = problem.inner_parameters, evaluation.per_sample
    layout, size, start = FlatLayout(parameters), evaluation.batch_size, 0
    if problem.group is not None and size is not None:
        start, size = problem.group.places(size, layout.device)
    chosen = [] if losses is None or size is None else wanted(size)
    weights = None if evaluation.weights is None else evaluation.weights.detach()
    rows = None
    if losses is not None and chosen:
        own = [sample - start for sample in chosen if 0 <= sample - start < len(losses)]
        rows = torch.zeros(0, layout.n, dtype=layout.dtype, device=layout.device)
        rows = sample_rows(evaluation, parameters, layout, own) if own else rows
    if problem.group is not None and losses is not None and size is not None:
        weights, rows = _of_all(problem.group, weights, rows, (start, size), chosen)
    nothing = parameters[0].new_zeros(0)
    return InnerStep(nothing, batch_size=size, weights=weights, chosen=chosen, chosen_rows=rows)


def _of_all(
    group: Group,
    weights: Tensor | None,
    rows: Tensor | None,
    place: tuple[int, int],
    chosen: Sequence[int],
) -> tuple[Tensor | None, Tensor | None]:
    """Weights and rows of the samples of all processes, from ours; ``place`` is (start, total)."""
    start, total = place
    found: list[Tensor] = []
    if weights is not None:
        every = weights.new_zeros(total)
        every[start : start + len(weights)] = weights
        found.append(every)
    if rows is not None:
        first = sum(sample < start for sample in chosen)
        wanted = rows.new_zeros(len(chosen), rows.shape[1])
        wanted[first : first + len(rows)] = rows
        found.append(wanted)
    summed = iter(group.sums(found))
    return (
        None if weights is None else next(summed),
        None if rows is None else next(summed),
    )


def joined(gradient: Tensor, parts: Sequence[InnerStep]) -> InnerStep:
    """One inner step of its micro-batches; samples are numbered through."""
    if len(parts) == 1:
        return replace(parts[0], gradient=gradient)
    sizes = [part.batch_size for part in parts]
    told = [size for size in sizes if size is not None]
    whole = sum(told) if told and len(told) == len(parts) else None
    weights = [part.weights for part in parts if part.weights is not None]
    rows = [part.chosen_rows for part in parts if part.chosen_rows is not None]
    starts = [sum(told[:i]) for i in range(len(parts))] if whole is not None else []
    chosen = [
        start + sample for start, part in zip(starts, parts, strict=False) for sample in part.chosen
    ]
    return InnerStep(
        gradient,
        batch_size=whole,
        weights=torch.cat(weights) if weights and len(weights) == len(parts) else None,
        chosen=chosen,
        chosen_rows=torch.cat(rows) if rows and len(chosen) == sum(map(len, rows)) else None,
    )


def biases_of(parameters: Sequence[Tensor], records: Sequence[Record]) -> dict[int, int]:
    """{number of a weight: number of its bias}, each once, of the layers that were called."""
    number = {id(p): k for k, p in enumerate(parameters)}
    found: dict[int, int] = {}
    for module in (module for record in records for module in record.modules):
        if isinstance(module, _WITH_BIAS):
            own = module._parameters  # what a parametrization computes is no parameter
            weight, bias = (number.get(id(own.get(name))) for name in ("weight", "bias"))
            known = weight in found or bias in found.values()  # they may be tied
            if weight is not None and bias is not None and not known:
                found[weight] = bias
    return found
