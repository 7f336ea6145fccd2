"""A schedule of learning rates, learned by going back through whole trainings.

    python examples/learning_rate_schedule.py
    python examples/learning_rate_schedule.py --seeds 0 1 2

SGD with momentum on digits, 100 steps. The rate at a step is exp of a line between six knots, which
are outer parameters: the closure multiplies its loss by the rate and SGD's own rate is 1, so that
the rate enters the training loss. "learned" goes back through all 100 steps of a training, moves
the knots, and trains anew. "short horizon" moves them while one network trains, by the last ten
steps alone, which sees noise fall and not what a large rate buys later. Beside them the best
constant rate and the best cosine of a grid, by the validation loss that the knots are learned from.
Whatever was found is judged by networks trained from other starting points, on other batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, log, pi
from pathlib import Path
from statistics import mean

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import tyro
from _shared.data import load_images
from _shared.output import save_figure
from _shared.runlog import RunLog
from torch import Tensor, nn
from tqdm import tqdm

from hyperopt_torch import BilevelOptimizer, Unrolled

GRID = (0.01, 0.03, 0.1, 0.3, 1.0)
KNOTS, JUDGES = 6, 3


@dataclass
class Settings:
    """Learn a schedule of learning rates."""

    seeds: tuple[int, ...] = (0,)
    """Data, and one run of each method, for each."""
    steps: int = 100
    """Of a training."""
    trainings: int = 20
    """Of "learned", each followed by an outer step."""
    start: float = 0.03
    """Rate at all knots in the beginning."""
    outer_lr: float = 0.2
    """Of Adam on the logarithms of the rates."""
    out: Path = Path("results")
    """Folder of the table and the figure."""
    resume: bool = False
    """Keep the runs that are in the table."""


class Problem:
    """The data of a seed, and the training that all methods share."""

    def __init__(self, seed: int, s: Settings, bar: tqdm[None]) -> None:
        images, g = load_images("digits"), torch.Generator().manual_seed(seed)
        order = torch.randperm(len(images.y), generator=g)
        x, y = images.x[order], images.y[order]
        self.x, self.y, self.seed, self.s, self.bar = x[:600], y[:600], seed, s, bar
        self.val, self.test = (x[600:1000], y[600:1000]), (x[1000:], y[1000:])

    def rate(self, phi: Tensor, step: int) -> Tensor:
        """exp of the line between the knots."""
        place = step / (self.s.steps - 1) * (KNOTS - 1)
        i = min(int(place), KNOTS - 2)
        return (phi[i] + (place - i) * (phi[i + 1] - phi[i])).exp()

    def train(self, phi: Tensor, draw: int, outer: torch.optim.Optimizer, window: int) -> dict:
        """A training; an outer step after each ``window`` of its steps, none if that is 0."""
        torch.manual_seed(1000 * self.seed + draw)
        net = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
        inner = torch.optim.SGD(net.parameters(), lr=1.0, momentum=0.9)
        # The bilevel lines: the rate is in the loss, and Unrolled goes back through the steps.
        optimizer = BilevelOptimizer(inner, outer, estimator=Unrolled())
        for step in range(self.s.steps):
            rows = torch.randint(len(self.x), (50,))

            def loss(step: int = step, rows: Tensor = rows) -> Tensor:
                return self.rate(phi, step) * F.cross_entropy(net(self.x[rows]), self.y[rows])

            if not window:
                inner.zero_grad()
                loss().backward()
                inner.step()
                continue
            optimizer.inner_step(loss)
            if step % window == window - 1:
                optimizer.outer_step(F.cross_entropy(net(self.val[0]), self.val[1]))
        with torch.no_grad():
            val = F.cross_entropy(net(self.val[0]), self.val[1])
            right = (net(self.test[0]).argmax(1) == self.test[1]).float().mean()
        self.bar.update()
        return {"val_loss": float(val), "test_accuracy": float(right)}

    def judge(self, knots: Tensor, first: int = 500) -> dict:
        """Means over fresh trainings."""
        phi = knots.clone().requires_grad_()
        outer = torch.optim.SGD([phi], lr=0.0)
        found = [self.train(phi, first + i, outer, 0) for i in range(JUDGES)]
        return {k: mean(f[k] for f in found) for k in found[0]}

    def learn(self, window: int) -> Tensor:
        """The knots, moved along hypergradients."""
        phi = torch.full((KNOTS,), log(self.s.start)).requires_grad_()
        outer = torch.optim.Adam([phi], lr=self.s.outer_lr)
        for draw in range(self.s.trainings):
            self.train(phi, draw, outer, window)
        return phi.detach()


def runs(problem: Problem, s: Settings) -> dict[str, tuple[Tensor, int]]:
    """method -> (knots, trainings that it took)."""
    ramp = [log((1 + cos(pi * i / (KNOTS - 1))) / 2 + 0.01) for i in range(KNOTS)]
    flat, cosine = torch.zeros(KNOTS), torch.tensor(ramp)
    found = {"start": (flat + log(s.start), 0)}
    for name, shape in (("best constant of five", flat), ("best cosine of five", cosine)):
        tried = [shape + log(rate) for rate in GRID]
        best = min(tried, key=lambda knots: problem.judge(knots, 300)["val_loss"])
        found[name] = (best, len(GRID) * JUDGES)
    found["short horizon"] = (problem.learn(window=10), s.trainings)
    found["learned"] = (problem.learn(window=s.steps), s.trainings)
    return found


def draw(log: RunLog, path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.4), layout="constrained")
    log.dots(left, "val_loss")
    left.set(xlabel="validation loss of fresh trainings")
    for color, name in enumerate(dict.fromkeys(run["method"] for run in log.runs)):
        for place, run in enumerate(log.select(method=name)):
            knots = [float(run[f"rate_{i}"]) for i in range(KNOTS)]
            right.plot(range(KNOTS), knots, f"C{color}", label="" if place else name)
    right.set(xlabel="knot", ylabel="learning rate, every seed", yscale="log")
    figure.legend(loc="outside right upper", frameon=False)
    save_figure(figure, path)


def main(s: Settings) -> None:
    torch.set_num_threads(1)
    table = RunLog(s.out, "learning_rate_schedule", s.resume)
    seeds = [seed for seed in s.seeds if not table.has({"seed": seed})]
    bar = tqdm(total=len(seeds) * (JUDGES * (2 * len(GRID) + 5) + 2 * s.trainings), unit="training")
    for seed in seeds:
        problem = Problem(seed, s, bar)
        for method, (knots, trainings) in runs(problem, s).items():
            rates = {f"rate_{i}": float(rate) for i, rate in enumerate(knots.exp())}
            results = problem.judge(knots) | {"trainings": trainings} | rates
            table.add({"method": method, "seed": seed}, results)
    bar.close()
    columns = {"val. loss": ("val_loss", ".4f"), "test accuracy": ("test_accuracy", ".3f")}
    columns |= {f"rate at knot {i}": (f"rate_{i}", ".3f") for i in range(KNOTS)}
    table.show(["method"], {**columns, "trainings": ("trainings", ".0f")})
    draw(table, s.out / "learning_rate_schedule.png")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
