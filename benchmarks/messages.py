"""Messages an outer step over two processes (gloo, CPU): parameters whole in each, or in parts.

    python -m benchmarks.messages > docs/results/messages.txt

For each strategy five outer steps on a small tanh network: all-reduces of the library an outer
step, its first solve and the self-check of the first step included, and the products of the last.
What DistributedDataParallel and FSDP send themselves is not counted.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import hyperopt_torch as ht

WHOLE: dict[str, Callable[[], dict[str, Any]]] = {
    "default": dict,
    "RecycledCG(10, damping=0.2)": lambda: {"ihvp": ht.RecycledCG(10, damping=0.2)},
    "Nystrom(5)": lambda: {"ihvp": ht.Nystrom(5)},
    "CG(8, damping=0.2, warm_start=True)": lambda: {"ihvp": ht.CG(8, damping=0.2, warm_start=True)},
    "LancBiO(5, damping=0.2)": lambda: {"ihvp": ht.LancBiO(5, damping=0.2)},
    "Identity()": lambda: {"ihvp": ht.Identity()},
}
PARTS = {name: make for name, make in WHOLE.items() if not name.startswith("RecycledCG")}


def measured(settings: dict[str, Any], rank: int, parts: bool) -> tuple[float, int]:
    """(messages an outer step, products of the last)."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, xv = torch.randn(2, 16, 4, dtype=torch.float64)[:, rank::2]
    y, yv = torch.randint(3, (2, 16))[:, rank::2]
    weights = torch.full((2,), -2.0, dtype=torch.float64, requires_grad=True)
    model: nn.Module = net
    if parts:
        mesh = init_device_mesh("cpu", (2,))
        fully_shard(net, mesh=mesh)
        settings = {"curvature": ht.FiniteDifference(), **settings}
    else:
        model = nn.parallel.DistributedDataParallel(net)
    bo = ht.BilevelOptimizer(
        torch.optim.SGD(net.parameters(), lr=0.3), torch.optim.SGD([weights], lr=0.5), **settings
    )

    def train_loss() -> tuple[Tensor, Tensor]:
        outputs = model(x)
        penalties = torch.stack([outputs.square().mean(), outputs.pow(4).mean()])
        return F.cross_entropy(outputs, y) + weights.exp() @ penalties, outputs

    for _ in range(5):
        bo.inner_step(train_loss)
        bo.outer_step(F.cross_entropy(model(xv), yv))
    group = bo._processes.group
    assert group is not None
    return group.messages / 5, bo.report.matvecs


def worker(rank: int, folder: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/r", rank=rank, world_size=2)
    for parts, strategies in ((False, WHOLE), (True, PARTS)):
        title = "in parts (FSDP2), FiniteDifference" if parts else "whole (DDP)"
        if rank == 0:
            print(f"{title:40} messages a step   products of the last")
        for name, make in strategies.items():
            messages, products = measured(make(), rank, parts)
            if rank == 0:
                print(f"{name:40}{messages:11.1f}{products:19}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(worker, (tempfile.mkdtemp(),), 2)
