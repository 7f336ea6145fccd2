"""The random streams that a training closure may draw from."""

from __future__ import annotations

import ctypes
import random
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor

_MT19937_BYTES = 4 * 625  # the state of numpy and of random: 624 words and a position


class Streams(NamedTuple):
    """Where torch's streams (of the CPU, and of the device), ``random``'s and numpy's stand."""

    cpu: Tensor
    device: Tensor | None
    python: Any
    numpy: Any


def shared(streams: Streams, last: Streams) -> Streams:
    """The same, in the memory of ``last`` where nothing was drawn since."""
    cpu = last.cpu if _bytes(last.cpu) == _bytes(streams.cpu) else streams.cpu
    python = last.python if last.python == streams.python else streams.python
    return streams._replace(cpu=cpu, python=python)


def _bytes(state: Tensor) -> bytes:
    return ctypes.string_at(state.data_ptr(), state.numel())


def _address_of_random() -> int | None:
    """Where the interpreter keeps the words of ``random``'s global stream; None where unknown."""
    stream: Any = getattr(random, "_inst", None)
    head = object.__basicsize__
    words = _MT19937_BYTES // 4
    if sys.implementation.name != "cpython" or type(stream) is not random.Random:
        return None
    if random.Random.__basicsize__ < head + _MT19937_BYTES:
        return None
    found = (ctypes.c_uint32 * words).from_address(id(stream) + head)
    return id(stream) + head if (*found[1:], found[0]) == stream.getstate()[1] else None


class StreamReader:
    """Reads where the streams stand, at each inner step, in a few microseconds.

    numpy takes 30 µs to say where its global stream stands and ``random`` takes 10, as much as a
    tiny model takes for a layer, and hardly any closure draws from them. So their bytes are looked
    at first: as long as they have not changed since the last reading, that reading is still true
    (unless it holds the second half of a pair of normal numbers, whose use the bytes do not show).
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type not in ("cpu", "meta") else None
        self._numpy: tuple[bytes, Any] | None = None
        self._python: tuple[bytes, Any] | None = None
        self._address = _address_of_random()
        self.end: Streams | None = None  # where the last evaluation on record left them

    def read(self) -> Streams:
        """Where they stand now."""
        device = None
        if self._device is not None:
            device = getattr(torch, self._device.type).get_rng_state(self._device)
        cpu = torch.default_generator.get_state()
        return Streams(cpu, device, self._read_python(), self._read_numpy())

    def put(self, streams: Streams) -> None:
        """Takes the streams to where they stood; nothing to do for those that stand there."""
        torch.set_rng_state(streams.cpu)
        if streams.device is not None and self._device is not None:
            getattr(torch, self._device.type).set_rng_state(streams.device, self._device)
        if self._read_python() != streams.python:
            random.setstate(streams.python)
            self._python = None
        if streams.numpy is not None and self._read_numpy() is not streams.numpy:
            sys.modules["numpy"].random.set_state(streams.numpy)
            self._numpy = None

    def _read_python(self) -> Any:
        if self._address is None:
            return random.getstate()
        look = ctypes.string_at(self._address, _MT19937_BYTES)
        if self._python is None or self._python[0] != look or self._python[1][2] is not None:
            self._python = look, random.getstate()
        return self._python[1]

    def _read_numpy(self) -> Any:
        numpy = sys.modules.get("numpy")
        if numpy is None:
            return None
        try:
            bits = numpy.random.get_bit_generator()
            if type(bits).__name__ != "MT19937":  # another stream was set
                return numpy.random.get_state()
            look = ctypes.string_at(bits.ctypes.state_address, _MT19937_BYTES)
        except AttributeError:  # an old numpy
            return numpy.random.get_state()
        if self._numpy is None or self._numpy[0] != look or self._numpy[1][3]:
            self._numpy = look, numpy.random.get_state()
        return self._numpy[1]
