"""Learn features on which a head, fitted exactly, tells new classes apart from a few images.

    python examples/few_shot_heads.py
    python examples/few_shot_heads.py --data omniglot --data-root PATH --steps 900 400 --seeds 0 1 2

The inner problem is the head θ of a task, a regularised softmax on the features of the shown
images; the outer one moves the body that makes the features. Only the head adapts, as in R2-D2
(Bertinetto et al., ICLR 2019) and MetaOptNet (Lee et al., CVPR 2019): this stands beside iMAML,
where the whole network adapts (imaml.py), not in its place.

The outer variables of a task are its features, not the body: `functional.hypergradient`, under
`vmap` over many tasks, gives the derivative of the query losses by the features, and ONE backward
pass takes them all through the body. So one batch of images serves as many tasks as one likes.
Norm layers keep running statistics: at a test every image is seen alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Literal

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import tyro
from _shared.fewshot import FewShot, FewShotSource, load_few_shot
from _shared.heads import (
    Body,
    accuracies,
    draw_images,
    draw_tasks,
    embed,
    fit_head,
    labels,
    prototype_logits,
)
from _shared.output import print_table, save_figure, save_rows
from torch import Tensor, nn
from torch.func import grad_and_value, vmap
from tqdm import tqdm

from hyperopt_torch import IHVP, ConjugateGradient, Identity
from hyperopt_torch.functional import hypergradient

Method = Literal["implicit", "identity", "direct", "prototypes", "classifier", "random"]
EPISODIC = ("implicit", "identity", "direct", "prototypes")  # trained on tasks of so many shots
PRODUCTS = {"implicit": 10, "identity": 1}  # of one hypergradient, Jᵀx included
PENALTIES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)  # tried for the heads of the test tasks


@dataclass(frozen=True)
class Settings:
    """Learn features for few-shot tasks. A quick look: --steps 20 20 --test-tasks 50."""

    data: FewShotSource = "digits"
    """Image set; "digits" needs no download."""
    data_root: Path | None = None
    """Folder of omniglot28.npz and omniglot_splits."""
    methods: tuple[Method, ...] = (*EPISODIC, "classifier", "random")  # type: ignore[assignment]
    """How the body is trained: by the hypergradient through exact heads; by the same with x = b;
    with the heads held fixed; through class means in place of heads; as an ordinary classifier of
    all training classes, no tasks at all; or not."""
    shots: tuple[int, ...] = (1, 5)
    """Images of each class that a task shows; an experiment for each."""
    seeds: tuple[int, ...] = (0,)
    """Of the body and of the draws; a run for each."""
    ways: int = 5
    """Classes of a task."""
    queries: int = 5
    """Images of each class that a training task asks for."""
    images: int = 240
    """Of a batch, in as many classes as (shots + queries) goes into it."""
    tasks: int = 32
    """Tasks drawn from the features of a batch."""
    steps: tuple[int, ...] = (100, 60)
    """Outer steps, of one batch each, for each entry of ``shots``."""
    lr: float = 0.01
    """Of Adam on the body; it falls to zero along a cosine."""
    penalty: float = 0.01
    """λ of the heads in training: mean cross-entropy + ½λ‖θ‖²."""
    channels: int = 64
    """Of each of the four convolutions."""
    test_tasks: int = 1000
    """Test tasks, looked at once, at the end."""
    threads: int = 1
    """CPU threads."""
    out: Path = Path("results")
    """Folder of the figure and the table."""


def inner_loss(head: Tensor, features: tuple[Tensor, Tensor], penalty: float) -> Tensor:
    shown = features[0]
    loss = F.cross_entropy(shown @ head, labels(len(shown), head.shape[1]))
    return loss + penalty / 2 * head.square().sum()


def outer_loss(head: Tensor, features: tuple[Tensor, Tensor]) -> Tensor:
    asked = features[1]
    return F.cross_entropy(asked @ head, labels(len(asked), head.shape[1]))


Gradient = Callable[[Tensor, Tensor], tuple[tuple[Tensor, Tensor], Tensor]]


def through_heads(ihvp: IHVP | None, s: Settings) -> Gradient:
    """One task's (d loss / d features, loss); ``ihvp`` None: the direct term alone."""

    def gradient(shown: Tensor, asked: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        head, features = fit_head(shown, s.ways, s.penalty), (shown, asked)
        if ihvp is None:
            return grad_and_value(outer_loss, argnums=1)(head, features)

        # The bilevel line: features are the outer variables.
        def inner(head: Tensor, features: tuple[Tensor, Tensor]) -> Tensor:
            return inner_loss(head, features, s.penalty)

        return hypergradient(inner, outer_loss, head, features, ihvp), outer_loss(head, features)

    return gradient


def through_prototypes(s: Settings) -> Gradient:
    def loss(shown: Tensor, asked: Tensor) -> Tensor:
        logits = prototype_logits(shown, asked, s.ways) / s.penalty
        return F.cross_entropy(logits, labels(len(logits), s.ways))

    return grad_and_value(loss, argnums=(0, 1))


def train(
    data: FewShot, method: Method, shots: int, steps: int, seed: int, s: Settings
) -> tuple[Body, float]:
    """A body and the CPU seconds that it took."""
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed)
    body = Body(data.width, s.channels).to(memory_format=torch.channels_last)
    pool, each = data.train, 1 if method == "classifier" else shots + s.queries
    classes = min(s.images // each, len(pool.images))
    last = nn.Linear(body.size, len(pool.images))  # of the classifier alone
    modules = nn.ModuleList([body, last]) if method == "classifier" else body
    adam = torch.optim.Adam(modules.parameters(), lr=s.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    through: dict[str, Gradient] = {
        "implicit": through_heads(ConjugateGradient(PRODUCTS["implicit"], tol=0.0), s),
        "identity": through_heads(Identity(), s),
        "direct": through_heads(None, s),
        "prototypes": through_prototypes(s),
    }
    start = time.process_time()
    steps = min(steps, 20) if method == "random" else steps
    for _ in tqdm(range(steps), f"{method} {shots}-shot, seed {seed}", leave=False):
        chosen = torch.randperm(len(pool.images), generator=g)[:classes]
        features = body(draw_images(pool, chosen.tolist(), each, g))
        if method == "random":  # the norm layers have now seen the images, and that is all
            continue
        adam.zero_grad()
        if method == "classifier":
            F.cross_entropy(last(features * sqrt(body.size)), chosen).backward()
        else:
            shown, asked = draw_tasks(s.tasks, classes, each, s.ways, shots, s.queries, g)
            cached = features.detach()
            parts, _ = vmap(through[method])(cached[shown], cached[asked])
            rows = torch.cat([shown.flatten(), asked.flatten()])
            slope = torch.cat([part.flatten(0, 1) for part in parts]) / s.tasks
            features.backward(torch.zeros_like(cached).index_add(0, rows, slope))
        adam.step()
        schedule.step()
    return body, time.process_time() - start


Scores = dict[str, tuple[float, list[float]]]


def test(body: Body, data: FewShot, shots: int, s: Settings) -> Scores:
    """By kind of head: λ, chosen on validation tasks, and the accuracies of test tasks."""
    seen, each = embed(body, data.val, len(data.val.images))
    tried = {p: mean(accuracies(seen, each, s.ways, shots, 300, p)) for p in PENALTIES}
    best = max(tried, key=lambda p: tried[p])
    new, each = embed(body, data.test, len(data.test.images))
    return {
        "softmax": (best, accuracies(new, each, s.ways, shots, s.test_tasks, best)),
        "class means": (0.0, accuracies(new, each, s.ways, shots, s.test_tasks, None)),
    }


HEADER = ("method", "head", "shots", "seed", "accuracy", "interval_over_tasks", "penalty",
          "cpu_s", "products")  # fmt: skip


def save(rows: list[list[str | float]], s: Settings) -> None:
    cells = [[f"{x:.6g}" if isinstance(x, float) else x for x in row] for row in rows]
    save_rows(s.out / "few_shot_heads.csv", HEADER, cells)


def run(data: FewShot, s: Settings) -> list[list[str | float]]:
    """One row for each trained body, number of shots and kind of head, as in HEADER."""
    rows: list[list[str | float]] = []
    for method in s.methods:
        for seed in s.seeds:
            for shots, steps in zip(s.shots, s.steps, strict=True):
                if method in EPISODIC or shots == s.shots[0]:  # the others serve for all shots
                    body, seconds = train(data, method, shots, steps, seed, s)
                for head, (penalty, right) in test(body, data, shots, s).items():
                    interval = 1.96 * stdev(right) / sqrt(len(right))
                    rows.append([method, head, shots, seed, mean(right), interval, penalty,
                                 seconds, PRODUCTS.get(method, 0) * s.tasks * steps])  # fmt: skip
                save(rows, s)
    return rows


def draw(rows: list[list[str | float]], s: Settings, name: str) -> None:
    """Test error by method, a point a seed; the two kinds of heads side by side."""
    figure, axes = plt.subplots(1, len(s.shots), figsize=(5 * len(s.shots), 3.4), squeeze=False)
    for axis, shots in zip(axes[0], s.shots, strict=True):
        for head, shift, mark in (("softmax", -0.12, "o"), ("class means", 0.12, "^")):
            of_head = [r for r in rows if r[1] == head and r[2] == shots]
            at = [s.methods.index(r[0]) + shift for r in of_head]  # type: ignore[arg-type]
            axis.plot(at, [1 - float(r[4]) for r in of_head], mark, ms=5, alpha=0.8, label=head)
        axis.set_xticks(range(len(s.methods)), s.methods, rotation=30)
        axis.set(yscale="log", xlim=(-0.5, len(s.methods) - 0.5), ylabel="test error",
                 title=f"{s.ways}-way {shots}-shot")  # fmt: skip
        axis.grid(alpha=0.3, which="both")
    axes[0][0].legend(frameon=False, fontsize=9, title="head at the test")
    figure.suptitle(name, fontsize=11)
    figure.tight_layout()
    save_figure(figure, s.out / "few_shot_heads.png")


def main(s: Settings) -> None:
    torch.set_num_threads(s.threads)
    data = load_few_shot(s.data, s.data_root)
    data.check(s.ways, max(s.shots) + s.queries)
    print(f"{data.name}: {len(data.train.images)} classes to learn from, "
          f"{len(data.test.images)} new ones for tests")  # fmt: skip
    rows = run(data, s)
    print(f"\n{s.test_tasks} test tasks; ±: 95% interval over tasks, one trained body")
    shown = [[f"{r[2]}-shot {r[0]}", r[1], r[3], f"{r[4]:.4f}", f"{r[5]:.4f}", f"{r[6]:g}",
              f"{r[7]:.0f}", r[8]] for r in sorted(rows, key=lambda r: r[2])]  # fmt: skip
    print_table(["body", "head", "seed", "accuracy", "±", "λ", "CPU s", "products"], shown)
    draw(rows, s, data.name)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
