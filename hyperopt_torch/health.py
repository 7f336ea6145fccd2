"""The report over the steps: for loggers, for plots, and for a verdict on the whole run."""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import torch
from torch import Tensor

from ._tensors import inner_product
from .errors import HypergradientWarning, check_count
from .report import SolveReport, read_scalars

_FIELDS = ("residual", "cosine", "length", "products", "val_loss")
_OFTEN = 0.5  # of the steps with a residual above 1
_NOISE = 0.2  # a median cosine below which steps point anywhere


class _Reports(Protocol):
    def on_outer_step(self, listener: Any) -> None: ...


class HealthLog:
    """Keeps, of every outer step of a :class:`~hyperopt_torch.BilevelOptimizer`, what tells trust.

    residual:  of the linear system, where known.
    cosine:    between this hypergradient and the last one. Steps that follow a direction have a
               positive one; of noise in many dimensions it is about zero.
    length:    of the hypergradient.
    products:  with the inner curvature.
    val_loss:  the validation loss.

    A single bad step means little; a run in which the residual is above 1 in more than half of
    the last ``window`` steps while the median cosine is below 0.2 follows noise. That is said once,
    by a :class:`HypergradientWarning`.

    Args:
        bilevel: whose outer steps.
        window: steps that the verdict looks at, >= 2.
        keep: steps that are kept, >= 1.

    Raises:
        ValueError: an argument is out of its range.

    Cost: one copy of the last hypergradient. Values stay on the device until they are read: by
    this object's methods, or, for the verdict, every ``window`` steps.

    Example:
        >>> from hyperopt_torch import BilevelOptimizer, DenseSolve
        >>> w, phi = torch.zeros((), requires_grad=True), torch.ones((), requires_grad=True)
        >>> bilevel = BilevelOptimizer(
        ...     torch.optim.SGD([w], lr=1.0), torch.optim.SGD([phi], lr=0.5), ihvp=DenseSolve()
        ... )
        >>> log = HealthLog(bilevel)
        >>> for _ in range(2):
        ...     _ = bilevel.inner_step(lambda: (w - phi) ** 2 / 2)
        ...     _ = bilevel.outer_step((w - 3) ** 2 / 2)
        >>> log.history()["val_loss"], log.scalars()["bilevel/cosine"]
        ([2.0, 0.5], 1.0)
    """

    def __init__(self, bilevel: _Reports, window: int = 50, keep: int = 10_000) -> None:
        self.window = check_count("window", window, minimum=2)
        self.keep = check_count("keep", keep)
        self.steps = 0
        self._rows: deque[dict[str, Tensor | float]] = deque(maxlen=keep)
        self._last: list[Tensor | None] | None = None
        self._said = False
        bilevel.on_outer_step(self._take)

    def _take(
        self, report: SolveReport, hypergradient: list[Tensor | None], val_loss: Tensor
    ) -> None:
        self.steps += 1
        row: dict[str, Tensor | float] = {"val_loss": val_loss.detach().clone()}
        if report.residual is not None:
            row["residual"] = report.residual
        if report.hypergradient_norm is not None:
            row["length"] = report.hypergradient_norm
        row["products"] = float(report.matvecs)
        if self._last is not None:
            row["cosine"] = _cosine(hypergradient, self._last)
        self._last = [None if g is None else g.detach().clone() for g in hypergradient]
        self._rows.append(row)
        if self.steps % self.window == 0:
            self._warn()

    def history(self) -> dict[str, list[float]]:
        """Each quantity over the steps, NaN where it is not known. One sync."""
        rows = list(self._rows)
        unread = [(row, key, v) for row in rows for key, v in row.items() if isinstance(v, Tensor)]
        values = read_scalars([value for *_, value in unread])
        for (row, key, _), value in zip(unread, values, strict=True):
            row[key] = value
        return {name: [float(row.get(name, math.nan)) for row in rows] for name in _FIELDS}

    def scalars(self) -> dict[str, float]:
        """The last step, under names for TensorBoard and friends: "bilevel/residual" and so on."""
        known = {f"bilevel/{k}": v[-1] for k, v in self.history().items() if v}
        return {name: value for name, value in known.items() if not math.isnan(value)}

    def verdict(self) -> str | None:
        """In words, where the last ``window`` hypergradients are noise; None where not."""
        history = self.history()
        residuals = [r for r in history["residual"][-self.window :] if not math.isnan(r)]
        cosines = [c for c in history["cosine"][-self.window :] if not math.isnan(c)]
        if len(residuals) < self.window // 2 or len(cosines) < self.window // 2:
            return None
        bad, usual = sum(r > 1 for r in residuals) / len(residuals), median(cosines)
        if bad <= _OFTEN or usual >= _NOISE:
            return None
        return (
            f"in {bad:.0%} of the last {len(residuals)} outer steps the residual was above 1, and "
            f"the median cosine between hypergradients is {usual:.2f}: they are noise. Take "
            "curvature=GaussNewton() with a closure that returns (loss, outputs), more damping, or "
            "a larger batch in the closure; Identity(rescale=True) is the baseline to beat"
        )

    def _warn(self) -> None:
        text = None if self._said else self.verdict()
        if text is not None:
            self._said = True
            warnings.warn(text + ". [said once]", HypergradientWarning, stacklevel=4)

    def plot(self, path: str | Path | None = None) -> Any:
        """A figure of all quantities over the steps, written to ``path`` if one is given.

        Raises:
            ImportError: matplotlib is not there.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("plot() needs matplotlib: pip install matplotlib") from error
        history = self.history()
        shown = [name for name in _FIELDS if any(not math.isnan(v) for v in history[name])]
        figure = Figure(figsize=(7, 1.5 + 1.4 * len(shown)), layout="constrained")
        axes = figure.subplots(max(1, len(shown)), sharex=True, squeeze=False)[:, 0]
        first = self.steps - len(self._rows) + 1
        for axis, name in zip(axes, shown, strict=False):
            axis.plot(range(first, self.steps + 1), history[name], linewidth=1.2)
            axis.set_ylabel(name)
            if name in ("residual", "length"):
                axis.set_yscale("log")
            if name in ("residual", "cosine"):
                axis.axhline(1.0 if name == "residual" else 0.0, color="grey", linewidth=0.6)
        axes[-1].set_xlabel("outer step")
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure

    def __repr__(self) -> str:
        return f"HealthLog(window={self.window}, keep={self.keep}, steps={self.steps})"


def _cosine(x: Sequence[Tensor | None], y: Sequence[Tensor | None]) -> Tensor:
    pairs = [(a, b) for a, b in zip(x, y, strict=False) if a is not None and b is not None]
    if not pairs or any(a.shape != b.shape for a, b in pairs):
        return torch.tensor(math.nan)
    products = torch.stack(
        [
            torch.stack([inner_product(u.flatten(), v.flatten()) for u, v in pairs_of]).sum()
            for pairs_of in (pairs, [(a, a) for a, _ in pairs], [(b, b) for _, b in pairs])
        ]
    )
    return products[0] / (products[1] * products[2]).sqrt()
