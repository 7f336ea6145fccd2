"""LancBiO and SubBiO (Yang, Gao & Yuan, ICLR 2025) beside the other strategies, on three problems.

    python examples/lancbio.py
    python examples/lancbio.py --task cleaning
    python examples/lancbio.py --task cleaning --paper --data-root PATH --steps 500
    python examples/lancbio.py --task text --download

synthetic  the paper's ill-conditioned problem, smaller: g = γ Σ sin(x + y) + log Σ exp(xy) +
           ½ yᵀ(D₃ + G)y, eigenvalues of G from 1 to 1e5; f = .1 cos(xᵀD₁y) + ½‖D₂x - y‖².
cleaning   sample weights for a linear softmax model, some training labels wrong. Training,
           validation and test images are disjoint (in the paper's code the second may hold the
           first). Baselines: all labels, the correct ones (the oracle), the validation images
           alone; and the learned weights judged alone, without a validation image.
text       one penalty a feature for logistic regression: 20 Newsgroups, which is fetched, or by
           default the breast cancer set of scikit-learn.

The test set is looked at once, at the end of a run. The paper's tables were not at hand: what is
published here is an ordering, LancBiO lowest in both residual and hypergradient norm (synthetic),
LancBiO, SubBiO and warm conjugate gradients ahead of SOBA (cleaning).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any, Literal

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import tyro
from _shared.checkpoint import Checkpoint
from _shared.data import NoisySplit, Source, load_train_test, noisy_split
from _shared.output import print_table, save_figure, save_rows
from torch import Tensor, nn
from tqdm import tqdm

from hyperopt_torch import (
    IHVP,
    BilevelOptimizer,
    ConjugateGradient,
    DenseSolve,
    LancBiO,
    Nystrom,
    NystromPCG,
    RecycledCG,
    SubBiO,
)

Task = Literal["synthetic", "cleaning", "text"]
Name = Literal["lancbio", "subbio", "soba-like", "cg", "nystrom", "nystrom-pcg", "recycled-cg"]


@dataclass
class Settings:
    """LancBiO and SubBiO beside the other strategies."""

    task: Task = "synthetic"
    """Which problem."""
    strategies: tuple[Name, ...] = (
        *("lancbio", "subbio", "soba-like", "cg", "nystrom", "nystrom-pcg", "recycled-cg"),
    )
    """Which methods; "soba-like" takes one warm step of conjugate gradients an outer step."""
    seeds: tuple[int, ...] = (0,)
    """One whole experiment for each."""
    steps: int | None = None
    """Outer steps K; None: 1000 (synthetic), 300 (cleaning), 200 (text)."""
    size: int = 500
    """Synthetic: n, the length of x and of y."""
    data: Source = "digits"
    """Cleaning: image set; "digits" needs no download."""
    data_root: Path | None = None
    """Folder of the other sets."""
    download: bool = False
    """Fetch the image set, or (text) take 20 Newsgroups and fetch it."""
    noise: tuple[float, ...] = (0.5, 0.8)
    """Cleaning: part of the training labels that is replaced by another class."""
    train: int = 700
    """Cleaning: training images."""
    clean: int = 600
    """Cleaning: validation images, a tenth of each class."""
    outer_lr: float | None = None
    """None: 1 (synthetic); a tenth of --train, so 500 at 5000 as published (cleaning); .05 (text,
    Adam)."""
    paper: bool = False
    """The published sizes and steps: synthetic n = 10^4, K = 10^4, ten seeds; cleaning MNIST with
    5000 / 5000 images, K = 3000; --steps counts if it is given. LancBiO keeps a subspace of fixed
    size, where the paper lets it grow. The synthetic one is untried: 800 MB for G, and n products
    a point to judge."""
    resume: bool = False
    """Go on where an interrupted run with the same options and --out stopped."""
    save_every: int = 100
    """Outer steps between two checkpoints."""
    threads: int = 1
    """CPU threads."""
    out: Path = Path("results")
    """Folder of the figure, the tables and the checkpoint."""

    @property
    def outer_steps(self) -> int:
        return self.steps or {"synthetic": 1000, "cleaning": 300, "text": 200}[self.task]


# Smallest eigenvalue at least .5 (synthetic), .02 (cleaning): Nystrom alone is damped, by as much.
STRATEGIES: dict[str, Callable[[Task], IHVP]] = {
    "lancbio": lambda task: LancBiO(80 if task == "synthetic" else 10),
    "subbio": lambda task: SubBiO(
        1e-5 if task == "synthetic" else 0.05
    ),  # 1 / λ_max; the published one
    "soba-like": lambda task: ConjugateGradient(1, warm_start=True),
    "cg": lambda task: ConjugateGradient(10),
    "nystrom": lambda task: Nystrom(10, damping=1.0 if task == "synthetic" else 0.02),
    "nystrom-pcg": lambda task: NystromPCG(damping=0.0),
    "recycled-cg": lambda task: RecycledCG(damping=0.0),
}


class Problem(nn.Module):
    """Two levels: ``train_loss`` of ``inner`` and ``outer``, ``val_loss``; and what to report."""

    inner_lr: float
    inner: nn.Parameter
    outer: nn.Parameter
    columns: tuple[str, ...] = ()

    def train_loss(self) -> Tensor:
        raise NotImplementedError

    def val_loss(self) -> Tensor:
        raise NotImplementedError

    def optimizer(self, s: Settings) -> torch.optim.Optimizer:
        raise NotImplementedError

    def scores(self) -> list[float]:
        """The numbers of ``columns``, at the end of a run."""
        return []


class Synthetic(Problem):
    inner_lr = 1e-5  # theta_y

    def __init__(self, s: Settings, seed: int, _noise: float) -> None:
        super().__init__()
        g, n = torch.Generator().manual_seed(seed), s.size
        wide: dict[str, Any] = {"dtype": torch.float64, "generator": g}
        self.D1 = 10 * (torch.rand(n, **wide) - 0.5)
        self.D2 = torch.rand(n, **wide) + 0.1
        Q = torch.linalg.qr(torch.randn(n, n, **wide))[0]
        self.G = (Q * torch.linspace(1, 1e5, n, dtype=torch.float64)) @ Q.T
        self.G += (0.5 * torch.rand(n, **wide)).diag()  # D3
        self.inner = nn.Parameter(torch.randn(n, **wide))
        self.outer = nn.Parameter(torch.randn(n, **wide))

    def train_loss(self) -> Tensor:
        x, y = self.outer, self.inner
        return 0.5 * (x + y).sin().sum() + (x * y).logsumexp(0) + 0.5 * y @ (self.G @ y)

    def val_loss(self) -> Tensor:
        x, y = self.outer, self.inner
        return 0.1 * (x @ (self.D1 * y)).cos() + 0.5 * (self.D2 * x - y).square().sum()

    def optimizer(self, s: Settings) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.outer], lr=s.outer_lr or 1.0)


class Cleaning(Problem):
    inner_lr, penalty = 0.1, 0.01
    columns = ("test accuracy", "weights alone")

    def __init__(self, s: Settings, seed: int, noise: float) -> None:
        super().__init__()
        images, test = load_train_test(s.data, s.data_root, s.download)
        self.split: NoisySplit = dataclasses.replace(
            noisy_split(
                images, seed, train=s.train, clean_per_class=s.clean // 10, test=0, noise=noise
            ),
            test_x=test.x,
            test_y=test.y,
        )
        self.inner = nn.Parameter(torch.zeros(10, images.x.shape[1] + 1))  # bias last
        self.outer = nn.Parameter(torch.zeros(len(self.split.x)))

    def train_loss(self) -> Tensor:
        return self.objective(self.inner, self.split.x, self.split.labels, self.outer.sigmoid())

    def val_loss(self) -> Tensor:
        return F.cross_entropy(logits(self.inner, self.split.clean_x), self.split.clean_y)

    def objective(self, theta: Tensor, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        losses = F.cross_entropy(logits(theta, x), y, reduction="none")
        return (weights * losses).mean() + self.penalty * theta.square().sum()

    def optimizer(self, s: Settings) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.outer], lr=s.outer_lr or 0.1 * len(self.split.x))

    def scores(self) -> list[float]:
        alone = self.solved(self.split.x, self.split.labels, self.outer.detach().sigmoid())
        return [self.accuracy(self.inner), self.accuracy(alone)]

    def solved(self, x: Tensor, y: Tensor, weights: Tensor | None = None) -> Tensor:
        """The inner problem from scratch, to its optimum; weights 1 by default."""
        theta = torch.zeros_like(self.inner, requires_grad=True)
        weights = torch.ones(len(y)) if weights is None else weights
        lbfgs = torch.optim.LBFGS(
            [theta], max_iter=500, tolerance_change=1e-10, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            lbfgs.zero_grad()
            loss = self.objective(theta, x, y, weights)
            loss.backward()
            return loss

        lbfgs.step(closure)
        return theta.detach()

    def accuracy(self, theta: Tensor) -> float:
        guess = logits(theta.detach(), self.split.test_x).argmax(1)
        return (guess == self.split.test_y).float().mean().item()

    def baselines(self) -> dict[str, tuple[float, float]]:
        """(validation loss, test accuracy) of models without learned weights.

        The oracle is trained on the correctly labelled images alone. Their mean loss has twice the
        weight against the penalty (at 50% noise) that any weights in (0, 1) can give it; so
        "oracle weights", 1 and 0 in the very objective, is what learned weights can be held to.
        """
        split, right = self.split, ~self.split.wrong
        arms = {
            "no cleaning": (split.x, split.labels),
            "clean split alone": (split.clean_x, split.clean_y),
            "oracle": (split.x[right], split.labels[right]),
            "oracle weights": (split.x, split.labels, right.float()),
        }
        solutions = {name: self.solved(*arm) for name, arm in arms.items()}
        return {
            name: (
                F.cross_entropy(logits(theta, split.clean_x), split.clean_y).item(),
                self.accuracy(theta),
            )
            for name, theta in solutions.items()
        }


class Text(Problem):
    inner_lr = 0.1
    columns = ("test accuracy",)

    def __init__(self, s: Settings, seed: int, _noise: float) -> None:
        super().__init__()
        x, y, tested = newsgroups() if s.download else breast_cancer()
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
        # Of "breast cancer" a quarter is for tests; the Newsgroups come with a test set.
        test = order[: len(y) // 4] if tested is None else tested.nonzero()[:, 0]
        rest = order[len(y) // 4 :] if tested is None else order[~tested[order]]
        half = len(rest) // 2
        mean_, std = x[rest[:half]].mean(0), x[rest[:half]].std(0).clamp(min=1e-6)
        x = x if s.download else (x - mean_) / std
        parts = (rest[:half], rest[half:], test)
        self.train_set, self.val_set, self.test_set = ((x[i], y[i]) for i in parts)
        self.inner = nn.Parameter(torch.zeros(int(y.max()) + 1, x.shape[1] + 1))
        self.outer = nn.Parameter(torch.full((x.shape[1],), -5.0))  # log of the penalties

    def train_loss(self) -> Tensor:
        x, y = self.train_set
        penalty = 0.5 * (self.outer.exp() * self.inner[:, :-1].square()).sum()
        # A little on the bias: without it its softmax gauge is a zero eigenvalue.
        penalty = penalty + 0.005 * self.inner[:, -1].square().sum()
        return F.cross_entropy(logits(self.inner, x), y) + penalty

    def val_loss(self) -> Tensor:
        x, y = self.val_set
        return F.cross_entropy(logits(self.inner, x), y)

    def optimizer(self, s: Settings) -> torch.optim.Optimizer:
        return torch.optim.Adam([self.outer], lr=s.outer_lr or 0.05)

    def scores(self) -> list[float]:
        x, y = self.test_set
        return [(logits(self.inner.detach(), x).argmax(1) == y).float().mean().item()]


PROBLEMS = {"synthetic": Synthetic, "cleaning": Cleaning, "text": Text}


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


def run(
    problem: Problem, strategy: Name, s: Settings, resume: bool, log: dict[str, Any], bar: tqdm
) -> dict[str, Any]:
    """One method on one problem: points of its curve, and its scores at the end."""
    # The bilevel lines: wrap both optimizers, then inner_step and outer_step.
    optimizer = BilevelOptimizer(
        torch.optim.SGD([problem.inner], lr=problem.inner_lr),
        problem.optimizer(s),
        ihvp=STRATEGIES[strategy](s.task),
    )
    judge = BilevelOptimizer(optimizer.inner, optimizer.outer, ihvp=DenseSolve())
    checkpoint = Checkpoint(checkpoint_path(s), problem=problem, optimizer=optimizer)
    start, products, seconds, curve = 0, 0, 0.0, []
    if resume:
        start, saved = checkpoint.load()
        products, seconds, curve = (saved[name] for name in ("products", "seconds", "curve"))
        bar.update(start)
    for step in range(start + 1, s.outer_steps + 1):
        began = time.process_time()
        for _ in range(5):  # T_in, as published
            optimizer.inner_step(problem.train_loss)
        optimizer.outer_step(problem.val_loss())
        seconds += time.process_time() - began
        report = optimizer.report
        products += report.matvecs
        if step % max(1, s.outer_steps // 40) == 0 or step == s.outer_steps:
            residual = float(report.residual) * float(report.rhs_norm)
            target = None
            if s.task != "synthetic":
                target = problem.val_loss().item()
            elif step % max(1, s.outer_steps // 10) == 0 or step == s.outer_steps:
                # The true one, which costs n products: a wrong one may be small by mistake.
                (true,) = judge.hypergradient(problem.val_loss(), problem.train_loss)
                target = true.norm().item()
            curve.append([step, products, seconds, residual, target])
        if step % s.save_every == 0:
            state = {"products": products, "seconds": seconds, "curve": curve}
            checkpoint.save(step, **log, **state)
        bar.update()
    return {"curve": curve, "scores": [problem.val_loss().item(), *problem.scores()]}


def checkpoint_path(s: Settings) -> Path:
    return s.out / f"lancbio_{s.task}.checkpoint"


def experiments(s: Settings) -> dict[str, dict[str, Any]]:
    """Every method, noise and seed; what is finished goes into the checkpoint as a whole."""
    free = ("resume", "save_every", "threads", "out", "data_root", "download")
    options = {k: str(v) for k, v in dataclasses.asdict(s).items() if k not in free}
    log: dict[str, Any] = Checkpoint(checkpoint_path(s)).load()[1] if s.resume else {}
    if log and log["options"] != options:
        raise SystemExit(f"{checkpoint_path(s)} belongs to other options; leave out --resume.")
    done: dict[str, dict[str, Any]] = log.get("done", {})
    levels = s.noise if s.task == "cleaning" else (0.0,)
    names = ("baselines", *s.strategies) if s.task == "cleaning" else s.strategies
    total = len(s.strategies) * len(levels) * len(s.seeds) * s.outer_steps
    with tqdm(total=total, unit="step") as bar:
        for noise, seed in ((noise, seed) for noise in levels for seed in s.seeds):
            for name in names:
                key = f"{noise} {name} {seed}"
                if key in done:
                    bar.update(s.outer_steps * (name != "baselines"))
                    continue
                torch.manual_seed(seed)  # strategies take their seed here
                bar.set_description(f"{name}, seed {seed}")
                problem = PROBLEMS[s.task](s, seed, noise)
                if name == "baselines":
                    done[key] = problem.baselines()
                else:
                    going = {"options": options, "done": done, "current": key}
                    interrupted = log.get("current") == key
                    done[key] = run(problem, name, s, interrupted, going, bar)
                Checkpoint(checkpoint_path(s)).save(0, options=options, done=done, current="")
    return done


def table(s: Settings, done: dict[str, dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Means over seeds; spread where there are several."""

    def cell(values: list[float], digits: str) -> str:
        spread = f" ± {stdev(values):{digits}}" if len(values) > 1 else ""
        return f"{mean(values):{digits}}{spread}"

    shown = {
        "synthetic": ["hypergradient norm", "||Av - b||", "median ||Av - b||"],
        "cleaning": ["||Av - b||", "validation loss", "test accuracy", "weights alone"],
        "text": ["||Av - b||", "validation loss", "test accuracy"],
    }[s.task]
    header = ["noise, method" if s.task == "cleaning" else "method", *shown, "products", "CPU s"]
    rows = []
    for noise in s.noise if s.task == "cleaning" else (0.0,):
        label = f"{noise:.0%} " if s.task == "cleaning" else ""
        if s.task == "cleaning":
            for name in ("no cleaning", "clean split alone", "oracle", "oracle weights"):
                pairs = [done[f"{noise} baselines {seed}"][name] for seed in s.seeds]
                loss, score = ([p[i] for p in pairs] for i in (0, 1))
                rows.append([label + name, "", cell(loss, ".4f"), cell(score, ".4f"), *3 * [""]])
        for strategy in s.strategies:
            runs = [done[f"{noise} {strategy} {seed}"] for seed in s.seeds]
            ends = [r["curve"][-1] for r in runs]
            scores = [r["scores"] for r in runs]
            residuals = [[e[3] for e in r["curve"]] for r in runs]
            cells = [cell([e[3] for e in ends], ".3g")]
            if s.task == "synthetic":
                cells = [cell([e[4] for e in ends], ".3g"), *cells]
                cells += [cell([median(r) for r in residuals], ".3g")]
            else:
                cells += [cell(list(c), ".4f") for c in zip(*scores, strict=True)]
            cells += [cell([e[i] for e in ends], ".0f" if i == 1 else ".1f") for i in (1, 2)]
            rows.append([label + strategy, *cells])
    return header, rows


