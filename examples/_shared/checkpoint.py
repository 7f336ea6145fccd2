"""Stop a run and go on later, to the same result."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor


class Stateful(Protocol):
    """Modules, optimizers, BilevelOptimizer, generators wrapped in :class:`Stream`."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


class Stream:
    """A generator as something that has a ``state_dict``; None: torch's global one."""

    def __init__(self, generator: torch.Generator | None = None) -> None:
        self.generator = generator or torch.default_generator

    def state_dict(self) -> dict[str, Tensor]:
        return {"state": self.generator.get_state()}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        self.generator.set_state(state_dict["state"])


class Checkpoint:
    """What a run consists of, in one file.

    Args:
        path: the file.
        parts: everything that changes during the run: ``model=model, optimizer=optimizer, ...``.
            torch's global random stream is added.
    """

    def __init__(self, path: Path, **parts: Stateful) -> None:
        self.path = path
        self.parts = parts | {"random": Stream()}

    def save(self, step: int, **log: Any) -> None:
        """Writes the state after ``step`` steps; ``log`` holds tensors and plain values."""
        state = {name: part.state_dict() for name, part in self.parts.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_suffix(".draft")  # an interruption must not spoil the last good one
        torch.save({"step": step, "log": log, "parts": state}, draft)
        draft.replace(self.path)

    def load(self) -> tuple[int, dict[str, Any]]:
        """(steps done, log) of the run in the file, its state restored; (0, {}) without a file."""
        if not self.path.exists():
            print(f"no checkpoint at {self.path}: starting anew")
            return 0, {}
        saved = torch.load(self.path, weights_only=True)
        for name, part in self.parts.items():
            part.load_state_dict(saved["parts"][name])
        print(f"resumed {self.path} after {saved['step']} steps")
        return saved["step"], saved["log"]
