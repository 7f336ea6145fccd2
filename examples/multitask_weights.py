"""Which auxiliary losses help: a weight for each, learned while one network trains on all of them.

    python examples/multitask_weights.py
    python examples/multitask_weights.py --seeds 0 1 2 3 4

Thirty labelled digits are few. Four hundred more images have no label, but each gives four other
tasks for the same body: is it even, is it above four, reconstruct the image, and guess labels that
are random, which cannot help. The weights 2σ(φ_k) of these losses follow the loss on sixty more
labelled images. Every set of weights is judged by a training from scratch; and by one that has the
sixty images as well, since that costs nothing. Beside the learned weights: none, all 1, the best of
one weight for all, and what one would choose who knew: 1 for the two questions, 0 for the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import tyro
from _shared.data import load_images
from _shared.output import save_figure
from _shared.runlog import RunLog
from torch import Tensor, nn
from tqdm import tqdm

from hyperopt_torch import BilevelOptimizer

TASKS = ("even", "above four", "image", "random labels")
SIZES = (10, 2, 2, 64, 10)  # outputs of the main task and of each auxiliary one
LABELLED, EXTRA, VAL, HIDDEN = 30, 400, 60, 32
GRID = (0.03, 0.1, 0.3, 1.0)


@dataclass
class Settings:
    """Learn the weights of auxiliary losses."""

    seeds: tuple[int, ...] = (0,)
    """Data, network and one run of each method for each."""
    steps: int = 500
    """Inner steps, full batch."""
    warm_up: int = 100
    """Inner steps before the first outer one."""
    every: int = 5
    """Inner steps between two outer steps."""
    outer_lr: float = 0.1
    """Of Adam on φ."""
    out: Path = Path("results")
    """Folder of the table and the figure."""
    resume: bool = False
    """Keep the runs that are in the table."""


class Problem:
    """The data of a seed. A network's outputs are those of all tasks, side by side."""

    def __init__(self, seed: int, bar: tqdm[None]) -> None:
        images, g = load_images("digits"), torch.Generator().manual_seed(seed)
        order, n, end = torch.randperm(len(images.y), generator=g), LABELLED, LABELLED + EXTRA
        x, y = images.x[order], images.y[order]
        self.seed, self.x, self.bar = seed, x[:end], bar
        random = torch.randint(0, 10, (end,), generator=g)
        self.targets = (y[:end] % 2, (y[:end] > 4).long(), x[:end], random)
        self.val = x[end : end + VAL], y[end : end + VAL]
        self.test = x[end + VAL :], y[end + VAL :]
        self.few = x[:n], y[:n]
        self.more = torch.cat([x[:n], self.val[0]]), torch.cat([y[:n], self.val[1]])

    def train_loss(self, net: nn.Module, weights: Tensor, with_val: bool = False) -> tuple:
        """The main loss and the weighted auxiliary ones; and the outputs they were made from."""
        x, y = self.more if with_val else self.few
        main, outputs = net(x)[:, :10], net(self.x)
        parts = outputs[:, 10:].split(SIZES[1:], 1)
        losses = [
            10 * F.mse_loss(o, t) if t.is_floating_point() else F.cross_entropy(o, t)
            for o, t in zip(parts, self.targets, strict=True)
        ]
        return F.cross_entropy(main, y) + weights @ torch.stack(losses), (main, outputs)

    def train(self, s: Settings, phi: Tensor, learn: bool = False, with_val: bool = False) -> tuple:
        """(validation loss, test accuracy, weights at each outer step, which ``learn`` takes)."""
        torch.manual_seed(self.seed)
        net = nn.Sequential(nn.Linear(64, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, sum(SIZES)))
        inner = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
        # The bilevel lines: the outer optimizer holds φ, which follows the loss on VAL images.
        optimizer = BilevelOptimizer(inner, torch.optim.Adam([phi], lr=s.outer_lr))
        path = []
        for step in range(1, s.steps + 1):
            if learn:
                optimizer.inner_step(lambda: self.train_loss(net, 2 * phi.sigmoid()))
                if step >= s.warm_up and step % s.every == 0:
                    optimizer.outer_step(F.cross_entropy(net(self.val[0])[:, :10], self.val[1]))
                    path.append((step, *(2 * phi.detach().sigmoid()).tolist()))
            else:
                inner.zero_grad()
                self.train_loss(net, 2 * phi.detach().sigmoid(), with_val)[0].backward()
                inner.step()
        with torch.no_grad():
            val = F.cross_entropy(net(self.val[0])[:, :10], self.val[1])
            accuracy = (net(self.test[0])[:, :10].argmax(1) == self.test[1]).float().mean()
        self.bar.update()
        return float(val), float(accuracy), path


def constant(weights: Sequence[float]) -> Tensor:
    """The φ that gives these weights."""
    return (torch.tensor(weights) / 2).logit(eps=1e-6).requires_grad_()


def draw(log: RunLog, path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.4), layout="constrained")
    log.dots(left, "with_val")
    left.set(xlabel="test accuracy, trained on the validation images as well")
    for color, task in enumerate(TASKS):
        points = log.curves("step", task, method="learned")["learned"]
        right.plot(*zip(*points, strict=True), color=f"C{color}", label=task)
    right.set(xlabel="inner step", ylabel="learned weight, mean of the seeds")
    figure.legend(*right.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    save_figure(figure, path)


def main(s: Settings) -> None:
    torch.set_num_threads(1)
    log = RunLog(s.out, "multitask_weights", s.resume)
    seeds = [seed for seed in s.seeds if not log.has({"seed": seed})]
    bar = tqdm(total=len(seeds) * (len(GRID) + 11), unit="training")
    for seed in seeds:
        problem = Problem(seed, bar)
        grid = {value: problem.train(s, constant([value] * 4))[0] for value in GRID}
        chosen = {
            "no auxiliary task": constant([0.0] * 4),
            "all weights 1": constant([1.0] * 4),
            "one weight for all, best of four": constant([min(grid, key=grid.__getitem__)] * 4),
            "learned": constant([1.0] * 4),
            "1 for the two questions": constant([1.0, 1.0, 0.0, 0.0]),
        }
        path = problem.train(s, chosen["learned"], learn=True)[2]
        for method, phi in chosen.items():
            val, accuracy, _ = problem.train(s, phi)
            results = {"val_loss": val, "test_accuracy": accuracy}
            results["with_val"] = problem.train(s, phi, with_val=True)[1]
            results |= dict(zip(TASKS, (2 * phi.detach().sigmoid()).tolist(), strict=True))
            points = path if method == "learned" else []
            curve = [dict(zip(("step", *TASKS), point, strict=True)) for point in points]
            log.add({"method": method, "seed": seed}, results, curve)
    bar.close()
    columns = {"test accuracy": ("test_accuracy", ".3f"), "images added": ("with_val", ".3f")}
    log.show(["method"], columns | {f"weight, {task}": (task, ".2f") for task in TASKS})
    draw(log, s.out / "multitask_weights.png")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
