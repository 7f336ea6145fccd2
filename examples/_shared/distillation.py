"""Learning a handful of images that train a network: what the two examples of it share."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from torch import Tensor, nn
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR
from tqdm import tqdm

from hyperopt_torch import (
    BilevelOptimizer,
    HypergradientEstimator,
    Unrolled,
    learn_hyperparameter,
)

from .checkpoint import Checkpoint, Stream
from .data import Images, Source, load_train_test

CLASSES = 10
BASELINES = {"none": "random images, not trained", "real": "real images, not trained"}
HEADER = ["", "outer loss", "test accuracy", "products a step", "CPU s", "published"]


RATES = (0.03, 0.1, 0.3, 1.0)  # tried for the real images
LONG = 20  # times as many steps


class Distillation(Protocol):
    """The settings of a run; dataset_distillation.py says what they mean."""

    data: Source
    data_root: Path | None
    download: bool
    per_class: int
    inner_steps: int
    inner_lr: float
    outer_steps: int
    outer_lr: float
    rate_lr: float
    outer_batch: int
    train: int
    evaluations: int
    resume: bool


@dataclass
class Run:
    """What a run has measured so far: plain values, which go into its checkpoint."""

    steps: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)  # outer
    accuracy: list[float] = field(default_factory=list)  # test
    seconds: float = 0.0  # of the processor, without the evaluations
    products: int = 0
    rates: list[float] = field(default_factory=list)  # learned, of each tensor

    def row(self, name: str, published: str) -> list[str]:
        products = self.products / max(1, self.steps[-1])
        numbers = [f"{self.loss[-1]:.4f}", f"{self.accuracy[-1]:.4f}", f"{products:.1f}"]
        return [name, *numbers, f"{self.seconds:.0f}", published]


class Distilled(nn.Module):
    """The learned images, five (or ``per_class``) rows of ten classes."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.images = nn.Parameter(images)


def standardised(s: Distillation, seed: int) -> tuple[Images, Images]:
    """Training and test images less the training mean, over the training deviation."""
    train, test = load_train_test(s.data, s.data_root, s.download)
    mean, deviation = train.x.mean(), train.x.std()
    order = torch.randperm(len(train.y), generator=torch.Generator().manual_seed(seed))[: s.train]
    return (
        dataclasses.replace(train, x=(train.x[order] - mean) / deviation, y=train.y[order]),
        dataclasses.replace(test, x=(test.x - mean) / deviation),
    )


