"""Messages an outer step under DistributedDataParallel, two processes (gloo, CPU).

    python -m benchmarks.messages

For each strategy five outer steps of hyper-cleaning on a small tanh network: all-reduces an outer
step, its first solve and the self-check of the first step included, and the products of the last.
"""

from __future__ import annotations

import tempfile
import warnings

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import hyperopt_torch as ht

STRATEGIES = {
    "default": dict,
    "RecycledCG(10, damping=0.2)": lambda: {"ihvp": ht.RecycledCG(10, damping=0.2)},
    "Nystrom(5)": lambda: {"ihvp": ht.Nystrom(5)},
    "CG(8, damping=0.2, warm_start=True)": lambda: {"ihvp": ht.CG(8, damping=0.2, warm_start=True)},
    "LancBiO(5, damping=0.2)": lambda: {"ihvp": ht.LancBiO(5, damping=0.2)},
    "Identity()": lambda: {"ihvp": ht.Identity()},
}


def worker(rank: int, folder: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/r", rank=rank, world_size=2)
    if rank == 0:
        print(f"{'five outer steps, two processes':40} messages a step   products of the last")
    for name, settings in STRATEGIES.items():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        model = nn.parallel.DistributedDataParallel(net)
        x, xv = torch.randn(2, 16, 4, dtype=torch.float64)[:, rank::2]
        y, yv = torch.randint(3, (2, 16))[:, rank::2]
        decay = torch.full((4,), -2.0, dtype=torch.float64, requires_grad=True)
        bo = ht.BilevelOptimizer(
            torch.optim.SGD(net.parameters(), lr=0.3),
            torch.optim.SGD([decay], lr=0.5),
            **settings(),
        )

        def train_loss(
            model: nn.Module = model, net: nn.Module = net, data: tuple[Tensor, ...] = (x, y, decay)
        ) -> tuple[Tensor, Tensor]:
            x, y, decay = data
            outputs = model(x)
            squares = torch.stack([p.square().sum() for p in net.parameters()])
            return F.cross_entropy(outputs, y) + decay.exp() @ squares, outputs

        for _ in range(5):
            bo.inner_step(train_loss)
            bo.outer_step(F.cross_entropy(model(xv), yv))
        group = bo._group()
        assert group is not None
        if rank == 0:
            print(f"{name:40}{group.messages / 5:11.1f}{bo.report.matvecs:19}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(worker, (tempfile.mkdtemp(),), 2)
