"""Learn features on which a few images of new classes are enough to fit a head.

    python examples/few_shot_features.py
    python examples/few_shot_features.py --backbone resnet12 --methods pzobo-per-tensor direct
    python examples/few_shot_features.py --data omniglot --data-root PATH --paper

A task shows a few images of each of five classes and asks for the classes of others. The inner
problem fits a linear head θ to the shown images, on a body φ that all tasks share; the outer one
moves the body so that the fitted heads do well on the others. The classes of the test tasks occur
in no training task. After the few-shot setting of Sow, Ji & Liang, "On the convergence theory for
Hessian-free bilevel algorithms", NeurIPS 2022; hyper_representation.py says how to read the table.
The norm layers take the statistics of the images shown together, as is usual here.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from math import sqrt
from pathlib import Path
from statistics import mean, median, stdev
from typing import Literal

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import tyro
from _shared.checkpoint import Checkpoint, Stream
from _shared.estimators import METHODS, Method, Run, direct_term, make_estimator
from _shared.features import FewShotNet
from _shared.fewshot import FewShot, FewShotSource, Task, load_few_shot
from _shared.output import save_figure
from _shared.runlog import RunLog
from torch import Tensor
from tqdm import tqdm

from hyperopt_torch import BilevelOptimizer

INNER_LR, MOMENTUM, PENALTY = 0.01, 0.9, 0.2  # of SGD on the head; λ of ½λ‖θ‖²
OUTER_LR, DROPS = 0.01, ((1500, 0.1), (3500, 0.01))  # of Adam; (step, factor from there on)
SMOOTHING = 0.1  # μ of PZOBO
QUERIES = 10  # images of each class that a task asks for
SIZES = ("ways", "shots", "inner_steps", "outer_steps", "meta_batch")


@dataclass(frozen=True)
class Settings:
    """Learn features for few-shot tasks. A quick look: --outer-steps 3 --test-tasks 5."""

    data: FewShotSource = "digits"
    """Image set; "digits" needs no download."""
    data_root: Path | None = None
    """Folder of omniglot28.npz and omniglot_splits."""
    methods: tuple[Method, ...] = METHODS
    """Ways to the hypergradient; "fixed-point" is a Neumann series, a term for each inner step."""
    backbone: Literal["conv4", "strided", "resnet12"] = "conv4"
    """The body; "strided" is conv4 with strides in place of pooling, at a quarter of the cost."""
    channels: int = 16
    """Of each convolution of conv4, or of the first block of resnet12."""
    start: Literal["zero", "mean"] = "zero"
    """The head at the start of a task: zero, or the mean of the heads of the last outer step."""
    ways: int = 5
    """Classes of a task."""
    shots: int = 5
    """Images of each class that a task shows."""
    inner_steps: int = 30
    """Steps of the head on a task."""
    outer_steps: int = 25
    """Steps of the body."""
    meta_batch: int = 4
    """Tasks of an outer step."""
    test_tasks: int = 300
    """Test tasks, looked at once, at the end."""
    paper: bool = False
    """Published values (PAPER in the script) for the options that are left at their defaults."""
    seeds: tuple[int, ...] = (0,)
    """Of the network, of the tasks and of PZOBO's directions; a run for each."""
    threads: int = 1
    """CPU threads."""
    resume: bool = False
    """Go on where an interrupted run with the same settings was saved, to the same result."""
    out: Path = Path("results")
    """Folder of the figure, the table and the saved runs."""


PAPER = {"channels": 64, "start": "mean", "inner_steps": 50, "outer_steps": 5000, "meta_batch": 16}


def adapt(learner: FewShotNet, optimizer: BilevelOptimizer, task: Task, s: Settings) -> None:
    """The inner problem: a new head for the images that the task shows."""

    def train_loss() -> Tensor:
        penalty = sum(p.square().sum() for p in learner.head.parameters())
        return F.cross_entropy(learner(task.support_x), task.support_y) + PENALTY / 2 * penalty

    learner.head.load_state_dict(learner.first.state_dict())
    optimizer.inner.state.clear()
    optimizer.reset()
    for _ in range(s.inner_steps):
        optimizer.inner_step(train_loss)


def accuracies(
    learner: FewShotNet, optimizer: BilevelOptimizer, data: FewShot, s: Settings
) -> list[float]:
    """On test tasks, the same ones for all methods."""
    draws, results = torch.Generator().manual_seed(1_000_003), []
    for _ in tqdm(range(s.test_tasks), "test tasks", leave=False):
        task = data.test.task(s.ways, s.shots, QUERIES, draws)
        adapt(learner, optimizer, task, s)
        with torch.no_grad():
            right = learner(task.query_x).argmax(1) == task.query_y
        results.append(right.float().mean().item())
    return results


