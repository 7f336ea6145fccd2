"""The inner step on record: what it takes to evaluate its closure again."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.hooks import RemovableHandle

from .closure import Evaluation, evaluate
from .door import Entrant, entrants
from .freeze import FrozenClosure
from .restore import Restoring, remove_global_hooks
from .streams import StreamReader, Streams
from .world import Modules, module_state
from .world import is_compiling as _is_compiling

State = list[dict[str, Any]]  # of an optimizer, for each inner parameter


@dataclass(slots=True)
class Record:
    """A training closure as it was called in an inner step, and the world that it found.

    Attributes:
        closure: with its variables as they were.
        loss: its value, detached.
        streams: where the random streams stood.
        modules: the modes and the buffers of the modules that it called.
        door: what entered the outermost of them.
        weight: of its loss in the inner objective, where micro-batches have weights.
        inner: the parameters θ.
        moved: tensors that are neither θ nor φ nor buffers and that the closure wrote to.
        reader: of the random streams.
    """

    closure: FrozenClosure
    loss: Tensor
    streams: Streams
    modules: Modules
    door: list[Entrant]
    weight: float | None
    inner: list[Tensor]
    moved: list[Tensor]
    reader: StreamReader

    def __deepcopy__(self, memo: Any) -> Record:
        return self  # never changes, and its closure sees the objects that it sees


class Recorder:
    """Puts training closures on record while they are called.

    Args:
        device: of the inner parameters.
    """

    def __init__(self, device: torch.device) -> None:
        self.reader = StreamReader(device)
        self._last: Modules | None = None
        self._roots: list[nn.Module] = []  # of the last call, where any of them is compiled
        self._others: weakref.WeakKeyDictionary[nn.Module, tuple[frozenset[int], list[Tensor]]]
        self._others = weakref.WeakKeyDictionary()

    def call(
        self,
        closure: Callable[[], Any],
        inner: Sequence[Tensor],
        outer: Sequence[Tensor],
        weight: float | None = None,
    ) -> tuple[Evaluation, Record]:
        """The loss that ``closure`` returns, its graph alive, and the record of the call."""
        ours = frozenset(map(id, [*inner, *outer]))
        frozen, streams = FrozenClosure(closure), self.reader.read()
        with watching(self._roots, self._last, ours) as watch:
            for module in frozen.modules:
                if "_compiled_call_impl" in vars(module):
                    watch.adopt(module)  # compiled in place: hooks are compiled away
                watch.note_versions(self._foreign(module, ours))
            watch.note_versions(frozen.tensors)
            evaluation = evaluate(closure)
        frozen.lend(watch.moved())
        self._last = watch.modules
        self._roots = watch.roots if any(map(is_compiled, watch.roots)) else []
        record = Record(
            closure=frozen,
            loss=evaluation.loss.detach(),
            streams=streams,
            modules=watch.modules,
            door=watch.door,
            weight=weight,
            inner=list(inner),
            moved=watch.moved(),
            reader=self.reader,
        )
        return evaluation, record

    def _foreign(self, module: nn.Module, ours: frozenset[int]) -> list[Tensor]:
        """The parameters of a module that are of neither level; looked for once."""
        known = self._others.get(module)
        if known is not None and known[0] == ours:
            return known[1]
        others: list[Tensor] = [p for p in module.parameters() if id(p) not in ours]
        self._others[module] = ours, others
        return others


def is_compiled(module: nn.Module) -> bool:
    """Whether a call of the module goes through torch.compile."""
    # Looked up where they are: asking a module for what it has not is slow.
    return "_orig_mod" in module._modules or "_compiled_call_impl" in vars(module)


class Watch:
    """The modules that are called by this thread, as they were before, and what enters them."""

    def __init__(self, last: Modules, ours: frozenset[int]) -> None:
        self.modules: Modules = {}
        self.roots: list[nn.Module] = []
        self.door: list[Entrant] = []
        self._last, self._ours = last, ours
        self._thread = threading.get_ident()
        # Roots, and the parts of a root that nothing visible entered.
        self._doors: set[nn.Module] = set()
        self._versions: dict[int, tuple[Tensor, int]] = {}

    def enter(self, module: nn.Module, args: Any, kwargs: Any = None) -> None:
        if _is_compiling():  # first of all: torch.compile traces this function
            return
        known = module in self.modules
        if (known and module not in self._doors) or threading.get_ident() != self._thread:
            return
        if not known:
            if isinstance(module, torch.fx.GraphModule) and any(map(is_compiled, self.roots)):
                return  # what torch.compile made of a root
            self.adopt(module)
        found = list(entrants((args, kwargs)))
        self.door.extend(found)
        if not found and not args:  # torch's global hooks do not see keyword arguments
            self._doors.update(module.modules())

    def adopt(self, root: nn.Module) -> None:
        """Takes the state of an outermost module and of its parts."""
        self._doors.add(root)
        self.roots.append(root)
        modules, last, ours = self.modules, self._last, self._ours
        for part in root.modules():
            if part not in modules:
                modules[part] = module_state(part, last.get(part))
                for p in part._parameters.values():
                    if id(p) not in ours and p is not None:
                        self.note_versions([p])

    def note_versions(self, tensors: Iterable[Tensor]) -> None:
        """Of tensors that are not ours, before the closure can have written to them."""
        for t in tensors:
            if id(t) not in self._ours and id(t) not in self._versions:
                self._versions[id(t)] = t, t._version

    def moved(self) -> list[Tensor]:
        """Tensors that were written to, such as the parameters of an EMA teacher."""
        return [p for p, was in self._versions.values() if p._version != was]


class watching:
    """Watches the modules called inside.

    By a global hook, so that nobody has to name them. Where a module is compiled that would make
    torch.compile trace it anew and warn: from the second time on, only the known outermost modules
    are watched, by hooks of their own.

    Args:
        roots: the known outermost modules, where any of them is compiled.
        last: what the last call found; None before the first.
        ours: ids of the parameters of both levels.
    """

    def __init__(
        self,
        roots: Sequence[nn.Module] = (),
        last: Modules | None = None,
        ours: frozenset[int] = frozenset(),
    ) -> None:
        self._roots, self._quiet = roots, None if last is not None else warnings.catch_warnings()
        self._watch = Watch(last or {}, ours)
        self._handles: list[RemovableHandle] = []
        self._present = Restoring()

    def __enter__(self) -> Watch:
        if self._quiet is not None:
            self._quiet.__enter__()
            warnings.filterwarnings("ignore", message=".*when there are global hooks on modules")
        enter = self._watch.enter
        try:
            if self._roots:
                for root in self._roots:
                    self._handles.append(root.register_forward_pre_hook(enter, with_kwargs=True))
            else:
                self._present.finally_do(lambda: remove_global_hooks(enter))
                register_module_forward_pre_hook(enter)
        except BaseException:
            self.__exit__()
            raise
        return self._watch

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._present.__exit__(None, None, None)
        if self._quiet is not None:
            self._quiet.__exit__(None, None, None)


def settings_now(group: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a parameter group; schedulers fill tensors in place, hence copies.

    Learned hyperparameters stay themselves: they are what a replay may vary.
    """
    return {
        name: value.clone() if isinstance(value, Tensor) and not value.requires_grad else value
        for name, value in group.items()
        if name != "params"
    }


def copied(value: Any) -> Any:
    """Containers rebuilt and tensors cloned; everything else as it is."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {k: copied(v) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(copied(v) for v in value)
    return value
