"""Small systems: those of an operator projected on a subspace."""

from __future__ import annotations

import torch
from torch import Tensor

CUT = 1e-8  # eigenvalues of the small matrix below this times the largest are rounding
ROUNDING = 64  # units in the last place


def clipped_solve(T: Tensor, g: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """T⁻¹g, eigenvalues of T below ``noise`` raised to it; and these as they were."""
    sound = T.isfinite().all()  # eigh fails on NaN
    mu, S = torch.linalg.eigh(torch.where(sound, (T + T.mT) / 2, 0.0))
    keep = mu > CUT * mu.abs().amax()
    inverse = torch.where(keep, 1 / torch.maximum(torch.where(keep, mu, 1.0), noise), 0.0)
    y = S @ (inverse * (S.mT @ g))
    return torch.where(sound, y, torch.nan), mu


def nonzero(norm: Tensor) -> Tensor:
    """A divisor: ``norm``, or 1 where that is zero."""
    return torch.where(norm > 0, norm, 1.0)
