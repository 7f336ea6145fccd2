"""Sample weights in a plain loop that logs to TensorBoard: whether to trust the outer steps.

    pip install -e ".[examples,integrations]"
    python examples/integrations/tensorboard_log.py
    tensorboard --logdir results/tensorboard

Without the lines marked `# bilevel` and `# log`, and with those after `# plain:` in their place, it
is the plain program, whose network is the same to the bit as long as φ stays.

`HealthLog` keeps residual, cosine, length, products and validation loss of every outer step, each
of which becomes a curve `bilevel/...`; all of them make the picture that is written at the end.
"""

from __future__ import annotations

from pathlib import Path

import tyro
from _digits import SampleWeights, losses, mean_loss, network, noisy_digits, print_result
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.utils.tensorboard import SummaryWriter
from tqdm import trange

from hyperopt_torch import BilevelOptimizer, HealthLog  # bilevel


def main(epochs: int = 30, folder: Path = Path("results/tensorboard")) -> nn.Module:
    """Train while learning which labels to trust, and log it.

    Args:
        epochs: passes over the training samples.
        folder: for the event file and the figure.
    """
    digits, net = noisy_digits(), network()
    batches = digits.batches()
    optimizer = SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    weight = SampleWeights()  # bilevel
    bilevel = BilevelOptimizer(optimizer, Adam(weight.parameters(), lr=0.1))  # bilevel
    history: list[Tensor] = []
    log = HealthLog(bilevel)  # log
    with SummaryWriter(folder) as writer:
        for _ in trange(epochs):
            for x, y, i in batches:
                optimizer.zero_grad()
                # plain: loss = losses(net(x), y).mean()
                loss = bilevel.record(lambda: (weight(i) * losses(z := net(x), y), z))  # bilevel
                loss.backward()
                optimizer.step()
                # plain: history.append(mean_loss(net, digits.val).detach())
                history.append(bilevel.outer_step(mean_loss(net, digits.val)))  # bilevel
                writer.add_scalar("loss/train", loss.detach(), len(history))
                for name, value in log.scalars().items():  # log
                    writer.add_scalar(name, value, len(history))  # log
        writer.add_figure("bilevel/health", log.plot(folder / "health.png"), len(history))  # log
    print_result(net, digits, history)
    return net


if __name__ == "__main__":
    tyro.cli(main)