@torch.no_grad()
def measure(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Mean loss and accuracy, in pieces that fit the processor's cache."""
    outputs = torch.cat([model(piece) for piece in x.split(500)])
    return F.cross_entropy(outputs, y).item(), (outputs.argmax(1) == y).float().mean().item()


def start_images(name: str, train: Images, s: Distillation) -> Tensor:
    if name != "real":
        return torch.randn(s.per_class * CLASSES, train.x.shape[1])
    of_class = [train.x[train.y == c][: s.per_class] for c in range(CLASSES)]
    return torch.stack(of_class, dim=1).flatten(0, 1)


def distil(
    name: str,
    make_estimator: Callable[[], HypergradientEstimator | None],
    make_model: Callable[[int], nn.Module],
    train: Images,
    test: Images,
    s: Distillation,
    seed: int,
    file: Path,
    *,
    decayed: bool = True,
) -> tuple[Run, Tensor]:
    """One run; "none" and "real" make no outer step. Returns what it measured, and the images.

    ``Unrolled`` looks at the inner steps, and so it learns their rates too, one for each tensor.
    ``decayed``: the outer rate falls to zero along a cosine; otherwise it stays.
    """
    torch.manual_seed(seed)  # a strategy takes its seed from here when it is made
    model = make_model(train.width)
    start = [p.detach().clone() for p in model.parameters()]
    distilled = Distilled(start_images(name, train, s))
    labels = torch.arange(CLASSES).repeat(s.per_class)
    batches = torch.Generator().manual_seed(seed)

    def train_loss() -> tuple[Tensor, Tensor]:
        # The mean of the losses is meant. One by one they serve NHGD, the outputs Gauss-Newton.
        outputs = model(distilled.images)
        return F.cross_entropy(outputs, labels, reduction="none"), outputs

    # The bilevel lines: wrap both optimizers, then inner_step and outer_step.
    inner = torch.optim.SGD([{"params": [p]} for p in model.parameters()], lr=s.inner_lr)
    estimator = make_estimator()
    rates = nn.ParameterList(
        learn_hyperparameter(inner, "lr") if isinstance(estimator, Unrolled) else []
    )
    groups = [{"params": [distilled.images]}, {"params": list(rates), "lr": s.rate_lr}]
    outer = torch.optim.Adam(groups[: 1 + bool(rates)], lr=s.outer_lr)
    optimizer = BilevelOptimizer(inner, outer, estimator=estimator)

    last = 0 if name in BASELINES else s.outer_steps
    decay = CosineAnnealingLR(outer, max(1, last)) if decayed else ConstantLR(outer, 1.0, 0)
    checkpoint = Checkpoint(
        file, images=distilled, rates=rates, optimizer=optimizer, decay=decay,
        batches=Stream(batches),
    )  # fmt: skip
    run, done = resumed(checkpoint, s) if last else (Run(), 0)
    every = max(1, last // s.evaluations)
    for step in tqdm(range(done, last + 1), desc=name, initial=done, total=last + 1):
        clock = time.process_time()
        # No optimizer.reset(): the path θ(φ) starts anew, but its end, where the systems are
        # solved, moves as slowly as the images do, and there a strategy's memory helps.
        with torch.no_grad():
            for p, value in zip(model.parameters(), start, strict=True):
                p.copy_(value)
        for _ in range(s.inner_steps):
            optimizer.inner_step(train_loss)
        run.seconds += time.process_time() - clock
        if step % every == 0 or step == last:
            run.steps.append(step)
            run.loss.append(measure(model, train.x[:2000], train.y[:2000])[0])
            run.accuracy.append(measure(model, test.x, test.y)[1])
            run.rates = [rate.exp().item() for rate in rates]
        if step == last:
            break
        clock = time.process_time()
        batch = torch.randint(len(train.y), (s.outer_batch,), generator=batches)
        optimizer.outer_step(F.cross_entropy(model(train.x[batch]), train.y[batch]))
        decay.step()
        run.products += optimizer.report.matvecs
        run.seconds += time.process_time() - clock
        if (step + 1) % every == 0 or step + 1 == last:
            checkpoint.save(step + 1, run=dataclasses.asdict(run), settings=signature(s))
    return run, distilled.images.detach()


def tuned_on_real(
    make_model: Callable[[int], nn.Module], train: Images, test: Images, s: Distillation,
    seed: int, steps: int,
) -> Run:  # fmt: skip
    """No learned image: as many real ones, at the rate of RATES with the least outer loss."""
    images, labels = start_images("real", train, s), torch.arange(CLASSES).repeat(s.per_class)
    best, run = float("inf"), Run()
    clock = time.process_time()
    for rate in RATES:
        torch.manual_seed(seed)
        model = make_model(train.width)
        sgd = torch.optim.SGD(model.parameters(), lr=rate)
        for _ in range(steps):
            sgd.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            sgd.step()
        loss = measure(model, train.x[:2000], train.y[:2000])[0]
        if loss < best:
            best = loss
            run = Run([0], [loss], [measure(model, test.x, test.y)[1]], rates=[rate])
    run.seconds = time.process_time() - clock  # of the whole search
    return run


def signature(s: Any) -> str:
    """The settings that a result depends on."""
    free = {"strategies", "methods", "seeds", "resume", "threads", "out", "data_root", "download"}
    return str({k: str(v) for k, v in dataclasses.asdict(s).items() if k not in free})


def checkpoint_files(prefix: str, names: Sequence[str], s: Any) -> dict[str, Path]:
    """One file for each run. Unless s.resume those of former runs go."""
    files = {name: s.out / f"{prefix}_{name}.pt" for name in names}
    for file in files.values():
        if not s.resume:
            file.unlink(missing_ok=True)
    return files


def resumed(checkpoint: Checkpoint, s: Any) -> tuple[Run, int]:
    """What the checkpoint holds, and the steps done; nothing and 0 unless s.resume."""
    done, log = checkpoint.load() if s.resume else (0, {})
    if log and log["settings"] != signature(s):
        raise SystemExit(f"{checkpoint.path} is of other settings: {log['settings']}")
    return (Run(**log["run"]) if log else Run()), done


def draw_images(grid: Sequence[Axes], images: Tensor, width: int) -> None:
    """Row by row, all on one grey scale."""
    low, high = images.quantile(torch.tensor([0.02, 0.98])).tolist()
    for axis, image in zip(grid, images, strict=True):
        axis.imshow(image.reshape(width, width), cmap="gray", vmin=low, vmax=high)
        axis.set_axis_off()
