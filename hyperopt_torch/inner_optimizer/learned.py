"""Hyperparameters of the inner optimizer as outer parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import check_choice

_KEY = "learned"  # in a parameter group: {place: (φ, transform)}
_SHOWN = "learned_values"  # beside it, the number that each place showed last
_OURS = ("params", _KEY, _SHOWN)

_FORWARD: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda phi: phi,
    "log": torch.exp,
    "sigmoid": torch.sigmoid,
}
_INVERSE: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda value: value,
    "log": torch.log,
    "sigmoid": torch.logit,
}


def learn_hyperparameter(
    optimizer: Optimizer, name: str, transform: str = "log", *, index: int | None = None
) -> list[nn.Parameter]:
    """Makes a hyperparameter of each parameter group an outer parameter φ.

    The group's value becomes exp(φ) ("log", for what is positive), sigmoid(φ) ("sigmoid", for what
    lies in (0, 1)) or φ itself ("identity"), starting where it stands, and follows φ from then on:
    ``group[name]`` shows the value of the last inner step.

    Args:
        optimizer: the inner optimizer.
        name: "lr", "momentum", "weight_decay", "betas", or whatever the groups hold.
        transform: "log", "sigmoid" or "identity".
        index: which entry, where the value is a tuple, such as ``betas``.

    Returns:
        One 0-d parameter a group, in float32, on the device of the group: give them to the outer
        optimizer. Only estimators that look at the inner steps can tune them: ``Unrolled``,
        ``PZOBO``.

    Raises:
        ValueError: a group has no such number, or it is outside the range of ``transform``.

    Example:
        >>> w = torch.zeros(2, requires_grad=True)
        >>> inner = torch.optim.SGD([w], lr=0.1)
        >>> (log_lr,) = learn_hyperparameter(inner, "lr")
        >>> outer = torch.optim.Adam([log_lr], lr=0.05)
        >>> round(log_lr.item(), 4)
        -2.3026
    """
    check_choice("transform", transform, tuple(_FORWARD))
    parameters = []
    for group in optimizer.param_groups:
        value = group.get(name)
        if index is not None and isinstance(value, (tuple, list)) and -1 < index < len(value):
            value = value[index]
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(
                f"Invalid name: {name!r}; a parameter group of {type(optimizer).__name__} has "
                f"{value!r} there, expected a number. Numbers: {', '.join(_numbers(group))}."
            )
        phi = _INVERSE[transform](torch.tensor(float(value), dtype=torch.float32))
        if not phi.isfinite():
            raise ValueError(
                f"Invalid transform: {transform!r}; it cannot start at {name} = {value!r}. "
                'Give the group a value inside the range, or take transform="identity".'
            )
        device = group["params"][0].device if group["params"] else None
        parameters.append(nn.Parameter(phi.to(device)))
    for group, parameter in zip(optimizer.param_groups, parameters, strict=True):
        links = dict(group.get(_KEY, {}))
        place = name if index is None else f"{name}[{index}]"
        links[place] = (parameter, transform)
        group[_KEY] = links
        group.setdefault(_SHOWN, {})[place] = _entry(group, place)
    return parameters


def _numbers(group: dict[str, Any]) -> list[str]:
    found = []
    for name, value in group.items():
        if isinstance(value, (tuple, list)) and all(isinstance(v, float) for v in value) and value:
            found.append(f"{name!r} with index=0..{len(value) - 1}")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found.append(repr(name))
    return found


def _is_learned(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def learned(optimizer: Optimizer) -> list[Tensor]:
    """The tensors in the parameter groups that ask for a gradient, each once."""
    found: dict[int, Tensor] = {}
    for group in optimizer.param_groups:
        for name, value in group.items():
            if name not in _OURS and isinstance(value, (Tensor, tuple, list)):
                found.update((id(entry), entry) for entry in _entries(value) if _is_learned(entry))
        if _KEY in group:
            found.update((id(phi), phi) for phi, _ in group[_KEY].values())
    return list(found.values())


def resolved(group: dict[str, Any], read: Callable[[Tensor], Any]) -> dict[str, Any]:
    """The settings of a group, where ``read(φ)`` stands for each learned φ, then transformed.

    ``read`` gives a number, or a tensor to differentiate.
    """
    settings = {name: value for name, value in group.items() if name not in _OURS}
    for name, value in settings.items():
        if _is_learned(value):
            settings[name] = read(value)
        elif isinstance(value, (tuple, list)) and any(map(_is_learned, value)):
            settings[name] = type(value)(read(v) if _is_learned(v) else v for v in value)
    for place, (parameter, transform) in group.get(_KEY, {}).items():
        value = read(parameter)
        if isinstance(value, Tensor):
            value = _FORWARD[transform](value)
        else:
            value = float(_FORWARD[transform](torch.tensor(value, dtype=torch.float64)))
        name, _, index = place.partition("[")
        if index:
            entries = list(settings[name])
            entries[int(index[:-1])] = value
            settings[name] = tuple(entries)
        else:
            settings[name] = value
    return settings


def numbers(group: dict[str, Any]) -> dict[str, Any]:
    """The settings of a group as plain numbers: one sync for each learned one."""
    return resolved(group, lambda phi: float(phi.detach()))


@contextmanager
def plain(optimizer: Optimizer) -> Iterator[None]:
    """Inside, learned hyperparameters are numbers, which every optimizer takes.

    Those made by :func:`learn_hyperparameter` stay in their group as a number, up to date; a
    tensor that the user put there is put back.
    """
    if not learned(optimizer):
        yield
        return
    own = []
    for group in optimizer.param_groups:
        own.append({k: v for k, v in group.items() if _holds_learned(v) and k not in _OURS})
        _refuse_schedule(group)
        group.update(numbers(group))
        group.update({_SHOWN: {place: _entry(group, place) for place in group.get(_KEY, {})}})
    try:
        yield
    finally:
        for group, values in zip(optimizer.param_groups, own, strict=True):
            group.update(values)


def _entry(group: Mapping[str, Any], place: str) -> float:
    name, _, index = place.partition("[")
    value = group[name][int(index[:-1])] if index else group[name]
    return float(value)


def _refuse_schedule(group: dict[str, Any]) -> None:
    """RuntimeError where somebody else has set a learned hyperparameter meanwhile."""
    for place, shown in group.get(_SHOWN, {}).items():
        now = _entry(group, place)
        if abs(now - shown) > 1e-6 * abs(shown):
            raise RuntimeError(
                f"{place} is learned, and was {shown:.6g} in its parameter group; now it is "
                f"{now:.6g}. Does a scheduler, or the loop, set it? It would have no effect: the "
                "learned value decides. Take the scheduler away, or let the loss and the optimizer "
                "see a schedule by making its factor an outer parameter of its own."
            )


def _holds_learned(value: Any) -> bool:
    return any(map(_is_learned, _entries(value)))


def relink(groups: Sequence[dict[str, Any]], before: Sequence[dict[str, Any]]) -> None:
    """Puts the learned tensors of ``before`` back into ``groups``, which a checkpoint replaced.

    They take the loaded values: as a plain learning rate would, they belong to the optimizer.
    """
    for group, old in zip(groups, before, strict=False):
        for name, value in old.items():
            if name == _KEY:
                for place, (parameter, _) in value.items():
                    _take(parameter, group.get(_KEY, {}).get(place, (None,))[0])
                group[name] = value
                group[_SHOWN] = {place: _entry(group, place) for place in value}
            elif name not in _OURS and _holds_learned(value):
                loaded = group.get(name)
                for mine, theirs in zip(_entries(value), _entries(loaded), strict=False):
                    if _is_learned(mine):
                        _take(mine, theirs)
                group[name] = value


def _entries(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (tuple, list)) else (value,)


def _take(parameter: Tensor, loaded: Any) -> None:
    if isinstance(loaded, (Tensor, float, int)):
        with torch.no_grad():
            parameter.copy_(torch.as_tensor(loaded))
