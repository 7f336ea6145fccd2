"""Sample weights in a plain DistributedDataParallel loop: samples of its own in each process.

    pip install -e ".[examples]"
    torchrun --nproc-per-node 2 examples/integrations/torchrun_loop.py
    python examples/integrations/torchrun_loop.py

Without the lines marked `# bilevel`, and with those after `# plain:` in their place, it is the
plain program, whose network is the same to the bit as long as φ stays.

Every process holds all sample weights φ and takes the same outer step: that of the union of the
batches. examples/distributed_cleaning.py is a longer one, by `inner_step` and `outer_step`.
"""

from __future__ import annotations

import os

import torch.distributed as dist
import tyro
from _digits import SampleWeights, losses, mean_loss, network, noisy_digits, print_result
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam
from torch.utils.data import DataLoader, DistributedSampler
from tqdm import trange

from hyperopt_torch import BilevelOptimizer  # bilevel


def main(epochs: int = 30) -> nn.Module:
    """Train while learning which labels to trust.

    Args:
        epochs: passes over the training samples.
    """
    if "RANK" not in os.environ:  # by python, not by torchrun: one process
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
        os.environ["MASTER_PORT"] = "0"
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    digits, plain_net = noisy_digits(), network()
    net = DistributedDataParallel(plain_net)
    optimizer = SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    sampler = DistributedSampler(digits.train, seed=0)
    batches = DataLoader(digits.train, 64 // world, sampler=sampler)
    val = [t[rank::world] for t in digits.val]
    weight = SampleWeights()  # bilevel
    bilevel = BilevelOptimizer(optimizer, Adam(weight.parameters(), lr=0.1))  # bilevel
    history: list[Tensor] = []
    for epoch in trange(epochs, disable=rank > 0):
        sampler.set_epoch(epoch)
        for x, y, i in batches:
            optimizer.zero_grad()
            # plain: loss = losses(net(x), y).mean()
            loss = bilevel.record(lambda: (weight(i) * losses(z := net(x), y), z))  # bilevel
            loss.backward()
            optimizer.step()
            # plain: history.append(mean_loss(net, val).detach())
            history.append(bilevel.outer_step(mean_loss(net, val)))  # bilevel
    if rank == 0:
        print_result(plain_net, digits, history)
    return plain_net


if __name__ == "__main__":
    tyro.cli(main)
    # Not in main: a DDP module that outlives its group can hang while it is freed (torch 2.13).
    dist.destroy_process_group()
