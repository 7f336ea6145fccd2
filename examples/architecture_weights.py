"""Which operation goes into which layer: a mixture of four, its weights learned, as in DARTS.

    python examples/architecture_weights.py
    python examples/architecture_weights.py --seeds 0 1 2

In each of two layers stand four operations, their sum weighted by softmax(α). α follows the loss on
validation images, by the hypergradient, or by its direct term alone (DARTS of first order). The
largest is kept and trained from scratch; and so are all sixteen such networks, to see where it
stands, and equal weights; once on the validation images as well, since that costs nothing.
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

KINDS = ("nothing", "linear", "convolution", "wide")
NAMES = [f"{kind} {layer}" for layer in (1, 2) for kind in KINDS]
TRAIN, VALIDATION, TEST, WARM_UP = 300, slice(300, 600), slice(600, None), 50


@dataclass
class Settings:
    """Learn the weights of operations."""

    seeds: tuple[int, ...] = (0,)
    """Data, network and one run of each method for each."""
    steps: int = 300
    """Inner steps."""
    out: Path = Path("results")
    """Folder of the table and the figure."""
    resume: bool = False
    """Keep the runs that are in the table."""


def operations() -> nn.ModuleList:  # each from 64 pixels to 64
    filters = (nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 1), nn.Flatten())
    wide = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
    convolution = nn.Sequential(nn.Unflatten(1, (1, 8, 8)), *filters)
    return nn.ModuleList([nn.Identity(), nn.Linear(64, 64), convolution, wide])


class Problem:
    """The data of a seed, and the training that all methods share."""

    def __init__(self, seed: int, s: Settings, bar: tqdm[None]) -> None:
        images, g = load_images("digits"), torch.Generator().manual_seed(seed)
        order = torch.randperm(len(images.y), generator=g)
        self.x, self.y, self.seed, self.s, self.bar = images.x[order], images.y[order], seed, s, bar

    def train(self, alpha: Tensor, rule: str = "", with_val: bool = False) -> tuple:
        """What was measured; and the weights at each outer step, which ``rule`` takes."""
        torch.manual_seed(self.seed)
        net, path = nn.ModuleList([operations(), operations(), nn.Linear(64, 10)]), []

        def losses(rows: slice | Tensor) -> tuple[Tensor, Tensor]:
            x = self.x[rows]
            for layer, weights in zip(net, alpha.softmax(1), strict=False):
                x = sum(w * f(x) for w, f in zip(weights, layer, strict=True) if w != 0)
            outputs = net[2](x)
            return F.cross_entropy(outputs, self.y[rows]), outputs

        inner = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
        # The bilevel lines: the outer optimizer holds α, which follows the loss on VALIDATION.
        optimizer = BilevelOptimizer(inner, torch.optim.Adam([alpha], lr=0.1))
        for step in range(1, self.s.steps + 1):
            batch = torch.randint(2 * TRAIN if with_val else TRAIN, (50,))
            optimizer.inner_step(lambda batch=batch: losses(batch))
            if rule and step >= WARM_UP and step % 10 == 0:
                if rule == "hypergradient":
                    optimizer.outer_step(losses(VALIDATION)[0])
                else:
                    (alpha.grad,) = torch.autograd.grad(losses(VALIDATION)[0], [alpha])
                    optimizer.outer.step()
                path.append({"step": step} | named(alpha))
        with torch.no_grad():
            val, (_, outputs) = losses(VALIDATION)[0], losses(TEST)
            accuracy = (outputs.argmax(1) == self.y[TEST]).float().mean()
        self.bar.update()
        return {"val_loss": float(val), "test_accuracy": float(accuracy)}, path


def named(alpha: Tensor) -> dict[str, float]:
    return dict(zip(NAMES, alpha.detach().softmax(1).flatten().tolist(), strict=True))


def kept(*numbers: int) -> Tensor:
    return F.one_hot(torch.tensor(numbers), 4).log().requires_grad_()  # of 0 and -∞


def main(s: Settings) -> None:
    torch.set_num_threads(1)
    log = RunLog(s.out, "architecture_weights", s.resume)
    seeds = [seed for seed in s.seeds if not log.has({"seed": seed})]
    with tqdm(total=len(seeds) * 38, unit="training") as bar:
        for seed in seeds:
            problem, pairs = Problem(seed, s, bar), [(i, j) for i in range(4) for j in range(4)]
            found = {pair: problem.train(kept(*pair))[0] for pair in pairs}
            rows = {f"{kind} twice": (kept(i, i), []) for i, kind in enumerate(KINDS)}
            rows |= {"equal weights": (torch.zeros(2, 4, requires_grad=True), [])}
            for rule in ("direct term", "hypergradient"):
                alpha = torch.zeros(2, 4, requires_grad=True)
                rows[f"{rule}, mixture"] = alpha, problem.train(alpha, rule)[1]
                rows[f"{rule}, largest kept"] = kept(*alpha.argmax(1).tolist()), []
            best = min(found, key=lambda pair: found[pair]["val_loss"])
            rows["best of sixteen"] = kept(*best), []
            for method, (alpha, path) in rows.items():
                results = problem.train(alpha)[0] | named(alpha)
                better = [f["test_accuracy"] > results["test_accuracy"] for f in found.values()]
                results["place"] = 1 + sum(better)
                results["with_val"] = problem.train(alpha, with_val=True)[0]["test_accuracy"]
                log.add({"method": method, "seed": seed}, results, path)
    columns = {"val. loss": ("val_loss", ".3f"), "test accuracy": ("test_accuracy", ".3f")}
    columns |= {"place": ("place", ".1f"), "images added": ("with_val", ".3f")}
    log.show(["method"], columns | {name: (name, ".2f") for name in NAMES})
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.4), layout="constrained")
    log.dots(left, "test_accuracy", "hypergradient")
    left.set(xlabel="test accuracy")
    for i, name in enumerate(NAMES):
        points = log.curves("step", name)["hypergradient, mixture"]
        right.plot(*zip(*points, strict=True), f"C{i % 4}{'-' if i < 4 else '--'}", label=name)
    right.set(xlabel="inner step", ylabel="weight by the hypergradient, mean")
    figure.legend(*right.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    save_figure(figure, s.out / "architecture_weights.png")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
