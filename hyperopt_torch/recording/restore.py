"""The present put back: what was changed on the way is undone, whatever interrupts."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, MutableMapping
from types import TracebackType
from typing import Any

import torch


class Restoring:
    """A context whose end undoes, the last first, what was done through it.

    Changes are made through its methods, before or inside the context. Each undoing may be done
    twice without harm, so an interrupt (Ctrl-C) while it happens does not cut it short: it is
    raised at the end.
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
        if interrupt is not None:
            raise interrupt

    def finally_do(self, undo: Callable[[], None]) -> None:
        """``undo`` at the end; may be called twice."""
        self._undo.append(undo)

    def entry(self, holder: MutableMapping[Any, Any], key: Any, value: Any) -> None:
        """``holder[key] = value`` now, and what was there (perhaps nothing) at the end."""
        if key in holder:
            own = holder[key]
            self._undo.append(lambda: holder.__setitem__(key, own))
        else:
            self._undo.append(lambda: holder.pop(key, None))
        holder[key] = value

    def attributes(self, own: dict[str, Any], then: dict[str, Any]) -> None:
        """On entry an object's attributes are ``then``; at the end they are as found."""

        def change() -> None:
            now = dict(own)
            self._undo.append(lambda: _become(own, now))
            _become(own, then)

        self._changes.append(change)

    def generator(self, generator: Any, state: Any) -> None:
        """On entry a random generator is in ``state``; at the end as found."""
        get, put = _access(generator)

        def change() -> None:
            now = get()
            self._undo.append(lambda: put(now))
            put(state)

        self._changes.append(change)


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
