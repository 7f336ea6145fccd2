"""Learn a prior from which a handful of images are enough: iMAML, and MAML beside it.

    python examples/imaml.py
    python examples/imaml.py --shots 1 --strategies cg nystrom
    python examples/imaml.py --data omniglot --data-root PATH --steps 600

A task shows a few images of each of five classes and asks for the classes of others. The inner
problem fits a network θ to the shown images and holds it near the prior φ; the outer one moves φ
so that the fitted networks do well on the others, summed over a batch of tasks. The classes of the
test tasks occur in no training task. All learners adapt to test tasks as they did in training.

The norm layers take the statistics of the images they are shown together, as in the published
runs: the images of a query help each other. With --norm group every image stands for itself.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import tyro
from _shared.checkpoint import Checkpoint, Stream
from _shared.fewshot import ClassPool, FewShot, FewShotSource, Task, load_few_shot
from _shared.output import print_table, save_figure, save_rows
from torch import Tensor, nn
from tqdm import tqdm

from hyperopt_torch import (
    IHVP,
    BilevelOptimizer,
    ConjugateGradient,
    GaussNewton,
    Hessian,
    Identity,
    ImplicitDifferentiation,
    Neumann,
    Nystrom,
    Unrolled,
)

# The Hessian λI of the proximal term is known: strategies get it as their damping.
STRATEGIES: dict[str, Callable[[float], IHVP]] = {
    "cg": lambda lam: ConjugateGradient(5, damping=lam),
    "neumann": lambda lam: Neumann(5, damping=lam),
    "nystrom": lambda lam: Nystrom(10, damping=lam),
    "identity": lambda lam: Identity(1 / lam),
}

CURVATURES = {"gauss-newton": GaussNewton, "hessian": Hessian}

# What a saved run may differ in from the settings of the run that goes on with it.
UNIMPORTANT = ("strategies", "shots", "resume", "threads", "out", "data_root")

# Hataya & Yamada 2023, table 3: Omniglot, five ways, by shots.
PUBLISHED = {
    "cg": {1: ".96", 5: ".98"},
    "neumann": {1: ".91", 5: ".97"},
    "nystrom": {1: ".95", 5: ".98"},
}


@dataclass
class Settings:
    """Learn a prior from which a handful of images are enough."""

    data: FewShotSource = "digits"
    """Image set; "digits" needs no download."""
    data_root: Path | None = None
    """Folder of omniglot28.npz and omniglot_splits."""
    strategies: tuple[Literal["cg", "neumann", "nystrom", "identity", "maml"], ...] = (
        "cg",
        "neumann",
        "nystrom",
        "identity",
        "maml",
    )
    """How the hypergradient is made; "maml" differentiates the inner steps themselves."""
    curvature: Literal["gauss-newton", "hessian"] = "gauss-newton"
    """What stands for the inner Hessian. H + λI itself is indefinite here, where CG stops early."""
    ways: int = 5
    """Classes of a task."""
    shots: tuple[int, ...] = (1,)
    """Images of each class that a task shows; one experiment for each."""
    queries: int = 15
    """Images of each class that a task asks for."""
    steps: int = 40
    """Outer steps."""
    meta_batch: int = 4
    """Tasks of an outer step."""
    inner_steps: int = 10
    """SGD steps on a task, from the prior."""
    inner_lr: float = 0.1
    """Inner learning rate."""
    lam: float = 2.0
    """λ of the proximal term λ/2·‖θ - φ‖² of the implicit strategies; "maml" has none."""
    outer_lr: float = 1e-3
    """Outer learning rate (Adam)."""
    channels: int = 16
    """Of each of the four convolutions."""
    norm: Literal["batch", "group"] = "batch"
    """Statistics over the images shown together, or over the channels of each."""
    val_tasks: int = 20
    """Validation tasks of a point of the learning curve; always the same ones."""
    val_every: int = 20
    """Outer steps between two points; the run is saved as often."""
    test_tasks: int = 600
    """Test tasks, looked at once, at the end."""
    paper: bool = False
    """The published size: 64 channels, 16 tasks an outer step, 1.6 million tasks."""
    seed: int = 0
    """Of the network and of the tasks."""
    threads: int = 1
    """CPU threads; tasks this small gain nothing from more."""
    resume: bool = False
    """Go on where an interrupted run with the same settings was saved."""
    out: Path = Path("results")
    """Folder of the figure, the table and the saved runs."""


@dataclass
class Run:
    """One strategy at one number of shots: a point of the learning curve is (step, accuracy)."""

    curve: list[list[float]]
    seconds: float = 0.0  # of training
    products: float = 0.0  # of the last hypergradient
    test: list[float] | None = None  # accuracy of each test task

    @property
    def interval(self) -> float:
        """Half of the 95% interval over test tasks; the trained prior is one."""
        return 1.96 * stdev(self.test) / sqrt(len(self.test))


def network(s: Settings, width: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    channels = 1
    for _ in range(4):
        norm = (
            nn.BatchNorm2d(s.channels, track_running_stats=False)
            if s.norm == "batch"
            else nn.GroupNorm(4, s.channels)
        )
        layers += [nn.Conv2d(channels, s.channels, 3, padding=1), norm, nn.ReLU()]
        if width > 1:
            layers.append(nn.MaxPool2d(2))
            width //= 2
        channels = s.channels
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * width**2, s.ways))


class Learner:
    """Adapts a network to tasks, each time from the prior."""

    def __init__(self, strategy: str, s: Settings, width: int) -> None:
        torch.manual_seed(s.seed)
        self.s = s
        self.prior = network(s, width)
        self.model = copy.deepcopy(self.prior)
        self.lam = 0.0 if strategy == "maml" else s.lam
        # The bilevel lines: θ is the inner level, the prior φ the outer one.
        estimator = (
            Unrolled()
            if strategy == "maml"
            else ImplicitDifferentiation(STRATEGIES[strategy](s.lam), CURVATURES[s.curvature]())
        )
        self.optimizer = BilevelOptimizer(
            torch.optim.SGD(self.model.parameters(), lr=s.inner_lr),
            torch.optim.Adam(self.prior.parameters(), lr=s.outer_lr),
            estimator=estimator,
        )

    def adapt(self, task: Task) -> None:
        """The inner problem: SGD from the prior on the images that the task shows."""

        def train_loss() -> tuple[Tensor, Tensor]:
            outputs = self.model(task.support_x)  # Gauss-Newton takes its curvature from them
            return F.cross_entropy(outputs, task.support_y) + self.pull(), outputs

        self.optimizer.start_from(self.prior.parameters())
        for _ in range(self.s.inner_steps):
            self.optimizer.inner_step(train_loss)

    def pull(self) -> Tensor | float:
        """The proximal term as λ·θᵀ(θ₀ - φ), θ₀ the value of θ.

        It has the gradient λ(θ - φ) and the cross derivative -λI of λ/2·‖θ - φ‖². Its Hessian λI
        is left to the damping of the strategy: a low-rank copy of H would spend its rank on it.
        """
        if not self.lam:
            return 0.0
        pairs = zip(self.model.parameters(), self.prior.parameters(), strict=True)
        return self.lam * sum((p * (p.detach() - q)).sum() for p, q in pairs)

    def outer_step(self, tasks: list[Task]) -> None:
        self.optimizer.outer.zero_grad()
        for task in tasks:
            self.adapt(task)
            query_loss = F.cross_entropy(self.model(task.query_x), task.query_y)
            self.optimizer.accumulate(query_loss / len(tasks))
        self.optimizer.outer.step()

    def accuracy(self, task: Task) -> float:
        self.adapt(task)
        with torch.no_grad():
            return (self.model(task.query_x).argmax(1) == task.query_y).float().mean().item()


def accuracies(learner: Learner, pool: ClassPool, shots: int, tasks: int) -> list[float]:
    """On the same tasks whenever it is called."""
    s, draws = learner.s, torch.Generator().manual_seed(1_000_003)
    return [
        learner.accuracy(pool.task(s.ways, shots, s.queries, draws))
        for _ in range(tasks)
    ]  # fmt: skip


def train(data: FewShot, strategy: str, shots: int, s: Settings) -> Run:
    learner = Learner(strategy, s, data.width)
    draws = torch.Generator().manual_seed(s.seed)
    label = f"{strategy} {shots}-shot"
    checkpoint = Checkpoint(
        s.out / "imaml" / f"{s.data}-{s.ways}-way-{shots}-shot-{strategy}.pt",
        prior=learner.prior,
        optimizer=learner.optimizer,
        draws=Stream(draws),
    )
    kept = {k: str(v) for k, v in asdict(s).items() if k not in UNIMPORTANT}
    done, run = 0, Run(curve=[])
    if s.resume:
        done, log = checkpoint.load()
        if log and log["settings"] != kept:
            raise SystemExit(f"{checkpoint.path} was saved with other settings: {log['settings']}")
        run = Run(**log["run"]) if log else run
    if run.test is not None:
        return run

    def save(step: int) -> None:
        checkpoint.save(step, run=asdict(run), settings=kept)

    with tqdm(total=s.steps, initial=done, desc=label, unit="step") as bar:
        for step in range(done, s.steps):
            if step == 0:
                run.curve.append([0, mean(accuracies(learner, data.val, shots, s.val_tasks))])
            start = time.perf_counter()
            learner.outer_step(
                [data.train.task(s.ways, shots, s.queries, draws) for _ in range(s.meta_batch)]
            )
            run.seconds += time.perf_counter() - start
            run.products = float(learner.optimizer.report.matvecs)
            bar.update()
            if (step + 1) % s.val_every == 0 or step + 1 == s.steps:
                score = mean(accuracies(learner, data.val, shots, s.val_tasks))
                run.curve.append([step + 1, score])
                bar.set_postfix_str(f"validation accuracy {score:.3f}")
                save(step + 1)
    run.test = accuracies(learner, data.test, shots, s.test_tasks)
    save(s.steps)
    return run


def draw(runs: dict[tuple[str, int], Run], s: Settings, name: str) -> None:
    figure, axes = plt.subplots(
        1, len(s.shots), figsize=(5.2 * len(s.shots), 3.8), sharey=True, squeeze=False
    )
    for axis, shots in zip(axes[0], s.shots, strict=True):
        for strategy in s.strategies:
            axis.plot(*zip(*runs[strategy, shots].curve, strict=True), label=strategy)
        axis.set(xlabel=f"outer steps of {s.meta_batch} tasks", title=f"{s.ways}-way {shots}-shot")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel(f"accuracy on {s.val_tasks} validation tasks")
    axes[0][0].legend(frameon=False)
    figure.suptitle(name, fontsize=11)
    save_figure(figure, s.out / "imaml.png")


def main(s: Settings) -> None:
    start = time.perf_counter()
    torch.set_num_threads(s.threads)
    if s.paper:
        s.channels, s.meta_batch, s.steps = 64, 16, 100_000
    data = load_few_shot(s.data, s.data_root)
    data.check(s.ways, max(s.shots) + s.queries)
    print(f"{data.name}: {len(data.train.images)} classes to learn from, "
          f"{len(data.test.images)} new ones for tests")  # fmt: skip
    runs = {(name, k): train(data, name, k, s) for k in s.shots for name in s.strategies}
    header = ["", "test accuracy", "±", "Omniglot, published", "products", "s / outer step"]
    rows: list[list[Any]] = [
        [
            f"{s.ways}-way {shots}-shot {name}",
            f"{mean(run.test):.3f}",
            f"{run.interval:.3f}",
            PUBLISHED.get(name, {}).get(shots, "") if s.ways == 5 else "",
            f"{run.products:.0f}",
            f"{run.seconds / s.steps:.3f}",
        ]
        for (name, shots), run in runs.items()
    ]
    print(f"\n{s.test_tasks} test tasks; ±: 95% interval over tasks, one trained prior")
    print_table(header, rows)
    save_rows(s.out / "imaml.csv", header, rows)
    draw(runs, s, data.name)
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
