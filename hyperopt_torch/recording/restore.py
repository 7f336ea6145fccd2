"""The present put back: what was changed on the way is undone, whatever interrupts."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, MutableMapping
from types import TracebackType
from typing import Any

import torch
from torch.nn.modules import module as _module


class Restoring:
    """A context whose end undoes, the last first, what was done through it.

    Changes are made through its methods, before or inside the context. Each undoing may be done
    twice without harm, so an interrupt (Ctrl-C) while it happens does not cut it short: it is
    raised at the end. One that comes at the very moment when the context ends is the affair of
    :func:`settled`.
    """

    def __init__(self) -> None:
        self._changes: list[Callable[[], None]] = []  # to be made on entry
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> Restoring:
        try:
            for change in self._changes:
                change()
        except BaseException:
            self._put_back()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._put_back()

    def _put_back(self) -> None:
        interrupt: BaseException | None = None
        while self._undo:
            try:
                while self._undo:
                    self._undo[-1]()
                    self._undo.pop()
            except KeyboardInterrupt as error:
                interrupt = error
        mine = _open()
        if self in mine:
            mine.remove(self)
        if interrupt is not None:
            raise interrupt

    def finally_do(self, undo: Callable[[], None]) -> None:
        """``undo`` at the end; may be called twice."""
        if self not in _open():
            _open().append(self)
        self._undo.append(undo)

    def entry(self, holder: MutableMapping[Any, Any], key: Any, value: Any) -> None:
        """``holder[key] = value`` now, and what was there (perhaps nothing) at the end."""
        if key in holder:
            own = holder[key]
            self.finally_do(lambda: holder.__setitem__(key, own))
        else:
            self.finally_do(lambda: holder.pop(key, None))
        holder[key] = value

    def attributes(self, own: dict[str, Any], then: dict[str, Any]) -> None:
        """On entry an object's attributes are ``then``; at the end they are as found."""

        def change() -> None:
            now = dict(own)
            self.finally_do(lambda: _become(own, now))
            _become(own, then)

        self._changes.append(change)

    def generator(self, generator: Any, state: Any) -> None:
        """On entry a random generator is in ``state``; at the end as found."""
        get, put = _access(generator)

        def change() -> None:
            now = get()
            self.finally_do(lambda: put(now))
            put(state)

        self._changes.append(change)


class _ThisThread(threading.local):
    def __init__(self) -> None:
        self.open: list[Restoring] = []


_this_thread = _ThisThread()


def _open() -> list[Restoring]:
    """What this thread has begun to change and not put back, the oldest first."""
    return _this_thread.open


class settled:
    """At its end everything is undone that a :class:`Restoring` of this thread changed inside.

    The end of a context written in python is a call, and an interrupt may come as it begins.
    """

    def __enter__(self) -> None:
        self._before = len(_open())

    def __exit__(self, *error: object) -> None:
        mine = _open()
        while len(mine) > self._before:
            mine[-1]._put_back()


def remove_global_hooks(*hooks: Callable[..., Any]) -> None:
    """Takes global module hooks away, found by what they call: an interrupt may lose their handle.

    Register for removal first, then register the hook: no moment is left between the two.
    """
    tables: list[Any] = [
        _module._global_forward_pre_hooks,
        _module._global_forward_hooks,
    ]
    flags = getattr(_module, "_global_forward_hooks_always_called", {})
    for table in tables:
        for key in [key for key, hook in table.items() if hook in hooks]:
            table.pop(key, None)
            flags.pop(key, None)


def _become(own: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name in [name for name in own if name not in wanted]:
        del own[name]
    for name, value in wanted.items():
        if name not in own or own[name] is not value:
            own[name] = value


def is_generator(cls: type) -> bool:
    """Whether objects of this class are random generators that can be taken back."""
    numpy = sys.modules.get("numpy")
    classes: tuple[type, ...] = (torch.Generator, random.Random)
    return issubclass(cls, classes if numpy is None else (*classes, numpy.random.Generator))


def read_generator(generator: Any) -> Any:
    """Its state."""
    return _access(generator)[0]()


def _access(generator: Any) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    if isinstance(generator, torch.Generator):

        def put_state(state: Any) -> None:
            generator.set_state(state)

        return generator.get_state, put_state
    if isinstance(generator, random.Random):
        return generator.getstate, generator.setstate
    bits = generator.bit_generator

    def put(state: Any) -> None:
        bits.state = state

    return lambda: bits.state, put
