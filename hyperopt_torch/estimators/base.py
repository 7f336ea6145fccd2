"""The interface of everything that `estimator=` takes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ..recording import Evaluation, Record
from ..report import SolveReport
from ._problem import BilevelProblem


class HypergradientEstimator(ABC):
    """From an outer loss to dg/dφ: the seam between implicit and trajectory methods.

    Law: :meth:`estimate` leaves parameters, buffers, ``.grad``, the state of both optimizers and
    the RNG stream bitwise as it found them.

    Attributes:
        report: the :class:`~hyperopt_torch.SolveReport` of the last estimate.
    """

    report: SolveReport | None = None
    first_order: bool = False  # whether first gradients are enough
    averages: bool = False  # whether :meth:`estimate` gives the answer of the whole group

    def claim(self, owner: object) -> None:
        """Refuses to serve two owners at once, where a memory would be mixed up."""

    def check(self, problem: BilevelProblem) -> None:
        """Raises where the estimator cannot serve this problem; called before the first step."""

    def before_backward(self, problem: BilevelProblem, evaluation: Evaluation) -> None:
        """Called at each recorded evaluation, the graph of the loss still alive.

        Whatever differentiates it must retain the graph, and keep nothing that holds it.
        """

    def observe(self, problem: BilevelProblem, records: Sequence[Record]) -> None:
        """Called at each inner step: gradients are there, parameters have not moved yet.

        ``records`` are the micro-batches of this step. Optimizers that evaluate the loss several
        times a step (LBFGS) show their first evaluation.
        """

    def skipped(self, problem: BilevelProblem, records: Sequence[Record]) -> None:
        """Called instead of :meth:`observe` where a GradScaler skipped the step."""

    def stepped(self, problem: BilevelProblem) -> None:
        """Called after each inner step: parameters are where the optimizer has put them."""

    @property
    def vectors(self) -> int | None:
        """About how many vectors of n entries an estimate holds; None where that is not known."""
        return None

    @property
    def observes(self) -> bool:
        """Whether :meth:`observe` does anything; a step need not prepare for it otherwise."""
        return type(self).observe is not HypergradientEstimator.observe

    @abstractmethod
    def estimate(self, problem: BilevelProblem, outer_loss: Tensor) -> list[Tensor | None]:
        """dg/dφ for each of ``problem.outer_parameters``; None where nothing reaches it."""

    def begin(self, initial: Sequence[Tensor]) -> None:
        """Called when the inner parameters were started from these outer ones, one for each."""

    def finish(self) -> None:
        """Called after a hypergradient was accumulated: further ones may follow, then new steps."""

    def restart(self) -> None:
        """Called after each outer step: a new stretch of inner steps begins."""

    def recover(self) -> None:
        """Called where a hypergradient was not finite: what came of it must not live on."""

    def reset(self) -> None:
        """Forgets everything learned so far: for a new inner problem."""

    @contextmanager
    def on_loan(self) -> Iterator[None]:
        """Whatever becomes of the memory within is undone at the end."""
        memory = self.state_dict()
        try:
            yield
        finally:
            self.load_state_dict(memory)

    def state_dict(self) -> dict[str, Any]:
        """The memory of the estimator; loads with ``torch.load(..., weights_only=True)``."""
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` gave."""
