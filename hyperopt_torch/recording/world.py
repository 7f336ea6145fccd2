"""Modules as a training closure finds them: their modes, their buffers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from .restore import Restoring, remove_global_hooks

_SMALL = 1 << 16  # entries


class BufferCopy(NamedTuple):
    """A buffer's value at one time, and what tells whether it has changed since."""

    value: Tensor
    source: Tensor
    version: int


class ModuleState(NamedTuple):
    """One module before the closure called it."""

    training: bool
    buffers: dict[str, BufferCopy]


Modules = dict[nn.Module, ModuleState]
_TRAINING, _EVALUATING = ModuleState(True, {}), ModuleState(False, {})  # of modules without buffers


def module_state(module: nn.Module, last: ModuleState | None) -> ModuleState:
    """The mode and the buffers of one module, its children apart.

    A large buffer that has not changed since ``last`` shares its copy. Small ones are copied
    always: normalisation layers write their statistics without moving the version counter.
    """
    if not module._buffers:
        return _TRAINING if module.training else _EVALUATING
    buffers = {}
    for name, buffer in module._buffers.items():
        if buffer is None:
            continue
        copy = last.buffers.get(name) if last is not None else None
        if (
            copy is None
            or buffer.numel() <= _SMALL
            or copy.source is not buffer
            or copy.version != buffer._version
        ):
            copy = BufferCopy(buffer.detach().clone(), buffer, buffer._version)
        buffers[name] = copy
    return ModuleState(module.training, buffers)


def put_modes(present: Restoring, modules: Modules) -> None:
    """The recorded modes, until ``present`` ends."""
    for module, state in modules.items():
        if module.training is not state.training:
            present.entry(vars(module), "training", state.training)


class BufferLender:
    """Lets modules work on copies of their buffers, so that nobody's own are written.

    Modules on record hold copies of what they held then, from the beginning to the end. Others are
    found by global forward hooks, so that nobody has to name them: an outermost call lends clones
    to its whole tree, and its end takes them back. So it goes, too, with buffers that
    ``functional_call`` puts into a module for one call. Clones live on from call to call.

    The original tensor *objects* come back. Copying values back in place would bump the version of
    a tensor that the graph of the validation loss may still hold.
    """

    def __init__(self) -> None:
        self._ours: dict[int, Tensor] = {}  # copies that modules on record hold, by id
        self._on_record: Modules = {}
        self._clones: dict[int, tuple[Tensor, Tensor]] = {}  # by the id of the original
        # The calls under way, each with the modules that it lent to, and their own buffers.
        self._calls: list[tuple[nn.Module, list[tuple[nn.Module, dict[str, Tensor | None]]]]] = []
        self._lent: set[int] = set()
        self._thread = threading.get_ident()

    def install(self, present: Restoring) -> None:
        """Hooks, until ``present`` ends."""
        present.finally_do(self._return_all)
        present.finally_do(lambda: remove_global_hooks(self._enter, self._leave))
        register_module_forward_pre_hook(self._enter)
        # Also when the forward raises, as activation checkpointing does to stop early.
        register_module_forward_hook(self._leave, always_call=True)

    def put(self, present: Restoring, values: Modules) -> None:
        """Copies of recorded buffers into the modules, until ``present`` ends."""
        before, self._on_record = self._on_record, values
        present.finally_do(lambda: setattr(self, "_on_record", before))
        shared: dict[int, Tensor] = {}
        for module, state in values.items():
            present.finally_do(_back(module._buffers, dict(module._buffers.items())))
            for name, copy in state.buffers.items():
                if id(copy.source) not in shared:  # one buffer of two modules stays one
                    shared[id(copy.source)] = copy.value.clone()
                module._buffers[name] = shared[id(copy.source)]
        self._ours.update((id(b), b) for b in shared.values())

    def _elsewhere(self) -> bool:
        """Whether another thread of the program runs; autograd's own threads are ours."""
        return (
            threading.get_ident() != self._thread
            and not threading.current_thread().name.startswith("Dummy")
        ) or is_compiling()

    def _enter(self, module: nn.Module, _: Any) -> None:
        if self._elsewhere():
            return
        call: list[tuple[nn.Module, dict[str, Tensor | None]]] = []
        self._calls.append((module, call))
        if id(module) in self._lent:
            return  # part of a tree that an outer call has seen to
        for part in module.modules():
            if id(part) in self._lent:
                continue
            found = dict(part._buffers.items())  # a scripted module's are no dict
            call.append((part, found))
            self._lent.add(id(part))
            for name, buffer in found.items():
                if buffer is not None and id(buffer) not in self._ours:
                    if id(buffer) not in self._clones:
                        self._clones[id(buffer)] = buffer, buffer.clone()
                    part._buffers[name] = self._clones[id(buffer)][1]

    def _leave(self, module: nn.Module, *_: Any) -> None:
        if not self._elsewhere() and self._calls and self._calls[-1][0] is module:
            self._return_last()

    def _return_last(self) -> None:
        for part, found in self._calls[-1][1]:
            for name, now in list(part._buffers.items()):
                original = found.get(name)
                mine = original is None or id(original) in self._ours
                if mine and part in self._on_record:
                    if now is not None:
                        self._ours[id(now)] = now  # perhaps assigned anew: goes on from here
                    found[name] = now
                elif name not in found:
                    del part._buffers[name]  # made by this forward
                elif original is not None and now is not None and now is not original:
                    self._clones[id(original)] = (original, now)  # perhaps assigned anew
            for name, original in found.items():
                part._buffers[name] = original
            self._lent.discard(id(part))
        self._calls.pop()

    def _return_all(self) -> None:
        while self._calls:
            self._return_last()


def _back(buffers: Any, own: dict[str, Tensor | None]) -> Callable[[], None]:
    def undo() -> None:
        for name in [name for name, _ in buffers.items() if name not in own]:
            del buffers[name]  # made by a forward inside
        for name, buffer in own.items():
            buffers[name] = buffer

    return undo


# Whether torch.compile is tracing: hooks must leave no trace in what it compiles.
is_compiling: Callable[[], bool] = torch.compiler.is_compiling
