"""The world around a training closure: random streams, buffers, and how both are put back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils.hooks import RemovableHandle


@contextmanager
def without_side_effects(device: torch.device) -> Iterator[None]:
    """Evaluations inside move neither the RNG stream of ``device`` nor any module's buffers."""
    on_accelerator = device.type not in ("cpu", "meta")
    fork = (
        torch.random.fork_rng([device.index or 0], device_type=device.type)
        if on_accelerator
        else torch.random.fork_rng([])
    )
    with fork, preserved_buffers():
        yield


RandomState = tuple[Tensor, ...]  # of the CPU's stream, and of the device's where it has its own


def random_state(device: torch.device) -> RandomState:
    """The random streams that code on ``device`` draws from."""
    cpu = torch.get_rng_state()
    if device.type in ("cpu", "meta"):
        return (cpu,)
    return cpu, getattr(torch, device.type).get_rng_state(device)


def set_random_state(device: torch.device, state: RandomState) -> None:
    """Takes the streams back to where :func:`random_state` saw them."""
    torch.set_rng_state(state[0])
    if len(state) > 1:
        getattr(torch, device.type).set_rng_state(state[1], device)


class BufferCopy(NamedTuple):
    """A buffer's value at one time, and what tells whether it has changed since."""

    value: Tensor
    source: Tensor
    version: int


Buffers = dict[nn.Module, dict[str, BufferCopy]]  # of each module, by name
_SMALL = 1 << 16  # entries


@contextmanager
def recorded_buffers(last: Buffers) -> Iterator[Buffers]:
    """What the buffers of all modules that are called inside held before.

    A large buffer that has not changed since ``last`` was recorded shares its copy. Small ones are
    copied always: normalisation layers write their statistics without moving the version counter.
    """
    found: Buffers = {}

    def unchanged(copy: BufferCopy | None, buffer: Tensor) -> bool:
        return (
            copy is not None
            and buffer.numel() > _SMALL
            and (copy.source is buffer and copy.version == buffer._version)
        )

    def enter(module: nn.Module, _: Any) -> None:
        for part in module.modules():
            if part in found:
                continue
            found[part] = {}
            for name, buffer in part._buffers.items():
                if buffer is None:
                    continue
                copy = last.get(part, {}).get(name)
                if copy is None or not unchanged(copy, buffer):
                    copy = BufferCopy(buffer.detach().clone(), buffer, buffer._version)
                found[part][name] = copy

    handle = register_module_forward_pre_hook(enter)
    try:
        yield found
    finally:
        handle.remove()


@contextmanager
def buffers_at(values: Buffers) -> Iterator[None]:
    """Inside, modules hold copies of these values; outside, their own buffer objects again."""
    own = [(part, name, part._buffers[name]) for part, known in values.items() for name in known]
    try:
        for part, name, _ in own:
            part._buffers[name] = values[part][name].value.clone()
        yield
    finally:
        for part, name, buffer in own:
            part._buffers[name] = buffer


@contextmanager
def preserved_buffers() -> Iterator[None]:
    """Modules called inside work on stand-ins for their buffers, and get their own back.

    Global forward hooks find the modules, so nobody has to name them: an outermost call swaps in
    clones for its whole tree, and its end swaps the original tensor *objects* back. Copying values
    back in place would bump the version of a tensor that the graph of the validation loss may
    still hold. Stand-ins live on from call to call, as buffers do.
    """
    stand_ins: dict[int, tuple[Tensor, Tensor]] = {}  # id of the original -> (original, stand-in)
    # The calls under way, each with the modules that it swapped and their own buffers.
    frames: list[tuple[nn.Module, list[tuple[nn.Module, dict[str, Tensor | None]]]]] = []
    active: set[int] = set()

    def enter(module: nn.Module, _: Any) -> None:
        swapped: list[tuple[nn.Module, dict[str, Tensor | None]]] = []
        frames.append((module, swapped))
        if id(module) in active:
            return  # part of a tree that an outer call has swapped
        for part in module.modules():
            if id(part) in active:
                continue
            active.add(id(part))
            found = dict(part._buffers.items())  # a scripted module's are no dict
            swapped.append((part, found))
            for name, buffer in found.items():
                if buffer is not None:
                    if id(buffer) not in stand_ins:
                        stand_ins[id(buffer)] = (buffer, buffer.clone())
                    part._buffers[name] = stand_ins[id(buffer)][1]

    def leave(module: nn.Module, *_: Any) -> None:
        if frames and frames[-1][0] is module:
            swap_back()

    def swap_back() -> None:
        for part, found in frames.pop()[1]:
            for name, now in list(part._buffers.items()):
                original = found.get(name)
                if name not in found:
                    del part._buffers[name]  # made by this forward
                elif original is not None and now is not None:
                    stand_ins[id(original)] = (original, now)  # perhaps assigned anew
            for name, original in found.items():
                part._buffers[name] = original
            active.discard(id(part))

    handles = [register_module_forward_pre_hook(enter), _register_leave(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        while frames:
            swap_back()


def _register_leave(hook: Callable[..., None]) -> RemovableHandle:
    try:  # also when the forward raises, as activation checkpointing does to stop early
        return register_module_forward_hook(hook, always_call=True)
    except TypeError:  # torch 2.0 has no such option
        return register_module_forward_hook(hook)
