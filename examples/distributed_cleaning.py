"""Sample weights in several processes: DistributedDataParallel, samples of its own in each.

    torchrun --nproc-per-node 2 examples/distributed_cleaning.py
    torchrun --nproc-per-node 2 examples/distributed_cleaning.py --differences

Digits, 40% of the training labels wrong. Every process holds the model and a share of the training
and validation samples; the weights σ(φ_i) of all samples are outer parameters in every process, and
stay the same bits in all of them. One process gives the same run (`python examples/...`), with all
samples. `--differences` takes products from first gradients, as models with fused attention or
torch.compile need.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from _shared.output import save_figure
from sklearn.datasets import load_digits
from torch import Tensor, nn

from hyperopt_torch import BilevelOptimizer, FiniteDifference


@dataclass
class Settings:
    """Learn which training labels to trust, in several processes."""

    differences: bool = False
    """Products by differences of gradients instead of double backward."""
    steps: int = 600
    """Inner steps, full batch."""
    every: int = 10
    """Inner steps between two outer steps."""
    seed: int = 0
    """Of the model, and of which labels are wrong."""
    out: Path = Path("results/distributed_cleaning.png")
    """Where the figure goes; the first process draws it."""


def digits(seed: int) -> tuple[Tensor, ...]:
    """x, y with wrong labels, which are wrong; validation x, y; test x, y."""
    data, g = load_digits(), torch.Generator().manual_seed(seed)
    x, y = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    order = torch.randperm(len(x), generator=g)
    x, y = x[order], y[order]
    labels, wrong = y[:800].clone(), torch.rand(800, generator=g) < 0.4
    labels[wrong] = (labels[wrong] + torch.randint(1, 10, (int(wrong.sum()),), generator=g)) % 10
    return x[:800], labels, wrong, x[800:1000], y[800:1000], x[1000:], y[1000:]


def draw(weight: Tensor, wrong: Tensor, world: int, out: Path) -> None:
    """The learned weights: the shares of all processes together, and each by itself."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    bins = [i / 20 for i in range(21)]
    kinds = {"label right": (~wrong, "C0"), "label wrong": (wrong, "C3")}
    for name, (chosen, color) in kinds.items():
        axes[0].hist(weight[chosen].tolist(), bins, alpha=0.7, label=name, color=color)
        means = [weight[r::world][chosen[r::world]].mean().item() for r in range(world)]
        axes[1].plot(range(world), means, "o", color=color, label=name)
    axes[0].set(xlabel="learned weight", ylabel="training images, all processes")
    axes[0].legend(frameon=False)
    axes[1].set(xlabel="process", ylabel="mean weight of its images", ylim=(0, 1))
    axes[1].set_xticks(range(world))
    save_figure(figure, out)


def main(settings: Settings) -> None:
    torch.set_num_threads(1)
    several = "RANK" in os.environ
    if several:
        dist.init_process_group("gloo")
    rank, world = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
    x, y, wrong, xv, yv, xs, ys = digits(settings.seed)
    mine, mine_val = torch.arange(rank, 800, world), torch.arange(rank, 200, world)

    torch.manual_seed(settings.seed)
    net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    model = nn.parallel.DistributedDataParallel(net) if several else net
    phi = nn.Parameter(torch.zeros(800))
    optimizer = BilevelOptimizer(
        torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.9, weight_decay=5e-4),
        torch.optim.Adam([phi], lr=0.1),
        curvature=FiniteDifference() if settings.differences else None,
    )

    def train_loss() -> tuple[Tensor, Tensor]:
        outputs = model(x[mine])
        losses = F.cross_entropy(outputs, y[mine], reduction="none")
        return (phi[mine].sigmoid() * losses).mean(), outputs

    start = time.perf_counter()
    for step in range(settings.steps):
        optimizer.inner_step(train_loss)
        if step % settings.every == settings.every - 1:
            optimizer.outer_step(F.cross_entropy(model(xv[mine_val]), yv[mine_val]))
    if rank == 0:
        weight = phi.detach().sigmoid()
        accuracy = (net(xs).argmax(1) == ys).float().mean()
        print(f"processes                    {world}")
        print(f"test accuracy                {accuracy:.3f}")
        print(f"weight of the wrong labels   {weight[wrong].mean():.3f}")
        print(f"weight of the right labels   {weight[~wrong].mean():.3f}")
        print(f"sum of all weights           {weight.double().sum():.6f}")
        print(f"seconds                      {time.perf_counter() - start:.1f}")
        draw(weight, wrong, world, settings.out)


if __name__ == "__main__":
    main(tyro.cli(Settings))
    # Not in main: a DDP module that outlives its group can hang while it is freed (torch 2.13).
    if dist.is_initialized():
        dist.destroy_process_group()
