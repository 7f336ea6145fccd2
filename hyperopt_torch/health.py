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
from .report import SolveReport, plain, troubles_in

_FIELDS = ("step", "residual", "cosine", "length", "products", "val_loss", "troubles")
_PANELS = ("residual", "cosine", "length", "val_loss")
_OFTEN = 0.5  # of the steps with a residual above 1
_DIRECTION = 0.2  # a median cosine from which on steps go somewhere
_KEPT_NAMES = {"hypergradient_norm": "length", "matvecs": "products"}


class _Reports(Protocol):
    def on_outer_step(self, listener: Any) -> None: ...


class HealthLog:
    """Keeps, of every outer step of a :class:`~hyperopt_torch.BilevelOptimizer`, what tells trust.

    residual:  of the linear system, where known.
    cosine:    between this hypergradient and the last one; entries that were zero then, as those of
               samples that were not in the batch, are compared with what they were before. Steps
               that follow a direction have a positive one; of noise it is about zero.
    length:    of the hypergradient.
    products:  with the inner curvature.
    val_loss:  the validation loss.
    troubles:  how many kinds :meth:`SolveReport.troubles` names; which, in :meth:`troubles`.

    A single bad step means little. A run follows noise if, over ``window`` steps, the residual is
    above 1 in more than half while the median cosine is below 0.2. That is said once, by a
    :class:`HypergradientWarning`, unless a window before had a direction: near its end a good run
    looks the same, its hypergradients being small.

    Args:
        bilevel: whose outer steps. What ``accumulate`` adds up is not an outer step.
        window: steps that the verdict looks at, >= 2.
        keep: steps that are kept, >= 1.

    Raises:
        ValueError: an argument is out of its range.

    Cost: one copy of the last hypergradient and four passes over it. Values stay on the device
    until they are read: by this object's methods, or every ``window`` steps.

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
        self._unread: list[dict[str, Any]] = []  # reports as they came, at most ``window``
        self._rows: deque[dict[str, Any]] = deque(maxlen=max(keep, window))  # read, oldest first
        self._last: Tensor | None = None  # flat; each entry when it was last not zero
        self._directed = self._said = False
        bilevel.on_outer_step(self._take)

    def _take(
        self, report: SolveReport, hypergradient: Sequence[Tensor | None], val_loss: Tensor
    ) -> None:
        self.steps += 1
        row = {**vars(report), "step": self.steps, "val_loss": val_loss.detach().clone()}
        parts = [g.detach().flatten() for g in hypergradient if g is not None]
        if parts:
            row["cosine"], self._last = _compared(torch.cat(parts), self._last)
        self._unread.append(row)
        if self.steps % self.window == 0:
            self._judge()

    def _read(self) -> None:
        """Takes from the device what was not read yet: one sync."""
        unread, self._unread = self._unread, []
        for known in plain(unread):
            kinds = tuple(trouble.kind for trouble in troubles_in(known))
            row = {_KEPT_NAMES.get(name, name): value for name, value in known.items()}
            row = {name: row[name] for name in _FIELDS if row.get(name) is not None}
            self._rows.append({**row, "troubles": len(kinds), "kinds": kinds})

    def _kept(self) -> list[dict[str, Any]]:
        self._read()
        return list(self._rows)[-self.keep :]

    def history(self) -> dict[str, list[float]]:
        """Each quantity over the steps, NaN where it is not known. One sync."""
        rows = self._kept()
        return {name: [float(row.get(name, math.nan)) for row in rows] for name in _FIELDS}

    def troubles(self) -> list[tuple[str, ...]]:
        """The kinds of trouble of each step. One sync."""
        return [row["kinds"] for row in self._kept()]

    def scalars(self) -> dict[str, float]:
        """The last step, under names for TensorBoard and friends: "bilevel/residual" and so on.

        What is not known is left out. One sync.
        """
        self._read()
        row = self._rows[-1] if self._rows else {}
        return {f"bilevel/{name}": float(row[name]) for name in _FIELDS[1:] if name in row}

    def verdict(self) -> str | None:
        """In words, where the last ``window`` hypergradients are noise; None where not. One sync.

        None, too, where fewer than half a window is known, and where a window before had a
        direction.
        """
        self._read()
        recent = list(self._rows)[-self.window :]
        residuals = [row["residual"] for row in recent if "residual" in row]
        cosines = _known(recent)
        if self._directed or min(len(residuals), len(cosines)) < self.window // 2:
            return None
        bad, usual = sum(not r <= 1 for r in residuals) / len(residuals), median(cosines)
        if bad <= _OFTEN or usual >= _DIRECTION:
            return None
        return (
            f"in {bad:.0%} of the last {len(residuals)} outer steps the residual was above 1, and "
            f"the median cosine between hypergradients is {usual:.2f}: they are noise. Take "
            "curvature=GaussNewton() with a closure that returns (loss, outputs), more damping, or "
            "a larger batch in the closure; Identity(rescale=True) is the baseline to beat"
        )

    def _judge(self) -> None:
        """At the end of a window: so that what is said does not depend on who reads, and when."""
        text = self.verdict()
        cosines = _known(list(self._rows)[-self.window :])
        if len(cosines) >= self.window // 2 and median(cosines) >= _DIRECTION:
            self._directed = True
        if text is not None and not self._said:
            self._said = True
            warnings.warn(text + ". [said once]", HypergradientWarning, stacklevel=4)

    def plot(self, path: str | Path | None = None) -> Any:
        """A figure of residual, cosine, length and validation loss over the steps.

        Args:
            path: where to write it, in a format that matplotlib knows by its suffix.

        Raises:
            ImportError: matplotlib is not there.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("plot() needs matplotlib: pip install matplotlib") from error
        history = self.history()
        shown = [name for name in _PANELS if any(map(math.isfinite, history[name]))]
        figure = Figure(figsize=(7, 1.5 + 1.4 * len(shown)), layout="constrained")
        axes = figure.subplots(max(1, len(shown)), sharex=True, squeeze=False)[:, 0]
        for axis, name in zip(axes, shown, strict=False):
            axis.plot(history["step"], history[name], linewidth=1.2)
            axis.set_ylabel(name)
            if name in ("residual", "length") and any(v > 0 for v in history[name]):
                axis.set_yscale("log")
            if name in ("residual", "cosine"):
                axis.axhline(1.0 if name == "residual" else 0.0, color="grey", linewidth=0.6)
        axes[-1].set_xlabel("outer step")
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure

    def __repr__(self) -> str:
        return f"HealthLog(window={self.window}, keep={self.keep}, steps={self.steps})"


def _known(rows: Sequence[dict[str, Any]]) -> list[float]:
    """The cosines that are numbers."""
    return [row["cosine"] for row in rows if math.isfinite(row.get("cosine", math.nan))]


def _compared(x: Tensor, last: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """(cosine of x and ``last`` over the entries that both have, what the next is compared with).

    Zero stands for an entry that was not there; what is not finite is not kept.
    """
    there = (x != 0) & x.isfinite()
    if last is None or (last.shape, last.dtype, last.device) != (x.shape, x.dtype, x.device):
        return None, torch.where(there, x, 0)
    a, b = torch.where(last != 0, x, 0), torch.where(x != 0, last, 0)
    cosine = inner_product(a, b) / (inner_product(a, a) * inner_product(b, b)).sqrt()
    return cosine, torch.where(there, x, last)
