"""One inner step as a differentiable map, and its derivative in both directions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from .._tensors import wide_dtype
from ..inner_optimizer import Change, resolved, twin
from ..recording import State

THETA = ""  # the name of the parameter itself among the entries of its optimizer state
Key = tuple[int, str]  # (number of the inner parameter, entry)
Point = dict[Key, Tensor]  # θ and the state of the inner optimizer, or a derivative of them


class Update:
    """(θ, s, ∇f, η) -> (θ', s'), one step of a torch optimizer, for η among the φ.

    The optimizer's own code runs, with ``differentiable=True``, on tensors that stand in for its
    parameters.

    Args:
        optimizers: the inner optimizers; only their classes and their settings are used.
        settings: their parameter groups at this step.
        parameters: θ before the step, one for each of ``inner``.
        state: s before the step, likewise.
        gradients: ∇f at θ; None where f does not depend on a parameter.
        change: what became of them before the optimizers saw them.
        inner: the user's own tensors.
        learned: those φ that are hyperparameters of the optimizer.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        settings: Sequence[Sequence[Mapping[str, Any]]],
        parameters: Sequence[Tensor],
        state: State,
        gradients: Sequence[Tensor | None],
        change: Change,
        inner: Sequence[Tensor],
        learned: Sequence[Tensor],
    ) -> None:
        self.point: Point = {}
        self.gradients = [None if g is None else _leaf(g) for g in gradients]
        self.eta = {id(phi): _leaf(phi) for phi in learned}
        self._used = [i for i, g in enumerate(gradients) if g is not None]
        stand_ins, entries = [], []
        with torch.enable_grad():
            moving = change(self.gradients)
        for i, (theta, old) in enumerate(zip(parameters, state, strict=True)):
            moves = gradients[i] is not None  # the optimizer leaves the others alone
            self.point[i, THETA] = _leaf(theta)
            for name, value in old.items():
                if _is_differentiable(name, value):
                    self.point[i, name] = _leaf(value)
            # Copies, because optimizers work in place, which a leaf that wants a gradient refuses.
            stand_in = self.point[i, THETA].clone() if moves else theta.detach()
            gradient = moving[i]
            stand_in.grad = None if gradient is None else gradient.clone()
            stand_ins.append(stand_in)
            entries.append(
                {
                    name: self.point[i, name].clone()
                    if (i, name) in self.point
                    else _own(name, value)
                    for name, value in old.items()
                }
            )
        places = {id(p): q for p, q in zip(inner, stand_ins, strict=True)}
        copies = [twin(optimizer, places, entries) for optimizer in optimizers]
        for copy, groups in zip(copies, settings, strict=True):
            self._set(copy, groups)
            with torch.enable_grad(), _Differentiable():
                type(copy).step(copy)
        self.result: Point = dict(self.point)
        states = {id(q): s for copy in copies for q, s in copy.state.items()}
        self._state = [dict(states.get(id(q), {})) for q in stand_ins]
        for i in self._used:
            self.result[i, THETA] = stand_ins[i]
            for name, value in self._state[i].items():
                if _is_differentiable(name, value):
                    self.result[i, name] = value

    def _set(self, copy: Optimizer, groups: Sequence[Mapping[str, Any]]) -> None:
        """The settings of a twin, learned ones with a graph."""
        copy.defaults["differentiable"] = True
        for group, known in zip(copy.param_groups, groups, strict=True):
            group.update({k: _tracked(v) for k, v in resolved(dict(known), self._stand_in).items()})
            momentum = group.get("momentum")
            if isinstance(momentum, _Number) and float(momentum) == 0:
                raise ValueError(
                    "A learned momentum is exactly 0, where the optimizer keeps no buffer, so that "
                    "its derivative is not on record. Start it above zero, or learn it by "
                    'learn_hyperparameter(optimizer, "momentum", "sigmoid").'
                )
            group.update(differentiable=True, foreach=False)
            if "fused" in group:
                group["fused"] = False

    def next_state(self) -> State:
        """s', without a graph."""
        return [
            {name: _own(name, value) for name, value in entries.items()} for entries in self._state
        ]

    def _stand_in(self, phi: Tensor) -> Tensor:
        return self.eta.get(id(phi), phi.detach())  # not an outer parameter: a constant

    def pull(self, adjoint: Point) -> tuple[Point, list[Tensor | None], dict[int, Tensor]]:
        """The transposed derivative: of ``result`` -> of (point, gradients, η by id of φ)."""
        leaves = [*self.point.values(), *self._live_gradients(), *self.eta.values()]
        keys = [k for k, value in self.result.items() if k in adjoint and value.requires_grad]
        pulled: Sequence[Tensor | None] = torch.autograd.grad(
            [self.result[k] for k in keys],
            leaves,
            [adjoint[k].to(self.result[k].dtype) for k in keys],
            allow_unused=True,
        )
        found = iter(pulled)
        point = {k: g for k in self.point if (g := next(found)) is not None}
        used = [next(found) for _ in self._used]
        eta = {key: g for key in self.eta if (g := next(found)) is not None}
        gradients: list[Tensor | None] = [None] * len(self.gradients)
        for i, g in zip(self._used, used, strict=True):
            gradients[i] = g
        return point, gradients, eta

    def push(
        self, tangent: Point, gradients: Sequence[Tensor | None], eta: Mapping[int, Tensor]
    ) -> Point:
        """The derivative: of (point, gradients, η by id of φ) -> of ``result``."""
        keys = [k for k, value in self.result.items() if value.requires_grad]
        # The transposed derivative is linear in z; its own transpose is the derivative.
        z = [torch.zeros_like(self.result[k], requires_grad=True) for k in keys]
        leaves = [*self.point.values(), *self._live_gradients(), *self.eta.values()]
        directions = [
            *(tangent.get(k) for k in self.point),
            *(gradients[i] for i in self._used),
            *(eta.get(key) for key in self.eta),
        ]
        pulled = torch.autograd.grad(
            [self.result[k] for k in keys], leaves, z, create_graph=True, allow_unused=True
        )
        pairs = [
            (g, d)
            for g, d in zip(pulled, directions, strict=True)
            if g is not None and d is not None and g.requires_grad
        ]
        if not pairs:
            return {}
        pushed = torch.autograd.grad(
            [g for g, _ in pairs],
            z,
            [d.to(g.dtype) for g, d in pairs],
            allow_unused=True,
            retain_graph=True,
        )
        return {k: d for k, d in zip(keys, pushed, strict=True) if d is not None}

    def _live_gradients(self) -> list[Tensor]:
        return [g for g in self.gradients if g is not None]


