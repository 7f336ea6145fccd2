"""Long-tailed training sets, and what may be done about them without a hypergradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperopt_torch import ConjugateGradient, GaussNewton, Hessian, Identity, Neumann, Nystrom

from .data import Images, load_train_test
from .wide_resnet import WideResNet

LongTailSource = Literal["digits", "mnist", "fashion", "cifar10"]
Loss = Callable[[Tensor, Tensor], Tensor]  # of outputs (b, classes) and labels (b,), a scalar
Found = tuple[str, Tensor, int, str]  # method, outputs on the test set, products, what it chose

# Fashion-MNIST from easy to hard: bag, boot, trousers, sneaker, sandal, dress, T-shirt, pullover,
# coat, shirt. As they come, the rarest three would be sneaker, bag and boot, which nobody mistakes.
HARD_TAIL = (8, 9, 1, 7, 5, 3, 0, 2, 4, 6)


# A strategy has a memory, so each run makes its own.
STRATEGIES: dict[str, Callable[[], dict[str, Any]]] = {
    "default": dict,  # what BilevelOptimizer takes by itself
    "identity": lambda: {"ihvp": Identity()},
    "warm-cg": lambda: {
        "ihvp": ConjugateGradient(5, damping=0.1, warm_start=True),
        "curvature": GaussNewton(),
    },
    # Hataya & Yamada: rank or steps 10, damping or step size .01, the Hessian.
    "nystrom": lambda: {"ihvp": Nystrom(10, damping=0.01), "curvature": Hessian()},
    "cg": lambda: {"ihvp": ConjugateGradient(10, damping=0.01), "curvature": Hessian()},
    "neumann": lambda: {"ihvp": Neumann(10, scale=0.01), "curvature": Hessian()},
}


@dataclass(frozen=True)
class Split:
    """Images (n, channels, width, width) and labels; training set long-tailed, 0 the largest."""

    x: Tensor
    y: Tensor
    val_x: Tensor
    val_y: Tensor
    test_x: Tensor
    test_y: Tensor

    @property
    def log_prior(self) -> Tensor:
        """(classes,) of the training set."""
        return (torch.bincount(self.y, minlength=10) / len(self.y)).log()

    def joined(self) -> Split:
        """The balanced images are training images, too."""
        x, y = torch.cat([self.x, self.val_x]), torch.cat([self.y, self.val_y])
        return replace(self, x=x, y=y)


def load_long_tail(
    source: LongTailSource, root: Path | None, download: bool
) -> tuple[Images, Images]:
    """Training and test images."""
    if source != "cifar10":
        return load_train_test(source, root, download)
    if root is None:
        raise SystemExit("--data cifar10 needs --data-root PATH (and --download the first time).")
    from torchvision.datasets import CIFAR10

    def part(train: bool) -> Images:
        data = CIFAR10(str(root), train=train, download=download)
        x = torch.tensor(data.data).permute(0, 3, 1, 2).float().flatten(1) / 255
        return Images(x, torch.tensor(data.targets), 32, "CIFAR10, 32x32")

    return part(True), part(False)


def halved(images: Images) -> Images:
    """Each 2 x 2 pixels averaged: a quarter of the work, for two cores."""
    x = images.x.reshape(len(images.x), -1, images.width, images.width)
    small = F.avg_pool2d(x, 2)
    return Images(small.flatten(1), images.y, small.shape[-1], f"{images.name}, halved")


def long_tailed(
    train: Images,
    test: Images,
    imbalance: int,
    seed: int,
    *,
    n_max: int,
    val_per_class: int,
    order: tuple[int, ...] = tuple(range(10)),
) -> Split:
    """Class c in ``order`` keeps n_max · imbalance^(-c/9) training images.

    The balanced images are set aside first; the tail is cut from what remains.
    """
    number = torch.tensor(order).argsort()
    y, test_y = number[train.y], number[test.y]
    shuffled = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    members = [shuffled[y[shuffled] == c] for c in range(10)]
    val = torch.cat([m[:val_per_class] for m in members])
    members = [m[val_per_class:] for m in members]
    largest = min(n_max, *map(len, members))
    sizes = [max(1, round(largest * imbalance ** (-c / 9))) for c in range(10)]
    chosen = torch.cat([m[:n] for m, n in zip(members, sizes, strict=True)])

    def images(x: Tensor) -> Tensor:
        return x.reshape(len(x), -1, train.width, train.width)

    return Split(
        *(images(train.x[chosen]), y[chosen]),
        *(images(train.x[val]), y[val]),
        *(images(test.x), test_y),
    )


def adjusted(offset: Tensor, log_weight: Tensor | None = None) -> Loss:
    """Cross entropy of outputs + offset, weighted by class.

    offset = τ · log prior is logit adjustment (Menon et al. 2021).
    """

    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        losses = F.cross_entropy(outputs + offset, y, reduction="none")
        if log_weight is None:
            return losses.mean()
        weights = log_weight.exp()[y]
        return (weights * losses).sum() / weights.sum()

    return loss


def fitted_offset(outputs: Tensor, y: Tensor) -> Tensor:
    """(classes,) to add to the outputs of a trained model, by its loss on the balanced images."""
    offset = torch.zeros(outputs.shape[1], requires_grad=True)
    lbfgs = torch.optim.LBFGS([offset], max_iter=50)

    def closure() -> Tensor:
        lbfgs.zero_grad()
        loss = F.cross_entropy(outputs + offset, y)
        loss.backward()
        return loss

    lbfgs.step(closure)
    return offset.detach()


class Offsets(nn.Module):
    """An offset and a log weight for each class: the outer parameters."""

    def __init__(self, offset: Tensor, log_weight: Tensor) -> None:
        super().__init__()
        self.offset = nn.Parameter(offset.clone())
        self.log_weight = nn.Parameter(log_weight.clone())

    def forward(self, outputs: Tensor, y: Tensor) -> Tensor:
        return adjusted(self.offset, self.log_weight)(outputs, y)


class WeightNetwork(nn.Module):
    """The weight of a sample from its loss (Shu et al. 2019); divided by their mean."""

    def __init__(self) -> None:
        super().__init__()
        layers = nn.Linear(1, 100), nn.ReLU(), nn.Linear(100, 1), nn.Sigmoid()
        self.weigh = nn.Sequential(*layers)

    def forward(self, outputs: Tensor, y: Tensor) -> Tensor:
        losses = F.cross_entropy(outputs, y, reduction="none")
        weights = self.weigh(losses.detach()[:, None])[:, 0]
        return (weights * losses).sum() / weights.sum()


def network(split: Split, name: Literal["small", "wrn-28-10"]) -> nn.Module:
    """A wide residual network, or two convolutions with stride 2 and a linear layer."""
    if name == "wrn-28-10":
        return WideResNet(28, 10)
    channels, width = split.x.shape[1:3]
    return nn.Sequential(
        *(nn.Conv2d(channels, 16, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32 * ((width + 3) // 4) ** 2, 10)),
    )


@torch.no_grad()
def outputs_of(model: nn.Module, x: Tensor) -> Tensor:
    """(n, classes), in parts."""
    return torch.cat([model(part) for part in x.split(2000)])


def plain_remedies(split: Split, fit: Callable[[Split, Loss], nn.Module]) -> Iterator[Found]:
    """Without a hypergradient; "+ balanced": trained on the balanced images, too."""
    prior, joined = split.log_prior, split.joined()
    new_prior = joined.log_prior

    def run(name: str, loss: Loss, data: Split = split) -> tuple[nn.Module, Found]:
        model = fit(data, loss)
        return model, (name, outputs_of(model, split.test_x), 0, "")

    yield run("baseline", F.cross_entropy)[1]
    yield run("weights 1/n", adjusted(torch.zeros(10), -prior))[1]
    first, found = run("logit adjustment", adjusted(prior))
    yield found
    offset = fitted_offset(outputs_of(first, split.val_x), split.val_y)
    yield "logit adjustment, offsets fitted after", found[1] + offset, 0, ""
    # The multiple of the log prior, by the loss on the balanced images.
    tried = {1.0: (first, found)} | {t: run("", adjusted(t * prior)) for t in (0.75, 1.25)}
    losses = {
        t: F.cross_entropy(outputs_of(m, split.val_x), split.val_y) for t, (m, _) in tried.items()
    }
    tau = min(losses, key=lambda t: losses[t].item())
    yield "logit adjustment, tuned", tried[tau][1][1], 0, f"{tau}"
    yield run("weights 1/n + balanced", adjusted(torch.zeros(10), -new_prior), joined)[1]
    yield run("logit adjustment + balanced", adjusted(new_prior), joined)[1]
    yield run("logit adjustment, tuned + balanced", adjusted(tau * new_prior), joined)[1]