def draw(s: Settings, done: dict[str, dict[str, Any]]) -> None:
    """The first seed, at the first noise."""
    noise = s.noise[0] if s.task == "cleaning" else 0.0
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), sharey="row", layout="constrained")
    lower = "true hypergradient norm" if s.task == "synthetic" else "validation loss"
    for strategy in s.strategies:
        curve = done[f"{noise} {strategy} {s.seeds[0]}"]["curve"]
        for row, y in enumerate((3, 4)):
            for column, x in enumerate((1, 2)):
                points = [(point[x], point[y]) for point in curve if point[y] is not None]
                axes[row, column].plot(*zip(*points, strict=True), label=strategy)
    for axis in axes.flat:
        axis.set_yscale("log")
    axes[0, 0].set_ylabel("||Av - b||")
    axes[1, 0].set(ylabel=lower, xlabel="products")
    axes[1, 1].set(xlabel="CPU seconds")
    axes[0, 1].legend(frameon=False, fontsize=8)
    figure.suptitle(f"{s.task}, {noise:.0%} noise" if s.task == "cleaning" else s.task)
    save_figure(figure, s.out / f"lancbio_{s.task}.png")


def main(s: Settings) -> None:
    torch.set_num_threads(s.threads)
    if s.paper and s.task == "synthetic":
        s = dataclasses.replace(s, size=10_000, steps=s.steps or 10_000)
        s = dataclasses.replace(s, seeds=tuple(range(10)))
    elif s.paper and s.task == "cleaning":
        s = dataclasses.replace(s, data="mnist", train=5000, clean=5000, steps=s.steps or 3000)
    done = experiments(s)
    header, rows = table(s, done)
    name = {
        "synthetic": f"synthetic, n = {s.size}, float64",
        "cleaning": f"{s.data}, {s.train} training and {s.clean} validation images",
        "text": "20 Newsgroups" if s.download else "scikit-learn breast cancer",
    }[s.task]
    print(f"{name}; {s.outer_steps} outer steps of 5 inner ones; residual of the damped system")
    print_table(header, rows)
    save_rows(s.out / f"lancbio_{s.task}.csv", header, rows)
    draw(s, done)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
