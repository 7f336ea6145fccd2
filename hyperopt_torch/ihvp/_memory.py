"""What strategies and their parts remember: settings that stay, a state that changes."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

Self = TypeVar("Self", bound="Memory")


@dataclass(frozen=True)
class InnerStep:
    """What a strategy may learn from one inner step. The tensors are lent: copy what is kept.

    Attributes:
        gradient: (n,) ∇f, unscaled.
        batch_size: number of samples B whose mean f takes, where the closure told it.
        weights: (B,) the weights in f = mean(weights · losses), where the closure told them.
        chosen: the samples whose own gradients were taken: what
            :meth:`Memory.samples_wanted` answered for this step.
        chosen_rows: their rows √w_i ∇ℓ_i, (len(chosen), n).
        shapes: of the tensors that θ is made of, in their order; empty where nobody knows.
        biases: called, it tells which of these tensors is the bias of which, by their numbers:
            {weight: bias}, of the linear and convolutional layers that the closure went through.
    """

    gradient: Tensor
    batch_size: int | None = None
    weights: Tensor | None = None
    chosen: Sequence[int] = ()
    chosen_rows: Tensor | None = None
    shapes: Sequence[Sequence[int]] = ()
    biases: Callable[[], Mapping[int, int]] = dict

    def rows(self, index: Sequence[int]) -> Tensor:
        """(len(index), n) rows √w_i ∇ℓ_i, penalty excluded, for samples that were wanted.

        Raises:
            RuntimeError: the closure returned one number, which has no per-sample gradients.
        """
        if self.chosen_rows is None:
            raise RuntimeError(
                "Per-sample gradients need per-sample losses: let the training closure return a "
                "1-D tensor of losses, or PerSample(losses, weights, penalty), instead of their "
                'mean; or choose rows="batch".'
            )
        if list(index) == list(self.chosen):
            return self.chosen_rows
        place = {sample: row for row, sample in enumerate(self.chosen)}
        return self.chosen_rows[[place[sample] for sample in index]]


_SHAPING = (
    "window",
    "corrections",
    "spare",
    "rank",
    "subspace_dim",
    "structure",
    "rows",
    "scale",
)  # names of settings, of any strategy


class Memory:
    """Settings that never change and a ``state`` that does: what strategies and their parts share.

    Everything that changes lives in ``self.state``, a dict of tensors and plain numbers. Parts (a
    preconditioner, say) are attributes with a memory of their own. Then saving, loading,
    resetting and copying are written once, here.
    """

    state: dict[str, Any]
    state_of_its_own_size: tuple[str, ...] = ()  # names in it that are no vectors of θ's size
    _owner: weakref.ref[object] | None = None

    def __init__(self) -> None:
        self.state = self.initial_state()

    def initial_state(self) -> dict[str, Any]:
        """What the memory holds before anything has happened."""
        return {}

    def _parts(self) -> dict[str, Memory]:
        return {name: part for name, part in vars(self).items() if isinstance(part, Memory)}

    def reset(self) -> None:
        """Forgets everything learned so far: for a new inner problem."""
        self.state = self.initial_state()
        for part in self._parts().values():
            part.reset()

    @contextmanager
    def on_loan(self) -> Iterator[None]:
        """Whatever becomes of the memory within is undone at the end."""
        kept, self.state = self.state, _cloned(self.state)
        try:
            with ExitStack() as parts:
                for part in self._parts().values():
                    parts.enter_context(part.on_loan())
                yield
        finally:
            self.state = kept

    @property
    def vectors(self) -> int:
        """About how many vectors of n entries are held at the peak of a solve; by default 8."""
        return 8

    def reseed(self, agreed: Callable[[int], int]) -> None:
        """Replaces every seed by ``agreed(seed)``: several processes must draw the same."""
        if "seed" in self.state:
            self._seed = self.state["seed"] = agreed(int(self.state["seed"]))
        for part in self._parts().values():
            part.reseed(agreed)

    def begin(self) -> None:
        """Takes note that a new inner problem like the last one begins, as a new task does."""
        for part in self._parts().values():
            part.begin()

    def fresh(self: Self) -> Self:
        """A copy with the same settings and no memory."""
        twin = copy.copy(self)  # without its owner
        for name, part in self._parts().items():
            setattr(twin, name, part.fresh())
        twin.state = twin.initial_state()
        return twin

    def state_dict(self) -> dict[str, Any]:
        """The memory; loads with ``torch.load(..., weights_only=True)``."""
        return {
            "strategy": type(self).__name__,
            "settings": self._shape(),
            "state": _cloned(self.state),
            "parts": {name: part.state_dict() for name, part in self._parts().items()},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` gave.

        Raises:
            ValueError: it is no such dict, or the memory of another strategy, or of one with
                another window, rank or the like; nothing has been changed then.
        """
        self._check_state(state_dict)
        self._load(state_dict)

    def _load(self, state_dict: Mapping[str, Any]) -> None:
        self.state = _cloned(state_dict["state"])
        for name, part in self._parts().items():
            part._load(state_dict["parts"][name])

    def _check_state(self, state_dict: Any) -> None:
        name, keys = type(self).__name__, ("strategy", "settings", "state", "parts")
        missing = [k for k in keys if not isinstance(state_dict, Mapping) or k not in state_dict]
        if missing:
            raise ValueError(
                f"This is no state of {name}: it has no {', '.join(map(repr, missing))}. Load what "
                "state_dict() of the same strategy returned."
            )
        parts = self._parts()
        if state_dict["strategy"] != name or parts.keys() != state_dict["parts"].keys():
            raise ValueError(
                f"This state belongs to {state_dict['strategy']}, not to {name}; "
                "load it into the strategy that saved it."
            )
        if state_dict["settings"] != self._shape():
            raise ValueError(
                f"This state belongs to {name} with {state_dict['settings']}, not with "
                f"{self._shape()}; load it into a strategy of the same settings."
            )
        for key, part in parts.items():
            part._check_state(state_dict["parts"][key])

    def _shape(self) -> dict[str, Any]:
        """The settings that decide how the memory looks."""
        return {name: getattr(self, name) for name in _SHAPING if name in vars(self)}

    @property
    def remembers(self) -> bool:
        """Whether one solve, or inner step, changes what comes of the next."""
        own = self.observes or getattr(self, "warm_start", False) or getattr(self, "follows", False)
        return own or any(part.remembers for part in self._parts().values())

    def claim(self, owner: object) -> None:
        """Takes the strategy for one owner.

        Raises:
            ValueError: it remembers, and serves another owner that is still alive.
        """
        if self.remembers and self._other(owner) is not None:
            gc.collect()  # an owner of the past may be waiting to be collected
        known = self._other(owner)
        if self.remembers and known is not None:
            raise ValueError(
                f"This {self!r} already serves another {type(known).__name__}, and what it "
                "remembers is about that run. Give each its own: strategy.fresh()."
            )
        self._owner = weakref.ref(owner)

    def _other(self, owner: object) -> object | None:
        known = None if self._owner is None else self._owner()
        return None if known is owner else known

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_owner"}

    @property
    def observes(self) -> bool:
        """Whether inner steps are of interest; a step does nothing for a strategy otherwise."""
        own = type(self).observe is not Memory.observe
        return own or any(part.observes for part in self._parts().values())

    def samples_wanted(self, batch_size: int) -> Sequence[int]:
        """Which per-sample gradients to take in the coming step; by default those of the parts."""
        wanted = [s for part in self._parts().values() for s in part.samples_wanted(batch_size)]
        return list(dict.fromkeys(wanted))

    def observe(self, step: InnerStep) -> None:
        """Takes one inner step, its gradients there, its parameters not moved yet.

        Called at every inner step; by default the step is handed to the parts.
        """
        for part in self._parts().values():
            part.observe(step)

    def observe_penalty(self, curvature: Tensor) -> None:
        """Takes the mean diagonal entry of the penalty's Hessian, before a solve.

        Called where the closure returns its penalty apart; by default handed to the parts.
        """
        for part in self._parts().values():
            part.observe_penalty(curvature)

    def __repr__(self) -> str:
        settings = ", ".join(
            f"{name}={value!r}"
            for name, value in vars(self).items()
            if name != "state" and not name.startswith("_")
        )
        return f"{type(self).__name__}({settings})"


def _cloned(state: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
        for name, value in state.items()
    }
