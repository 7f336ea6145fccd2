"""What the inner optimizer does, found out by letting a stand-in of it take steps."""

from __future__ import annotations

import inspect
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

_HOLDERS = ("optimizer", "_optimizer", "base_optimizer")
_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
_AT_REST = 1e-3  # of the move at no gradient: Adam makes steps of the rounding in g + λθ
_WARM_UP = 8  # RAdam's first five steps are those of another method
_VALUES = (1.1, -0.7, 0.43, -1.9, 0.8, 2.3)  # of θ: no two alike, none round
_SLOPES = (0.9, 1.7, -0.6, 1.2, -2.1, 0.37)  # of ∇f


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """All parameters of an optimizer, group by group."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """The optimizer beneath wrappers that hold it and hand ``step()`` on to it.

    Such as those of accelerate and Lightning, or of the Lookahead kind: whatever has another
    optimizer, over the same parameters, in an attribute.
    """
    seen = [optimizer]
    while True:
        mine = set(map(id, parameters_of(seen[-1])))
        for name in _HOLDERS:
            held = getattr(seen[-1], name, None)
            if not isinstance(held, Optimizer) or any(held is o for o in seen):
                continue
            if set(map(id, parameters_of(held))) == mine:
                seen.append(held)
                break
        else:
            return seen[-1]


def needs_closure(optimizer: Optimizer) -> bool:
    """Whether ``step`` has a closure argument without a default, as LBFGS."""
    step = type(unwrapped(optimizer)).step
    parameter = inspect.signature(step).parameters.get("closure")
    return parameter is not None and parameter.default is inspect.Parameter.empty


@dataclass(frozen=True)
class Facts:
    """Where an optimizer comes to rest: where sign·∇f + λθ = 0.

    Attributes:
        sign: +1 where it minimises f, -1 where it maximises.
        decay: λ, one for each parameter; 0 where there is no weight decay, or one that belongs to
            no objective (decoupled, as AdamW's).
        notes: what could not be found out, in words.
    """

    sign: float
    decay: list[float]
    notes: tuple[str, ...] = ()


class Prober:
    """Finds :class:`Facts` by probing, not by the names of classes or modules.

    A stand-in with the optimizer's code and settings takes single steps over a small tensor:

    - at a gradient g and at -g: the side to which it moves is the sign;
    - at no gradient: where it stays there is no decay;
    - at -sign·λθ, for the numbers λ in its settings, and the λ of a linear update: where it stays,
      it rests at sign·∇f + λθ = 0. If it does for none, its decay is decoupled.

    Settings that were probed before are remembered: steps are taken only where they changed.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], tuple[float, float, tuple[str, ...]]] = {}
        self._optimizers: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()

    def facts(self, optimizer: Optimizer, parameters: Sequence[Tensor]) -> Facts:
        """Of an optimizer beneath all wrappers, for these parameters of it."""
        number = self._optimizers.setdefault(optimizer, len(self._optimizers))
        found = {}
        for group in optimizer.param_groups:
            settings = tuple(
                (name, value)
                for name, value in group.items()
                if isinstance(value, (bool, int, float, str)) and name not in ("lr", "initial_lr")
            )
            for p in group["params"]:
                key = (number, p.ndim, settings)
                if key not in self._known:
                    self._known[key] = _probed(optimizer, group, p)
                found[id(p)] = self._known[key]
        mine = [found[id(p)] for p in parameters]
        signs = {sign for sign, _, _ in mine}
        if len(signs) > 1:
            raise ValueError(
                f"Some parameter groups of {type(optimizer).__name__} minimise and some maximise: "
                "that is a saddle point, no optimum of one inner objective. Use "
                "estimator=Unrolled() or PZOBO()."
            )
        notes = dict.fromkeys(note for _, _, some in mine for note in some)
        return Facts(signs.pop(), [decay for _, decay, _ in mine], tuple(notes))


def _probed(
    optimizer: Optimizer, group: dict[str, Any], parameter: Tensor
) -> tuple[float, float, tuple[str, ...]]:
    """(sign, λ, notes) for one parameter of one group."""
    name = type(optimizer).__name__
    probe = _Probe(optimizer, group, parameter)
    try:
        with torch.random.fork_rng([]):
            up, down = probe.move(100 * probe.g), probe.move(-100 * probe.g)
            along = float(((up - down) * probe.g).sum())
            sign = -1.0 if along > 0 else 1.0
            decay = _decay(probe, group, sign)
    except Exception as error:  # of somebody's code, which was made for other tensors
        note = f"what {name} does with weight decay could not be found out ({error}); counted as 0"
        declared = group.get("weight_decay", 0)
        return 1.0, 0.0, (note,) if isinstance(declared, (int, float)) and declared else ()
    return sign, decay, ()