def _tracked(value: Any) -> Any:
    """A learned hyperparameter as a :class:`_Number`; one sync."""
    if isinstance(value, tuple):
        return tuple(map(_tracked, value))
    if isinstance(value, Tensor) and value.requires_grad:
        return _Number(float(value.detach()), value)
    return value


def _leaf(value: Tensor) -> Tensor:
    return value.detach().clone().requires_grad_()


def _own(name: str, value: Any) -> Any:
    """A copy; of the step count in float64, for powers of it as exact as those of a number."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach().clone()
    return _widened(value) if name == "step" else value


def _widened(value: Tensor) -> Tensor:
    return value.to(wide_dtype(value)) if value.is_floating_point() else value


def _is_differentiable(name: str, value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and name != "step"


class _Number(float):
    """A float that remembers how it came about, as a 0-d tensor with a graph.

    torch's optimizers take learning rates and the like as numbers in many places (``alpha=``,
    ``value=``), which no tensor that wants a gradient is accepted for.
    """

    tensor: Tensor

    def __new__(cls, value: float, tensor: Tensor) -> _Number:
        self = super().__new__(cls, value)
        self.tensor = tensor
        return self

    def __ne__(self, other: object) -> bool:
        return True  # `if weight_decay != 0:` asks whether it is there, and it is, even at zero

    def __bool__(self) -> bool:
        return True

    def __neg__(self) -> _Number:
        return _Number(-float(self), -self.tensor)


def _arithmetic(name: str) -> Callable[[_Number, Any], Any]:
    on_floats, on_tensors = getattr(float, name), getattr(Tensor, name)

    def apply(self: _Number, other: Any) -> Any:
        if isinstance(other, Tensor):
            return on_tensors(self.tensor, other)
        value = on_floats(float(self), float(other))
        return _Number(value, on_tensors(self.tensor, _unwrapped(other)))

    return apply


for _name in ("add", "sub", "mul", "truediv", "pow"):
    for _method in (f"__{_name}__", f"__r{_name}__"):
        setattr(_Number, _method, _arithmetic(_method))


def _unwrapped(value: Any) -> Any:
    return value.tensor if isinstance(value, _Number) else value


class _Differentiable(TorchFunctionMode):
    """Closes the gaps in what torch's optimizers do with ``differentiable=True``.

    They take hyperparameters as numbers (see :class:`_Number`), detach the first momentum buffer,
    and take the square root of second moments that are zero wherever the gradient is, whose
    derivative is infinite.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name in ("detach", "item") and args[0].requires_grad:
            return args[0].clone() if name == "detach" else _Number(func(*args), args[0].clone())
        if func in _FACTORIES:
            made = func(*args, **kwargs)  # the step count of a new state, see _own
            return _widened(made) if made.ndim == 0 else made
        base = name.rstrip("_")
        if base == "sqrt" and isinstance(args[0], Tensor) and args[0].requires_grad:
            return _stored(name, args[0], _sqrt(args[0]))
        if not any(isinstance(a, _Number) for a in [*args, *kwargs.values()]):
            return func(*args, **kwargs)
        args = [args[0], *map(_copy, args[1:])]
        kwargs = {key: _unwrapped(value) for key, value in kwargs.items()}
        if base in _TERMS:
            return _stored(name, args[0], args[0] + _TERMS[base](*args, **kwargs))
        if base == "full_like":
            return torch.zeros_like(args[0]) + args[1]
        return func(_unwrapped(args[0]), *args[1:], **kwargs)


def _copy(value: Any) -> Any:
    """So that a later step in place leaves alone what the graph has saved."""
    return value.clone() if isinstance(value, Tensor) else _unwrapped(value)


def _stored(name: str, target: Tensor, value: Tensor) -> Tensor:
    """``value``, written into ``target`` where ``name`` is that of an operation in place."""
    return target.copy_(value) if name.endswith("_") else value


_FACTORIES = (torch.tensor, torch.zeros, torch.ones)
# What these operations add to their first argument, with tensors for numbers.
_TERMS: dict[str, Callable[..., Any]] = {
    "add": lambda _, other, alpha=1: alpha * other,
    "sub": lambda _, other, alpha=1: -alpha * other,
    "addcmul": lambda _, x, y, value=1: value * x * y,
    "addcdiv": lambda _, x, y, value=1: value * x / y,
    "lerp": lambda start, end, weight: weight * (end - start.clone()),
}


def _sqrt(x: Tensor) -> Tensor:
    """√x with derivative 0 at x = 0, where a second moment is zero because its gradients are."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), x.detach().sqrt())
