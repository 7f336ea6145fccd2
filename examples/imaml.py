"""Learn a prior from which a handful of images are enough: iMAML, and its rivals beside it.

    python examples/imaml.py
    python examples/imaml.py --methods cg nystrom --shots 5
    python examples/imaml.py --data omniglot --data-root PATH --seeds 0 1 2

A task shows a few images of each of five classes and asks for the classes of others. The inner
problem fits a network θ to the shown images and holds it near the prior φ, by λ/2·‖θ - φ‖²; the
outer one moves φ so that the fitted networks do well on the others. The classes of the test tasks
occur in no training task. After Rajeswaran et al., "Meta-learning with implicit gradients",
NeurIPS 2019, and table 3 of Hataya & Yamada, AISTATS 2023.

The tasks of a batch are fitted side by side, each from a copy of φ of its own, and the copies'
hypergradients are averaged. The norm layers take the statistics of the images shown together, as
in the published runs: the images of a query help each other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
import tyro
from _shared.fewshot import FewShot, FewShotSource, Task, load_few_shot, network
from _shared.runlog import RunLog
from _shared.side_by_side import SideBySide, accuracies
from torch import Tensor
from torch.func import jvp, vmap
from tqdm import tqdm

from hyperopt_torch import (
    IHVP,
    BilevelOptimizer,
    ConjugateGradient,
    Identity,
    Neumann,
    Nystrom,
    Unrolled,
)
from hyperopt_torch.functional import hypergradient

# The Hessian λI of the proximal term is known: the solvers get it as their damping. With each, the
# products of one hypergradient: the closing one counts, which CG does without.
SOLVERS: dict[str, tuple[Callable[[float], IHVP], int]] = {
    "cg": (lambda damping: ConjugateGradient(5, tol=0.0, damping=damping), 5),
    "nystrom": (lambda damping: Nystrom(10, damping=damping), 11),
    "neumann": (lambda damping: Neumann(5, damping=damping), 14),  # eight find its scale
    "identity": (lambda damping: Identity(1 / damping), 1),
}
Method = Literal["default", "cg", "nystrom", "neumann", "identity", "unrolled", "maml",
                 "first-order", "reptile", "prototypes", "untrained"]  # fmt: skip
WITHOUT_PULL = ("maml", "first-order", "reptile")
FACTORS = ("data", "validate", "steps", "tasks", "inner_steps", "inner_lr", "lam", "damping",
           "outer_lr", "channels")  # fmt: skip
COLUMNS = {
    "accuracy": ("accuracy", ".3f"),
    "± over tasks": ("interval_over_tasks", ".3f"),
    "class means": ("class_means", ".3f"),
    "products": ("products", ".0f"),
    "CPU s": ("cpu_s", ".1f"),
}


@dataclass(frozen=True)
class Settings:
    """Learn a prior for few-shot tasks. A quick look: --steps 5 --test-tasks 20."""

    data: FewShotSource = "digits"
    """Image set; "digits" needs no download."""
    data_root: Path | None = None
    """Folder of omniglot28.npz and omniglot_splits."""
    methods: tuple[Method, ...] = get_args(Method)
    """iMAML with the default strategy or a solver; the derivative of the inner steps themselves,
    with the proximal term ("unrolled") or without ("maml"); MAML with θ - φ held fixed; Reptile;
    class means instead of an inner problem; or no training at all."""
    ways: int = 5
    """Classes of a task."""
    shots: tuple[int, ...] = (1,)
    """Images of each class that a task shows; one experiment for each."""
    queries: int = 5
    """Images of each class that a task asks for."""
    seeds: tuple[int, ...] = (0,)
    """Of the network and of the tasks; a run for each."""
    steps: int = 60
    """Outer steps."""
    tasks: int = 16
    """Tasks of an outer step."""
    inner_steps: int = 10
    """SGD steps on a task, from the prior."""
    inner_lr: float = 0.3
    """Inner learning rate."""
    lam: float = 0.02
    """λ of the proximal term."""
    damping: float | None = None
    """ρ of cg, nystrom, neumann and identity; the default is λ, with which they solve what they
    should. Table 3 was made with .01."""
    outer_lr: float = 0.01
    """Of Adam; it falls to zero along a cosine."""
    channels: int = 16
    """Of each of the four convolutions."""
    test_tasks: int = 608
    """Test tasks, looked at once, at the end; in whole batches."""
    validate: bool = False
    """Whether to take validation classes for the test: for the choice of settings."""
    threads: int = 1
    """CPU threads."""
    resume: bool = False
    """Go on where a stopped command was; what is in the table of --out is not done again."""
    out: Path = Path("results")
    """Folder of the figure and the tables."""


class Learner:
    """A prior φ, and a batch of networks θ that are fitted from it."""

    def __init__(self, method: Method, seed: int, width: int, s: Settings) -> None:
        torch.manual_seed(seed)
        self.method, self.s, self.products = method, s, 0
        self.nets = SideBySide(network(s.ways, s.channels, width, strided=True), s.tasks)
        self.lam = 0.0 if method in WITHOUT_PULL else s.lam
        self.theta, self.copies = self.nets.copies(), self.nets.copies()
        # The bilevel lines: θ is the inner level, each task's copy of the prior φ the outer one.
        self.bilevel = BilevelOptimizer(
            torch.optim.SGD(self.theta, lr=s.inner_lr),
            torch.optim.SGD(self.copies, lr=1.0),  # never steps: Adam does, for all copies
            estimator=Unrolled() if method in ("unrolled", "maml") else None,
        )
        self.adam = torch.optim.Adam(self.nets.prior, lr=s.outer_lr)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.adam, max(1, s.steps))

    def adapt(self, task: Task) -> None:
        """The inner problems: SGD from the prior on the images that each task shows."""

        def train_loss() -> tuple[Tensor, Tensor]:
            loss, outputs = self.nets.losses(self.theta, task.support_x, task.support_y)
            pairs = zip(self.theta, self.copies, strict=True)
            pull = sum((p - q).square().sum() for p, q in pairs)
            return loss + self.lam / 2 * pull, outputs  # Gauss-Newton looks at the outputs

        with torch.no_grad():
            for copy, p in zip(self.copies, self.nets.prior, strict=True):
                copy.copy_(p.expand_as(copy))
        self.bilevel.start_from(self.copies)
        for _ in range(self.s.inner_steps):
            self.bilevel.inner_step(train_loss)

    def solved(self, task: Task) -> Sequence[Tensor]:
        """By a solver of ``SOLVERS``, for each task on its own."""
        make, products = SOLVERS[self.method]
        ihvp = make(self.lam if self.s.damping is None else self.s.damping)
        self.products += products

        def of_task(theta: list[Tensor], x: Tensor, y: Tensor, qx: Tensor, qy: Tensor) -> Any:
            def inner(w: list[Tensor], phi: list[Tensor]) -> Tensor:
                # The network, linearised at θ: its Hessian is the Gauss-Newton matrix.
                step = [a - b for a, b in zip(w, theta, strict=True)]
                at, slope = jvp(lambda t: self.nets.outputs(t, x), (theta,), (step,))
                # Gradient and cross derivative of the proximal term; its Hessian is the damping.
                pull = sum((a * (b - p)).sum() for a, b, p in zip(w, theta, phi, strict=True))
                return F.cross_entropy(at + slope, y) + self.lam * pull

            def outer(w: list[Tensor], phi: list[Tensor]) -> Tensor:
                return F.cross_entropy(self.nets.outputs(w, qx), qy)

            # A bilevel line: one task's part.
            return hypergradient(inner, outer, theta, [p.detach() for p in self.nets.prior], ihvp)

        of_batch, theta = vmap(of_task, randomness="same"), [p.detach() for p in self.theta]
        return of_batch(theta, task.support_x, task.support_y, task.query_x, task.query_y)

    def gradients(self, task: Task) -> Sequence[Tensor]:
        """By each copy of the prior, (tasks, ...)."""
        self.adapt(task)
        if self.method == "reptile":
            return [a - b for a, b in zip(self.copies, self.theta, strict=True)]
        if self.method in SOLVERS:
            return self.solved(task)
        loss = self.nets.losses(self.theta, task.query_x, task.query_y)[0]
        if self.method == "first-order":
            return torch.autograd.grad(loss, self.theta)
        found = self.bilevel.hypergradient(loss)  # a bilevel line: of all tasks at once
        self.products += self.bilevel.report.matvecs
        return found

    def outer_step(self, task: Task) -> None:
        if self.method == "prototypes":
            outputs = self.nets.class_means(task).flatten(0, 1)
            parts = torch.autograd.grad(F.cross_entropy(outputs, task.query_y.flatten()),
                                        self.nets.prior, materialize_grads=True)  # fmt: skip
        else:
            parts = [g.detach().mean(0) for g in self.gradients(task)]
        for p, part in zip(self.nets.prior, parts, strict=True):
            p.grad = part
        self.adam.step()
        self.schedule.step()

    def fitted(self, task: Task) -> Tensor:
        """Outputs for the queries, of the fitted networks."""
        self.adapt(task)
        return self.nets.losses(self.theta, task.query_x, task.query_y)[1]


def train(
    data: FewShot, method: Method, shots: int, seed: int, s: Settings
) -> dict[str, float | int]:
    """One run: what it came to."""
    learner, draws = Learner(method, seed, data.width, s), torch.Generator().manual_seed(seed)
    start = time.process_time()
    for _ in tqdm(range(s.steps if method != "untrained" else 0), f"{method}, seed {seed}"):
        learner.outer_step(data.train.tasks(s.tasks, s.ways, shots, s.queries, draws))
    seconds, pool = time.process_time() - start, data.val if s.validate else data.test
    numbers = s.test_tasks, s.tasks, s.ways, shots, s.queries
    right = accuracies(pool, learner.fitted, *numbers)
    return {
        "accuracy": mean(right),
        "interval_over_tasks": 1.96 * stdev(right) / sqrt(len(right)),
        "class_means": mean(accuracies(pool, learner.nets.class_means, *numbers)),
        "products": learner.products,
        "cpu_s": seconds,
    }


def main(s: Settings) -> None:
    torch.set_num_threads(s.threads)
    data, log = load_few_shot(s.data, s.data_root), RunLog(s.out, "imaml", s.resume)
    data.check(s.ways, max(s.shots) + s.queries)
    print(f"{data.name}: {len(data.train.images)} classes to learn from, "
          f"{len(data.test.images)} new ones for tests")  # fmt: skip
    for seed in s.seeds:
        for shots in s.shots:
            for method in s.methods:
                factors = {"method": method, "shots": shots, "seed": seed}
                factors |= {name: getattr(s, name) for name in FACTORS}
                if not log.has(factors):
                    log.add(factors, train(data, method, shots, seed, s))
    log.show(("shots", "method"), COLUMNS)
    log.panels(("accuracy", "class_means"), "shots", f"{data.name}, {s.ways}-way")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