def _decay(probe: _Probe, group: dict[str, Any], sign: float) -> float:
    """λ such that it rests at the gradient -sign·λθ; 0 if there is none."""
    free = probe.move(torch.zeros_like(probe.theta))
    if not free.any():
        return 0.0
    pulled = probe.move(sign * probe.theta)
    candidates = [group["weight_decay"]] if "weight_decay" in group else []
    candidates += [v for k, v in group.items() if k not in ("lr", "initial_lr")]
    with suppress(ZeroDivisionError):  # -η(g + λθ) at g = 0 and at g = sign·θ
        candidates.append(float(free.sum()) / float((pulled - free).sum()))
    for value in candidates:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if number and value > 0:
            moved = probe.moves(lambda theta, value=value: -sign * float(value) * theta)  # type: ignore[misc]
            if moved.abs().amax() <= _AT_REST * free.abs().amax():
                return float(value)
    return 0.0


class _Probe:
    """A stand-in that takes single steps, each from the beginning."""

    def __init__(self, optimizer: Optimizer, group: dict[str, Any], parameter: Tensor) -> None:
        self._optimizer, self._group = optimizer, group
        shape = [max(1, min(size, 3)) for size in parameter.shape]
        count = max(1, torch.Size(shape).numel())
        like = {"dtype": torch.float64, "device": parameter.device}
        if parameter.device.type == "mps":
            like["dtype"] = torch.float32
        self.theta = _filled(_VALUES, count, shape, like)
        self.g = _filled(_SLOPES, count, shape, like)

    def move(self, gradient: Tensor) -> Tensor:
        """The step at this gradient."""
        return self.moves(lambda theta: gradient, steps=1)

    def moves(self, gradient: Callable[[Tensor], Tensor], steps: int = _WARM_UP) -> Tensor:
        """Where it has gone after ``steps`` at the gradient of each point."""
        q = self.theta.clone().requires_grad_()
        copy = self._copy(q)
        for _ in range(steps):
            _step(copy, q, gradient(q.detach()))
        return q.detach() - self.theta

    def _copy(self, q: Tensor) -> Optimizer:
        """The optimizer's code over q alone, with the settings of the group and no state."""
        copy: Optimizer = object.__new__(type(self._optimizer))
        # Not `step`: learning rate schedulers wrap it in the original's.
        own = {k: v for k, v in vars(self._optimizer).items() if k not in ("step", *_HOOKS)}
        copy.__dict__.update(own)
        copy.__dict__.update({name: OrderedDict() for name in _HOOKS})
        group = {k: v.detach() if isinstance(v, Tensor) else v for k, v in self._group.items()}
        off = {"fused": False, "foreach": False, "capturable": False, "differentiable": False}
        group.update({k: v for k, v in off.items() if k in group}, params=[q])
        if not isinstance(group.get("lr", 0.1), Tensor) and float(group.get("lr", 0.1)) == 0:
            group["lr"] = 0.1  # the facts do not depend on it
        for name, value in vars(self._optimizer).items():
            if isinstance(value, list) and any(isinstance(v, Tensor) for v in value):
                copy.__dict__[name] = [q]  # such as LBFGS's list of its parameters
        copy.defaults = dict(self._optimizer.defaults)
        copy.param_groups = [group]
        copy.state = type(self._optimizer.state)(dict)
        born = born_state(self._optimizer, q, group)
        if born:
            copy.state[q] = born
        return copy


def born_state(optimizer: Optimizer, parameter: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
    """The state that a parameter has before the first step: empty, but for those optimizers whose
    constructor makes it, such as Adagrad in older releases.
    """
    known = inspect.signature(type(optimizer).__init__).parameters
    settings = {k: v for k, v in group.items() if k in known and k != "params"}
    try:
        fresh = type(optimizer)([parameter], **settings)
    except (TypeError, ValueError, RuntimeError):  # not for one parameter alone
        return {}
    return dict(fresh.state.get(parameter, {}))


def _filled(values: Sequence[float], count: int, shape: list[int], like: dict[str, Any]) -> Tensor:
    several = [values[i % len(values)] * (1 + i // len(values) / 7) for i in range(count)]
    return torch.tensor(several, **like).reshape(shape)


def _step(copy: Optimizer, q: Tensor, gradient: Tensor) -> None:
    def closure() -> Tensor:
        q.grad = gradient.clone()
        return (q.detach() * gradient).sum()

    step: Callable[..., Any] = type(copy).step
    step = inspect.unwrap(step)  # without the hooks that torch calls around every optimizer's step
    if needs_closure(copy):
        step(copy, closure)
    else:
        closure()
        with torch.no_grad():
            step(copy)
