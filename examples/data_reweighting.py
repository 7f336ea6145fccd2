r"""A long-tailed training set: what a hypergradient can add to logit adjustment.

    python examples/data_reweighting.py
    python examples/data_reweighting.py --data fashion --data-root PATH --tail hard --seeds 0 1 2
    python examples/data_reweighting.py --robustness --seeds 0 1 2 3 4
    python examples/data_reweighting.py --paper --data-root PATH --download --imbalance 100

Class c keeps n_max * imbalance^(-c / 9) training samples; a few balanced images are set aside.
Plain remedies: weights 1 / n_c, and log priors added to the outputs in training (Menon et al.
2021). Learned from the loss on the balanced images, by hypergradient: an offset and a weight for
each class, starting at one of these remedies ("from priors", "from 1/n"); or a network that turns
the loss of a sample, detached, into its weight, as in Hataya & Yamada, AISTATS 2023 ("network"),
by the three methods of that paper with its ranks and dampings, beside the default and identity.
There is no direct term: nothing that is learned enters the loss on the balanced images. "+
balanced": trained on these, too, once the rest is chosen. The test set is looked at once, at the
end of a run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import torch
import torch.nn.functional as F
import tyro
from _shared.data import Images
from _shared.intervals import accuracy_figure, add_difference, save_runs, summary
from _shared.long_tail import (
    HARD_TAIL,
    STRATEGIES,
    Found,
    LongTailSource,
    Loss,
    Offsets,
    Split,
    WeightNetwork,
    halved,
    load_long_tail,
    long_tailed,
    network,
    outputs_of,
    plain_remedies,
)
from _shared.output import print_table, save_figure
from torch import nn
from tqdm import tqdm

from hyperopt_torch import BilevelOptimizer, Hessian, Nystrom


@dataclass
class Settings:
    """Long-tailed training, plain and learned."""

    data: LongTailSource = "digits"
    """Image set; "digits" needs no download."""
    data_root: Path | None = None
    """Folder of the other sets."""
    download: bool = False
    """Fetch the set if it is not in the folder."""
    imbalance: float = 200
    """Size of the largest class over that of the smallest."""
    seeds: tuple[int, ...] = (0,)
    """One whole experiment for each."""
    strategies: tuple[str, ...] = ("default", "identity", "warm-cg")
    """For the offsets: names of `STRATEGIES` in _shared/long_tail.py."""
    networks: tuple[str, ...] = ("nystrom", "cg", "neumann", "default", "identity")
    """The same, for the weight network."""
    paper: bool = False
    """The published settings, whatever else is given but the imbalance: CIFAR-10, WRN-28-10, 2% of
    the images balanced, 15000 steps. Days on a CPU; never run here."""
    robustness: bool = False
    """Table 6 of the paper instead: the weight network by Nystrom, ranks 5, 10, 20 and dampings
    .01, .1, 1."""
    n_max: int = 5000
    """Samples of the largest class, at most."""
    val_per_class: int = 50
    """Balanced images of each class."""
    steps: int = 400
    """Inner steps."""
    every: int = 10
    """Inner steps between two outer steps."""
    batch: int = 100
    """Training samples an inner step."""
    lr: float = 0.05
    """Inner learning rate, falling to 0 along a line (SGD, momentum 0.9, weight decay 5e-4)."""
    outer_lr: float = 0.05
    """Outer learning rate of offsets (Adam)."""
    network_lr: float = 1e-2
    """Outer learning rate of the weight network (Adam)."""
    threads: int = 1
    """CPU threads."""
    out: Path = Path("results")
    """Folder of the figure and the rows."""
    tail: Literal["hard", "as-it-comes"] = "as-it-comes"
    """Fashion-MNIST: the rarest classes are those that are mistaken most, or the last ones."""
    model: Literal["small", "wrn-28-10"] = "small"
    """Two convolutions on half the width, or a wide residual network on the images as they are."""


PAPER: dict[str, Any] = {
    "data": "cifar10", "model": "wrn-28-10", "n_max": 5000, "val_per_class": 100, "steps": 15_000,
    "every": 10, "lr": 0.1, "network_lr": 1e-5, "batch": 100, "tail": "as-it-comes",
}  # fmt: skip

ACCURACIES = ("test_accuracy", "rarest_accuracy")


def train(
    split: Split,
    loss: Loss,
    s: Settings,
    seed: int,
    bar: tqdm,
    strategy: dict[str, Any] | None = None,
    outer_lr: float = 0.0,
) -> tuple[nn.Module, int]:
    """The model, and the products it took. With a strategy ``loss`` is a module, and is learned."""
    torch.manual_seed(seed)
    model = network(split, s.model)
    sgd = torch.optim.SGD(model.parameters(), lr=s.lr, momentum=0.9, weight_decay=5e-4)
    line = torch.optim.lr_scheduler.LambdaLR(sgd, lambda step: 1 - step / s.steps)
    batches = torch.Generator().manual_seed(seed)
    if strategy is not None:
        # The bilevel line: wrap both optimizers, then inner_step and outer_step.
        adam = torch.optim.Adam(loss.parameters(), lr=outer_lr)  # type: ignore[attr-defined]
        optimizer = BilevelOptimizer(sgd, adam, **strategy)
    products = 0
    for step in range(1, s.steps + 1):
        chosen = torch.randint(len(split.x), (s.batch,), generator=batches)
        x, y = split.x[chosen], split.y[chosen]
        if strategy is None:
            sgd.zero_grad()
            loss(model(x), y).backward()
            sgd.step()
        else:
            optimizer.inner_step(lambda x=x, y=y: (loss(out := model(x), y), out))
            if step % s.every == 0:
                optimizer.outer_step(F.cross_entropy(model(split.val_x), split.val_y))
                products += optimizer.report.matvecs
        line.step()
        bar.update()
    return model, products


def methods(split: Split, s: Settings, fit: Callable[..., Any]) -> Iterator[Found]:
    """Every method on one long-tailed set."""
    yield from plain_remedies(split, lambda data, loss: fit(data, loss)[0])
    joined, zero = split.joined(), torch.zeros(10)
    change = joined.log_prior - split.log_prior
    starts = {"priors": (split.log_prior, zero), "1/n": (zero, -split.log_prior)}
    for start, name in (("priors", s.strategies[0]), *(("1/n", n) for n in s.strategies)):
        learned = Offsets(*starts[start])
        model, products = fit(split, learned, strategy=STRATEGIES[name](), outer_lr=s.outer_lr)
        yield f"from {start}, {name}", outputs_of(model, split.test_x), products, ""
        with torch.no_grad():  # the change of the priors goes where they went at the start
            if start == "priors":
                learned.offset += change
            else:
                learned.log_weight -= change
        again, _ = fit(joined, learned)  # with the learned offsets and weights as they are
        yield f"from {start}, {name} + balanced", outputs_of(again, split.test_x), products, ""
    for name in s.networks:
        strategy = STRATEGIES[name]()
        model, products = fit(split, WeightNetwork(), strategy=strategy, outer_lr=s.network_lr)
        yield f"network, {name}", outputs_of(model, split.test_x), products, ""


def grid(split: Split, s: Settings, fit: Callable[..., Any]) -> Iterator[Found]:
    """Table 6 of Hataya & Yamada."""
    yield "baseline", outputs_of(fit(split, F.cross_entropy)[0], split.test_x), 0, ""
    for rank in (5, 10, 20):
        for damping in (0.01, 0.1, 1.0):
            strategy = {"ihvp": Nystrom(rank, damping=damping), "curvature": Hessian()}
            model, products = fit(split, WeightNetwork(), strategy=strategy, outer_lr=s.network_lr)
            name = f"nystrom k={rank} rho={damping:g}"
            yield name, outputs_of(model, split.test_x), products, ""


def experiment(
    images: tuple[Images, Images], s: Settings, seed: int, bar: tqdm
) -> list[dict[str, Any]]:
    """A row for each method."""
    order = HARD_TAIL if s.tail == "hard" else tuple(range(10))
    split = long_tailed(
        *images, s.imbalance, seed, n_max=s.n_max, val_per_class=s.val_per_class, order=order
    )
    rows, began = [], time.process_time()
    fit = partial(train, s=s, seed=seed, bar=bar)
    for name, outputs, products, chosen in (grid if s.robustness else methods)(split, s, fit):
        right = outputs.argmax(1) == split.test_y
        tail = [right[split.test_y == c].float().mean().item() for c in (7, 8, 9)]
        now = time.process_time()
        row = {"method": name, "seed": seed, "imbalance": s.imbalance, "chosen": chosen}
        row |= {"test_accuracy": right.float().mean().item(), "rarest_accuracy": mean(tail)}
        rows.append(row | {"products": products, "cpu_s": now - began})
        began = now
    return rows


def compared(s: Settings) -> dict[str, tuple[str, int]]:
    """Columns of differences, paired by seed: with which method, and the sign."""
    if s.robustness:
        return {"gain_over_baseline": ("baseline", 1)}
    first = f"from 1/n, {s.strategies[0]}"
    return {"gain_of_learned": (first, -1), "gain_of_learned_balanced": (f"{first} + balanced", -1)}


def name_of(s: Settings) -> str:
    """Two tables, two files."""
    return "reweighting_robustness" if s.robustness else "data_reweighting"


def main(s: Settings) -> None:
    torch.set_num_threads(s.threads)
    s = replace(s, **PAPER) if s.paper else s
    images = load_long_tail(s.data, s.data_root, s.download)
    if s.model == "small" and images[0].width > 20:
        images = halved(images[0]), halved(images[1])
    print(f"{images[0].name}, imbalance {s.imbalance:g}, {s.steps} inner steps")
    runs = 10 if s.robustness else 10 + 2 * len(s.strategies) + len(s.networks)
    rows = []
    with tqdm(total=runs * len(s.seeds) * s.steps, unit="step") as bar:
        for seed in s.seeds:
            bar.set_description(f"seed {seed}")
            rows += experiment(images, s, seed, bar)
            for key, (other, sign) in compared(s).items():
                add_difference(rows, key, other, sign)
            save_runs(s.out / f"{name_of(s)}.csv", rows)  # what there is so far
    columns = [*ACCURACIES, *compared(s)]
    print_table(["", *columns, "products", "cpu_s"], summary(rows, columns))
    figure = accuracy_figure(rows, ACCURACIES, ("from", "network", "nystrom"))
    save_figure(figure, s.out / f"{name_of(s)}.png")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
