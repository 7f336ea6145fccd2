"""Argument checks, in the words a user reads: what is wrong, and what to do."""

from __future__ import annotations

import math
from typing import Any


def check_count(name: str, value: Any, minimum: int = 1) -> int:
    """``value`` if it is an integer of at least ``minimum``; ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"Invalid {name}: {value!r}; expected an integer >= {minimum}.")
    return value


def check_number(name: str, value: Any, *, positive: bool = False) -> float:
    """``value`` as a finite float that is >= 0, or > 0 with ``positive``; ValueError otherwise."""
    bound = "> 0" if positive else ">= 0"
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < 0 or (positive and value == 0):
        raise ValueError(f"Invalid {name}: {value!r}; expected a finite number {bound}.")
    return float(value)


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """``value`` if it is one of ``choices``; ValueError that lists them otherwise."""
    if value not in choices:
        raise ValueError(
            f"Invalid {name}: {value!r}; expected one of {', '.join(map(repr, choices))}."
        )
    return str(value)


class HypergradientWarning(UserWarning):
    """A hypergradient is not to be trusted; the text says why and what to do.

    Given once of each kind by ``BilevelOptimizer(on_trouble="warn")``.
    """


class HypergradientError(RuntimeError):
    """The same, from ``BilevelOptimizer(on_trouble="raise")``, before anything has moved."""
