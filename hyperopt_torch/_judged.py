"""Whether a hypergradient is finite."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ._tensors import inner_product
from .report import SolveReport


def judged(
    report: SolveReport, hypergradient: list[Tensor | None], val_loss: Tensor
) -> tuple[SolveReport, list[Tensor | None]]:
    """Whether all is finite, on record; what is not leaves no finite hypergradient behind."""
    parts = [g for g in hypergradient if g is not None]
    norm = torch.stack([inner_product(g.flatten(), g.flatten()) for g in parts]).sum().sqrt()
    sizes = (
        *(norm, report.loss, report.rhs_norm, report.solution_norm),
        *(report.inner_gradient_norm, report.residual, report.growth),
    )
    known = [s.to(norm) for s in sizes if s is not None]
    zero = torch.stack([*known, val_loss.detach().to(norm)]).sum() * 0  # NaN, if one of them is not
    report = replace(report, hypergradient_norm=norm + zero, finite=zero == 0)
    return report, [None if g is None else g + zero.to(g.dtype) for g in hypergradient]
