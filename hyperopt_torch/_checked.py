"""What a BilevelOptimizer refuses: optimizers that cannot serve, states that do not fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

from .inner_optimizer import needs_closure


def check_optimizers(inner: Sequence[Any], outer: Any) -> None:
    """Raises unless all are optimizers that can serve at their level."""
    if not inner:
        raise ValueError("inner is empty: give the optimizer of the model's parameters.")
    for name, optimizer in [*(("inner", o) for o in inner), ("outer", outer)]:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"{name} must be a torch.optim.Optimizer; got {type(optimizer).__name__}. Pass "
                "for example torch.optim.SGD(model.parameters(), lr=0.1)."
            )
    if needs_closure(outer):
        raise ValueError(
            f"{type(outer).__name__} cannot be the outer optimizer: it evaluates its loss "
            "several times a step, and each evaluation would be a whole bilevel solve. Use "
            "for example torch.optim.Adam or torch.optim.SGD."
        )
    if len(inner) > 1 and any(map(needs_closure, inner)):
        raise ValueError(
            "An inner optimizer that evaluates the loss itself, such as LBFGS, cannot step "
            "together with others."
        )


def checked_state(
    state_dict: Mapping[str, Any], inner: Sequence[Optimizer], outer: Optimizer
) -> list[Any]:
    """The states of the inner optimizers; ValueError where the dict does not fit."""
    advice = "Give what BilevelOptimizer.state_dict() returned, of the same optimizers."
    missing = [k for k in ("inner", "outer", "estimator", "steps") if k not in state_dict]
    if missing:
        raise ValueError(f"The state has no {', '.join(map(repr, missing))}. {advice}")
    states = state_dict["inner"]
    states = [states] if isinstance(states, Mapping) else list(states)
    if len(states) != len(inner):
        raise ValueError(
            f"The state is of {len(states)} inner optimizer(s), not of {len(inner)}. {advice}"
        )
    for optimizer, state in [*zip(inner, states, strict=True), (outer, state_dict["outer"])]:
        groups = state.get("param_groups", ()) if isinstance(state, Mapping) else ()
        sizes = [len(group["params"]) for group in groups]
        expected = [len(group["params"]) for group in optimizer.param_groups]
        if sizes != expected:
            raise ValueError(
                f"The state of {type(optimizer).__name__} has parameter groups of {sizes}, the "
                f"optimizer of {expected}. {advice}"
            )
    return states
