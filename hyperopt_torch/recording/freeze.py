"""A closure with its variables as they are now."""

from __future__ import annotations

import enum
import functools
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from .restore import Restoring, is_generator, read_generator

_FEW = 64  # entries of a container that is worth a copy
_Attributes = list[tuple[dict[str, Any], dict[str, Any]]]  # an object's own, and a copy of them


class FrozenClosure:
    """A training closure that still sees, later on, what it sees now.

    A loop that says ``inner_step(lambda: train_loss(x, y))`` changes x and y under the closure,
    for the next batch or for a validation batch of the same name. Frozen are

    - the variables of the closure, and of the functions of the same module that it calls by name;
    - small lists and dicts among them, and the attributes of ``self`` and of other objects whose
      class is of the closure's own module: one level deep;
    - random generators among all these.

    What lies deeper (the content of a module's attribute, a database) is not; what enters the
    modules is compared instead, see :mod:`.door`.

    Attributes:
        iterators: names of variables that are iterators, which cannot be taken back.
        modules, tensors: those among the variables.
    """

    def __init__(self, closure: Callable[[], Any]) -> None:
        self.iterators: list[str] = []
        self.modules: list[nn.Module] = []
        self.tensors: list[torch.Tensor] = []
        self._attributes: _Attributes = []
        self._generators: list[tuple[Any, Any]] = []
        self._home = getattr(_function(closure), "__module__", None)
        self._scopes: dict[int, dict[str, Any]] = {}
        self._twins: dict[int, Any] = {}
        self._call = self._frozen("self", closure)

    def __call__(self) -> Any:
        return self._call()

    def lend(self, written: Iterable[torch.Tensor]) -> None:
        """From now on the closure sees copies of its variables that are among ``written``.

        What it writes then goes there. A copy put aside and back would not do: the version of the
        tensor would move, and graphs that hold it, such as the validation loss's, would be refused.
        """
        copies = {id(t): t.detach().clone() for t in written}
        if not copies:
            return
        for twin in self._twins.values():
            for cell in twin.__closure__ or ():
                if id(_content(cell)) in copies:
                    cell.cell_contents = copies[id(cell.cell_contents)]
        own = [then for _, then in self._attributes]
        for scope in (*self._scopes.values(), *own):
            for name, value in scope.items():
                if id(value) in copies:
                    scope[name] = copies[id(value)]

    def restoring(self) -> Restoring:
        """Inside, attributes and generators are as they were when the closure was frozen."""
        present = Restoring()
        for own, then in self._attributes:
            present.attributes(own, then)
        for generator, state in self._generators:
            present.generator(generator, state)
        return present

    def _frozen(self, name: str, value: Any) -> Any:
        kind = _kind(value)
        if kind is _Kind.CONSTANT:
            return value
        if kind is _Kind.TENSOR:
            self.tensors.append(value)
            return value
        if kind is _Kind.CONTAINER:
            return value.copy() if len(value) <= _FEW else value
        if kind is _Kind.FUNCTION:
            return self._function(value)
        if kind is _Kind.METHOD:
            owner = self._frozen("self", value.__self__)
            return types.MethodType(self._frozen(name, value.__func__), owner)
        if kind is _Kind.PARTIAL:
            return functools.partial(self._frozen(name, value.func), *value.args, **value.keywords)
        self._note(name, kind, value)
        return value

    def _function(self, function: types.FunctionType) -> types.FunctionType:
        known: types.FunctionType | None = self._twins.get(id(function))
        if known is not None:
            return known
        if function.__module__ != self._home:
            return function  # a library's: what it reads is its own affair
        scope = self._scopes.get(id(function.__globals__))
        if scope is None:
            # Whole: what is defined inside a closure reads it too.
            scope = self._scopes[id(function.__globals__)] = dict(function.__globals__)
        cells = tuple(types.CellType() for _ in function.__closure__ or ())
        twin = types.FunctionType(
            function.__code__, scope, function.__name__, function.__defaults__, cells
        )
        twin.__kwdefaults__ = function.__kwdefaults__
        twin.__dict__.update(function.__dict__)
        self._twins[id(function)] = twin
        names = function.__code__.co_freevars
        for name, cell, own in zip(names, cells, function.__closure__ or (), strict=True):
            try:
                cell.cell_contents = self._frozen(name, own.cell_contents)
            except ValueError:  # not assigned yet
                continue
        for name in _global_names(function.__code__):
            if name in scope:
                value = scope[name]
                if _kind(value) is not _Kind.CONSTANT:
                    scope[name] = self._frozen(name, value)
        return twin

    def _note(self, name: str, kind: _Kind, value: Any) -> None:
        """Keeps what can be restored of an object that is not copied."""
        if kind is _Kind.MODULE:
            self.modules.append(value)
        if kind is _Kind.GENERATOR:
            self._generators.append((value, read_generator(value)))
        elif kind is _Kind.ITERATOR:
            self.iterators.append(name)
        elif (name == "self" or type(value).__module__ == self._home) and isinstance(
            getattr(value, "__dict__", None), dict
        ):
            own = vars(value)
            if not any(own is known for known, _ in self._attributes):
                then = dict(own)
                self._attributes.append((own, then))
                # The dicts in a module's or an optimizer's attributes are torch's own.
                copied = kind is _Kind.OBJECT and not isinstance(value, torch.optim.Optimizer)
                for attribute, held in then.items():
                    inside = _kind(held)
                    if inside is _Kind.CONTAINER and len(held) <= _FEW and copied:
                        then[attribute] = held.copy()
                    elif inside in (_Kind.GENERATOR, _Kind.ITERATOR):
                        self._note(attribute, inside, held)
                    elif inside is _Kind.TENSOR:
                        self.tensors.append(held)


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _function(closure: Any) -> Any:
    while isinstance(closure, (types.MethodType, functools.partial)):
        closure = getattr(closure, "__func__", None) or closure.func  # type: ignore[union-attr]
    return closure


