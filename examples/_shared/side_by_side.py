"""A prior, and networks of the same form that are fitted from it, of many tasks at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from .fewshot import ClassPool, Task
from .heads import prototype_logits


class SideBySide:
    """Networks of one form, whose parameters (tasks, ...) lie beside each other.

    Args:
        net: convolutions and, at its end, a linear head.
        tasks: how many.

    Attributes:
        prior: the parameters of ``net``.
    """

    def __init__(self, net: nn.Sequential, tasks: int) -> None:
        self.net, self.tasks = net, tasks
        self.names, self.prior = map(list, zip(*net.named_parameters(), strict=True))

    def copies(self) -> list[Tensor]:
        """The prior, once for each task: leaves of their own."""
        return [p.detach().expand(self.tasks, *p.shape).clone().requires_grad_()
                for p in self.prior]  # fmt: skip

    def outputs(self, theta: Sequence[Tensor], x: Tensor) -> Tensor:
        """(images, ways) of one network."""
        return functional_call(self.net, dict(zip(self.names, theta, strict=True)), (x,))

    def losses(self, theta: Sequence[Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The sum over tasks of their cross-entropies, and the outputs (tasks, images, ways)."""
        outputs = vmap(self.outputs)(theta, x)
        return F.cross_entropy(outputs.flatten(0, 1), y.flatten()) * len(x), outputs

    def class_means(self, task: Task) -> Tensor:
        """Outputs for the queries, from the features of the prior itself: nothing is fitted."""
        shown, asked = (self.net[:-1](x.flatten(0, 1)).unflatten(0, x.shape[:2])
                        for x in (task.support_x, task.query_x))  # fmt: skip
        ways = int(task.support_y.max()) + 1
        return vmap(lambda a, b: prototype_logits(a, b, ways))(shown, asked)


def accuracies(
    pool: ClassPool, predict: Callable[[Task], Tensor], number: int, batch: int,
    ways: int, shots: int, queries: int,
) -> list[float]:  # fmt: skip
    """Of each of at least so many tasks, in whole batches; always the same tasks."""
    draws = torch.Generator().manual_seed(1_000_003)
    right: list[float] = []
    while len(right) < number:
        task = pool.tasks(batch, ways, shots, queries, draws)
        found = predict(task).argmax(2) == task.query_y
        right += found.float().mean(1).tolist()
    return right