def train(data: FewShot, method: Method, seed: int, s: Settings) -> Run:
    torch.manual_seed(seed)
    draws = torch.Generator().manual_seed(seed)
    learner = FewShotNet(s.backbone, s.channels, s.ways, data.width)
    outer = list(learner.body.parameters())
    # The bilevel lines: the head is the inner level, the body the outer one.
    optimizer = BilevelOptimizer(
        torch.optim.SGD(learner.head.parameters(), lr=INNER_LR, momentum=MOMENTUM),
        torch.optim.Adam(outer, lr=OUTER_LR),
        estimator=make_estimator(method, s.inner_steps, INNER_LR, SMOOTHING),
    )
    checkpoint = Checkpoint(
        s.out / "few_shot_features" / f"{s.data}-{s.backbone}-{method}-{seed}.pt",
        learner=learner, optimizer=optimizer, draws=Stream(draws),
    )  # fmt: skip
    unimportant = ("methods", "seeds", "paper", "resume", "threads", "out", "data_root")
    kept = {k: str(v) for k, v in asdict(s).items() if k not in unimportant}
    done, run = Run.load(checkpoint, kept) if s.resume else (0, Run())
    if run.test:
        return run
    every = max(1, s.outer_steps // 20)
    bar = tqdm(range(done, s.outer_steps), method, s.outer_steps, initial=done)
    for step in bar:
        start = time.process_time()
        factor = [1.0, *(f for at, f in DROPS if step >= at)][-1]
        optimizer.outer.param_groups[0]["lr"] = OUTER_LR * factor
        loss, heads = 0.0, []
        direct = [torch.zeros_like(p) for p in outer] if step % every == 0 else None
        # More bilevel lines: for each task the inner steps, then its part of the hypergradient.
        optimizer.outer.zero_grad()
        for _ in range(s.meta_batch):
            task = data.train.task(s.ways, s.shots, QUERIES, draws)
            adapt(learner, optimizer, task, s)
            heads.append([p.detach().clone() for p in learner.head.parameters()])
            query_loss = F.cross_entropy(learner(task.query_x), task.query_y) / s.meta_batch
            if direct:  # for the table
                pairs = zip(direct, direct_term(query_loss, outer), strict=True)
                direct = [a + b for a, b in pairs]
            loss += optimizer.accumulate(query_loss).item()
            run.count(optimizer.report)
        optimizer.outer.step()
        if s.start == "mean":
            for p, of_tasks in zip(
                learner.first.parameters(), zip(*heads, strict=True), strict=True
            ):
                p.data = torch.stack(of_tasks).mean(0)
        run.losses.append(loss)
        run.seconds += time.process_time() - start
        if direct:
            run.look(outer, direct)
        bar.set_postfix_str(f"outer loss {loss:.4g}")
        if (step + 1) % every == 0:
            checkpoint.save(step + 1, run=asdict(run), settings=kept)
    checkpoint.save(s.outer_steps, run=asdict(run), settings=kept)
    run.test = accuracies(learner, optimizer, data, s)
    checkpoint.save(s.outer_steps, run=asdict(run), settings=kept)
    return run


def row(run: Run, s: Settings) -> dict[str, float | int | None]:
    """What a run came to."""
    several = len(run.test) > 1
    return {
        "outer_loss_start": run.losses[0],
        "outer_loss": run.late_loss,
        "accuracy": mean(run.test),
        "interval_over_tasks": 1.96 * stdev(run.test) / sqrt(len(run.test)) if several else None,
        "second_over_direct": median(run.ratios),
        "products": run.products,
        "gradients": run.gradients,
        "cpu_s": run.seconds,
    }


def draw(s: Settings, log: RunLog, name: str) -> None:
    figure, axis = plt.subplots(figsize=(5.2, 3.8), layout="constrained")
    for method, points in log.curves("step", "outer_loss").items():
        axis.plot(*zip(*points, strict=True), label=method, lw=1.3)
    axis.set(xlabel=f"outer steps of {s.meta_batch} tasks", ylabel="outer loss", yscale="log")
    axis.set_title(f"{name}, {s.ways}-way {s.shots}-shot", fontsize=11)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8)
    save_figure(figure, s.out / "few_shot_features.png")


COLUMNS = {
    "start": ("outer_loss_start", ".3f"),
    "outer loss": ("outer_loss", ".3f"),
    "test accuracy": ("accuracy", ".3f"),
    "± over tasks": ("interval_over_tasks", ".3f"),
    "|second|/|direct|": ("second_over_direct", ".2g"),
    "products": ("products", ".0f"),
    "gradients": ("gradients", ".0f"),
    "CPU s": ("cpu_s", ".1f"),
}


def main(s: Settings) -> None:
    torch.set_num_threads(s.threads)
    if s.paper:
        usual = asdict(Settings())
        s = replace(s, **{k: v for k, v in PAPER.items() if getattr(s, k) == usual[k]})
    data, log = load_few_shot(s.data, s.data_root), RunLog(s.out, "few_shot_features", s.resume)
    data.check(s.ways, s.shots + QUERIES)
    print(f"{data.name}: {len(data.train.images)} classes to learn from, "
          f"{len(data.test.images)} new ones for tests")  # fmt: skip
    for seed in s.seeds:
        for method in s.methods:
            factors = {"method": method, "seed": seed}
            factors |= {k: getattr(s, k) for k in ("backbone", "channels", "start", *SIZES)}
            if not log.has(factors):
                run = train(data, method, seed, s)
                every = max(1, s.outer_steps // 20)
                parts = [(i, run.losses[i : i + every]) for i in range(0, len(run.losses), every)]
                curve = [{"step": i, "outer_loss": mean(part)} for i, part in parts]
                log.add(factors, row(run, s), curve)
    print(f"\n{s.test_tasks} test tasks a run")
    log.show(("method",), COLUMNS)
    draw(s, log, data.name)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