class _Kind(enum.Enum):
    """What there is to freeze about a value."""

    CONSTANT = enum.auto()
    TENSOR = enum.auto()
    CONTAINER = enum.auto()
    FUNCTION = enum.auto()
    METHOD = enum.auto()
    PARTIAL = enum.auto()
    GENERATOR = enum.auto()
    ITERATOR = enum.auto()
    MODULE = enum.auto()
    OBJECT = enum.auto()


def _kind(value: Any) -> _Kind:
    cls: Any = type(value)
    return _kind_of_class(cls)


@functools.lru_cache(maxsize=1024)
def _kind_of_class(cls: Any) -> _Kind:
    known = {
        list: _Kind.CONTAINER,
        dict: _Kind.CONTAINER,
        types.FunctionType: _Kind.FUNCTION,
        types.MethodType: _Kind.METHOD,
        functools.partial: _Kind.PARTIAL,
    }
    if cls in known:
        return known[cls]
    if is_generator(cls):
        return _Kind.GENERATOR
    if issubclass(cls, nn.Module):
        return _Kind.MODULE
    if hasattr(cls, "__next__"):
        return _Kind.ITERATOR
    if issubclass(cls, torch.Tensor):
        return _Kind.TENSOR
    constant = issubclass(cls, (type, types.ModuleType)) or cls.__module__ in (
        "builtins",
        "functools",
        "torch",
    )
    return _Kind.CONSTANT if constant else _Kind.OBJECT


@functools.lru_cache(maxsize=256)
def _global_names(code: types.CodeType) -> tuple[str, ...]:
    """Names that a function, or what is defined inside it, may read from its module."""

    def walk(code: types.CodeType) -> Iterator[str]:
        yield from code.co_names
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                yield from walk(constant)

    return tuple(dict.fromkeys(walk(code)))
