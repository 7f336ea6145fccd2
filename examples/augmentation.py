"""How strong each augmentation should be, learned while one network trains on them.

    python examples/augmentation.py
    python examples/augmentation.py --seeds 0 1 2 3 4

Sixty training digits, in mini-batches. Each batch is turned, shifted, made noisy and its labels
smoothed, by random numbers of spread one times a strength, so that the training loss has a
derivative by the strength; which is σ(φ) times a limit, and so positive. The four φ follow the loss
on sixty more labelled images. Every choice is judged by a training from scratch; and by one on the
sixty images as well, since that costs nothing. Beside the learned strengths: none, and one part of
the limits for all, the best of four by the same validation loss.
"""

from __future__ import annotations

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

KINDS = ("turn", "shift", "noise", "smoothing")
LIMITS = torch.tensor([1.0, 2.0, 1.0, 0.5])  # radians, pixels, of the range, part of the label
GRID, START = (0.05, 0.15, 0.3, 0.5), 0.15  # parts of the limits; the learned begin at START
TRAIN, VAL, BATCH, WARM_UP = 60, 60, 30, 100


@dataclass
class Settings:
    """Learn the strengths of augmentations."""

    seeds: tuple[int, ...] = (0,)
    """Data, network and one run of each method for each."""
    steps: int = 1000
    """Inner steps."""
    every: int = 10
    """Inner steps between two outer steps."""
    outer_lr: float = 0.1
    """Of Adam on φ."""
    out: Path = Path("results")
    """Folder of the table and the figure."""
    resume: bool = False
    """Keep the runs that are in the table."""


def augmented(x: Tensor, y: Tensor, strengths: Tensor) -> tuple[Tensor, Tensor]:
    """Images (n, 64) and labels (n,), changed at random; and differentiable by the strengths."""
    turn, shift, noise, smoothing = strengths
    angle, across = turn * torch.randn(len(x)), shift * torch.randn(len(x), 2) / 4  # in half widths
    rows = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2)
    places = F.affine_grid(torch.cat([rows, across[:, :, None]], 2), [len(x), 1, 8, 8], False)
    moved = F.grid_sample(x.view(-1, 1, 8, 8), places, align_corners=False).flatten(1)
    noisy = moved + noise * torch.randn_like(moved)
    return noisy, (1 - smoothing) * F.one_hot(y, 10) + smoothing / 10


class Problem:
    """The data of a seed, and the training that all methods share."""

    def __init__(self, seed: int, s: Settings, bar: tqdm[None]) -> None:
        images, g = load_images("digits"), torch.Generator().manual_seed(seed)
        order, end = torch.randperm(len(images.y), generator=g), TRAIN + VAL
        x, y = images.x[order], images.y[order]
        self.seed, self.s, self.bar = seed, s, bar
        self.few, self.more = (x[:TRAIN], y[:TRAIN]), (x[:end], y[:end])
        self.val, self.test = (x[TRAIN:end], y[TRAIN:end]), (x[end:], y[end:])

    def train(self, phi: Tensor, learn: bool = False, with_val: bool = False) -> tuple:
        """What was measured; and the strengths at each outer step, which ``learn`` takes)."""
        torch.manual_seed(self.seed)
        s, (x, y) = self.s, self.more if with_val else self.few
        net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
        inner = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
        # The bilevel lines: the outer optimizer holds φ, which follows the loss on VAL images.
        optimizer = BilevelOptimizer(inner, torch.optim.Adam([phi], lr=s.outer_lr))
        path = []
        for step in range(1, s.steps + 1):
            batch = torch.randint(len(x), (BATCH,))

            def loss(batch: Tensor = batch) -> tuple[Tensor, Tensor]:
                changed, labels = augmented(x[batch], y[batch], LIMITS * phi.sigmoid())
                outputs = net(changed)
                return F.cross_entropy(outputs, labels), outputs

            optimizer.inner_step(loss)
            if learn and step >= WARM_UP and step % s.every == 0:
                optimizer.outer_step(F.cross_entropy(net(self.val[0]), self.val[1]))
                strengths = (LIMITS * phi.detach().sigmoid()).tolist()
                path.append({"step": step} | dict(zip(KINDS, strengths, strict=True)))
        with torch.no_grad():
            val = F.cross_entropy(net(self.val[0]), self.val[1])
            accuracy = (net(self.test[0]).argmax(1) == self.test[1]).float().mean()
        self.bar.update()
        return {"val_loss": float(val), "test_accuracy": float(accuracy)}, path


def part(value: float) -> Tensor:
    """The φ at which each strength is this part of its limit."""
    return torch.full((4,), value).logit(eps=1e-6).requires_grad_()


def main(s: Settings) -> None:
    torch.set_num_threads(1)
    log = RunLog(s.out, "augmentation", s.resume)
    seeds = [seed for seed in s.seeds if not log.has({"seed": seed})]
    with tqdm(total=len(seeds) * (len(GRID) + 7), unit="training") as bar:
        for seed in seeds:
            problem = Problem(seed, s, bar)
            best = min(GRID, key=lambda value: problem.train(part(value))[0]["val_loss"])
            chosen = {"none": part(0.0), "one part for all": part(best), "learned": part(START)}
            path = problem.train(chosen["learned"], learn=True)[1]
            for method, phi in chosen.items():
                results = problem.train(phi)[0]
                results["with_val"] = problem.train(phi, with_val=True)[0]["test_accuracy"]
                results |= dict(zip(KINDS, (LIMITS * phi.detach().sigmoid()).tolist(), strict=True))
                log.add({"method": method, "seed": seed}, results, path * (method == "learned"))
    columns = {"val. loss": ("val_loss", ".3f"), "test accuracy": ("test_accuracy", ".3f")}
    columns |= {"images added": ("with_val", ".3f")} | {kind: (kind, ".2f") for kind in KINDS}
    log.show(["method"], columns)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.4), layout="constrained")
    log.dots(left, "test_accuracy")
    left.set(xlabel="test accuracy")
    for kind in KINDS:
        right.plot(*zip(*log.curves("step", kind)["learned"], strict=True), label=kind)
    right.set(xlabel="inner step", ylabel="learned strength, mean of the seeds")
    figure.legend(*right.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    save_figure(figure, s.out / "augmentation.png")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
