"""One penalty a feature for logistic regression, with LancBiO and its rivals.

    python examples/lancbio_text.py
    python examples/lancbio_text.py --download        # 20 Newsgroups, through scikit-learn

The text task of Yang, Gao & Yuan, ICLR 2025: the inner problem is multinomial logistic regression
with ½ Σ exp(φ_j) θ_j², the outer loss that of validation texts. 20 Newsgroups has to be fetched;
the default is the breast cancer set of scikit-learn, which is no text, but has the same two levels.
The test set is looked at once, at the end of a run. The row "none" has one penalty for all
features, chosen from five by the validation loss.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import tyro
from _shared.output import save_figure
from _shared.runlog import RunLog
from _shared.single_loop import METHODS, Method, Scale, run
from torch import Tensor, nn


@dataclass(frozen=True)
class Settings:
    """One penalty a feature. A quick look: --steps 5."""

    methods: tuple[Method, ...] = METHODS
    """How the linear system is solved; "soba" is the method, "cg-warm-1" one warm CG step."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One split for each."""
    steps: int = 200
    """Outer steps; three times as many for "soba" and "ttsa", with one inner step each."""
    download: bool = False
    """Take 20 Newsgroups, and fetch it."""
    resume: bool = False
    """Go on where a stopped command was; what is in the table of --out is not done again."""
    threads: int = 1
    """CPU threads."""
    out: Path = Path("results")
    """Folder of the figure and the tables."""


class Penalties(nn.Module):
    inner_lr = 0.1
    noisy = False
    scale = Scale(
        subspace=10,
        growth=(1.3, 10),
        step=0.1,
        subbio=0.05,
        damping=0.02,
        rates={"ttsa": 10.0, "bsa": 3.0, "f2sa": 1.0},  # from 50 steps with seed 100
    )

    def __init__(self, s: Settings, seed: int) -> None:
        super().__init__()
        x, y, tested = newsgroups() if s.download else breast_cancer()
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
        # Of "breast cancer" a quarter is for tests; the Newsgroups come with a test set.
        test = order[: len(y) // 4] if tested is None else tested.nonzero()[:, 0]
        rest = order[len(y) // 4 :] if tested is None else order[~tested[order]]
        half = len(rest) // 2
        mean, std = x[rest[:half]].mean(0), x[rest[:half]].std(0).clamp(min=1e-6)
        x = x if s.download else (x - mean) / std
        parts = (rest[:half], rest[half:], test)
        self.train_set, self.val_set, self.test_set = ((x[i], y[i]) for i in parts)
        self.inner = nn.Parameter(torch.zeros(int(y.max()) + 1, x.shape[1] + 1))  # bias last
        self.outer = nn.Parameter(torch.full((x.shape[1],), -5.0))  # log of the penalties

    def draw(self) -> None:
        """There are no batches."""

    def train_loss(self) -> Tensor:
        x, y = self.train_set
        penalty = 0.5 * (self.outer.exp() * self.inner[:, :-1].square()).sum()
        # A little on the bias: without it its softmax gauge is a zero eigenvalue.
        penalty = penalty + 0.005 * self.inner[:, -1].square().sum()
        return F.cross_entropy(logits(self.inner, x), y) + penalty

    def val_loss(self) -> Tensor:
        x, y = self.val_set
        return F.cross_entropy(logits(self.inner, x), y)

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([self.outer], lr=0.05)

    def scores(self) -> dict[str, float]:
        x, y = self.test_set
        right = logits(self.inner.detach(), x).argmax(1) == y
        return measure(self) | {"accuracy": right.float().mean().item()}


def measure(problem: Penalties) -> dict[str, float]:
    return {"validation_loss": problem.val_loss().item()}


def one_penalty(s: Settings, seed: int) -> dict[str, float]:
    """No bilevel optimization: gradient descent with the best of five common penalties."""
    began, found = time.process_time(), []
    for level in (-7.0, -5.0, -3.0, -2.0, -1.0):
        problem = Penalties(s, seed)
        problem.outer.data.fill_(level)
        descent = torch.optim.SGD([problem.inner], lr=problem.inner_lr)
        for _ in range(5 * s.steps):
            descent.zero_grad()
            problem.train_loss().backward()
            descent.step()
        found.append(problem.scores())
    best = min(found, key=lambda scores: scores["validation_loss"])
    return best | {"products": 0, "cpu_s": time.process_time() - began}


def logits(theta: Tensor, x: Tensor) -> Tensor:
    return x @ theta[:, :-1].T + theta[:, -1]


def breast_cancer() -> tuple[Tensor, Tensor, None]:
    from sklearn.datasets import load_breast_cancer

    data = load_breast_cancer()
    return torch.tensor(data.data, dtype=torch.float32), torch.tensor(data.target), None


def newsgroups() -> tuple[Tensor, Tensor, Tensor]:
    """Tf-idf of the 2000 commonest words, fitted on the training part; and which are for tests."""
    from sklearn.datasets import fetch_20newsgroups
    from sklearn.feature_extraction.text import TfidfVectorizer

    kept: dict[str, Any] = {"remove": ("headers", "footers", "quotes")}
    train, test = (fetch_20newsgroups(subset=part, **kept) for part in ("train", "test"))
    words = TfidfVectorizer(max_features=2000, stop_words="english").fit(train.data)
    x, xt = (torch.tensor(words.transform(p.data).toarray()).float() for p in (train, test))
    y, yt = torch.tensor(train.target), torch.tensor(test.target)
    return torch.cat([x, xt]), torch.cat([y, yt]), torch.arange(len(y) + len(yt)) >= len(y)


def draw(s: Settings, log: RunLog) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    colours, looks = plt.get_cmap("tab20").colors, list(log.curves("cpu_s", "validation_loss"))
    for axis, y, label in zip(
        axes, ("residual", "validation_loss"), ("||Av - b||", "validation loss"), strict=True
    ):
        for method, points in log.curves("cpu_s", y).items():
            i = looks.index(method)
            style = "--" if i % 2 else "-"
            axis.plot(*zip(*points, strict=True), style, color=colours[i], label=method)
        axis.set(yscale="log", xlabel="CPU seconds", ylabel=label)
        axis.grid(alpha=0.3)
    axes[1].set_ylim(top=min(axes[1].get_ylim()[1], 1.0))  # BSA may leave it
    handles, names = axes[1].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper", frameon=False)
    save_figure(figure, s.out / "lancbio_text.png")


def main(s: Settings) -> None:
    torch.set_num_threads(s.threads)
    log = RunLog(s.out, "lancbio_text", s.resume)
    data = "newsgroups" if s.download else "breast cancer"
    for seed in s.seeds:
        none = {"method": "none", "data": data, "seed": seed}
        if not log.has(none):
            log.add(none, one_penalty(s, seed))
        for method in s.methods:
            factors = {"method": method, "data": data, "seed": seed, "steps": s.steps}
            if log.has(factors):
                continue
            torch.manual_seed(seed)  # strategies take their seed here
            problem = Penalties(s, seed)
            cost, curve = run(problem, method, s.steps, partial(measure, problem))
            log.add(factors, cost | problem.scores(), curve)
    columns = {
        "test accuracy": ("accuracy", ".4f"),
        "validation loss": ("validation_loss", ".3g"),
        "||Av - b||": ("residual", ".2g"),
        "products": ("products", ".0f"),
        "CPU s": ("cpu_s", ".1f"),
    }
    log.show(("data", "method"), columns)
    draw(s, log)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
