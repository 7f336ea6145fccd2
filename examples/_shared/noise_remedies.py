"""Plain remedies for wrong labels, beside which learned weights have to show a gain.

Each returns a loss of the model, full batch. Where a remedy needs the rate of wrong labels it is
told the true one, which learned weights are not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import NoisySplit

NoiseKind = Literal["next", "any"]
Loss = Callable[[nn.Module, int], Tensor]  # of the model at a step, a scalar
RUNS = 12.4  # of all plain runs together, in whole ones
Make = Callable[[], tuple[nn.Module, torch.optim.SGD]]


def mislabel(split: NoisySplit, kind: NoiseKind) -> NoisySplit:
    """The same samples labelled wrong, "next": every one with the class after its own."""
    if kind == "any":
        return split
    following = (split.truth + 1) % (int(split.truth.max()) + 1)
    return replace(split, labels=torch.where(split.wrong, following, split.labels))


def as_given(model: nn.Module, step: int, x: Tensor, y: Tensor) -> Tensor:
    """Cross entropy with all labels."""
    return F.cross_entropy(model(x), y)


def trimmed(split: NoisySplit, warm_up: int, clean: bool) -> Loss:
    """Small-loss selection (Han et al. 2018, one network): drop the largest losses.

    The share dropped grows over ``warm_up`` steps to the true rate of wrong labels. ``clean`` adds
    the loss of the clean images.
    """
    rate = split.wrong.float().mean().item()

    def loss(model: nn.Module, step: int) -> Tensor:
        losses = F.cross_entropy(model(split.x), split.labels, reduction="none")
        kept = round((1 - rate * min(1, step / warm_up)) * len(losses))
        small = losses.topk(kept, largest=False).values.mean()
        return small + as_given(model, step, split.clean_x, split.clean_y) if clean else small

    return loss


def symmetric(model: nn.Module, step: int, x: Tensor, y: Tensor) -> Tensor:
    """Symmetric cross entropy (Wang et al. 2019): .1 CE + reverse CE, log 0 taken for -4 ln 10."""
    output = model(x)
    wrong = 1 - output.softmax(1).gather(1, y[:, None]).mean()
    return 0.1 * F.cross_entropy(output, y) + 9.21 * wrong


def both(model: nn.Module, step: int, split: NoisySplit) -> Tensor:
    """Noisy and clean images, the mean of each."""
    noisy = as_given(model, step, split.x, split.labels)
    return noisy + as_given(model, step, split.clean_x, split.clean_y)


def kept_and_clean(split: NoisySplit, kept: Tensor) -> Loss:
    """The samples that ``kept`` (n,) says, and the clean images, as one training set."""
    x = torch.cat([split.x[kept], split.clean_x])
    y = torch.cat([split.labels[kept], split.clean_y])
    return partial(as_given, x=x, y=y)


@torch.no_grad()
def agreeing(split: NoisySplit, clean_model: nn.Module) -> Tensor:
    """(n,) bool: what a model of the clean images alone labels as given."""
    return clean_model(split.x).argmax(1) == split.labels


def corrected(split: NoisySplit, noisy_model: nn.Module) -> Loss:
    """Gold loss correction (Hendrycks et al. 2018): p(label | class), estimated on clean images.

    It takes for granted that an error depends on the class alone.
    """
    with torch.no_grad():
        seen = noisy_model(split.clean_x).softmax(1)
    confusion = torch.stack([seen[split.clean_y == c].mean(0) for c in range(seen.shape[1])])

    def loss(model: nn.Module, step: int) -> Tensor:
        given = model(split.x).softmax(1) @ confusion  # (n, classes)
        clean = as_given(model, step, split.clean_x, split.clean_y)
        return F.nll_loss(given.clamp_min(1e-12).log(), split.labels) + clean

    return loss


def fit(loss: Loss, make: Make, steps: int, tick: Callable[[], Any]) -> nn.Module:
    """A fresh model, trained on ``loss``."""
    model, sgd = make()
    for step in range(1, steps + 1):
        sgd.zero_grad()
        loss(model, step).backward()
        sgd.step()
        tick()
    return model


def plain_runs(
    split: NoisySplit, make: Make, steps: int, every: int, tick: Callable[[], Any]
) -> dict[str, Callable[[], nn.Module]]:
    """What to do without a hypergradient, by name.

    Args:
        split: the data.
        make: a fresh model and its optimizer, the same ones at each call.
        steps: of a run.
        every: steps between two looks of early stopping.
        tick: called after each step.
    """
    noisy = partial(as_given, x=split.x, y=split.labels)
    clean = partial(as_given, x=split.clean_x, y=split.clean_y)
    right = partial(as_given, x=split.x[~split.wrong], y=split.labels[~split.wrong])
    reverse = partial(symmetric, x=split.x, y=split.labels)

    def run(
        loss: Loss, stop: bool = False, steps: int = steps, start: nn.Module | None = None
    ) -> nn.Module:
        """With ``stop`` the model comes back as it was at its lowest loss on the clean images."""
        model, sgd = make()
        if start:
            model.load_state_dict(start.state_dict())
            for group in sgd.param_groups:
                group["lr"] /= 4
        best, kept = float("inf"), model.state_dict()
        for step in range(1, steps + 1):
            sgd.zero_grad()
            loss(model, step).backward()
            sgd.step()
            tick()
            if stop and step % every == 0 and (now := clean(model, step).item()) < best:
                best, kept = now, {k: v.clone() for k, v in model.state_dict().items()}
        model.load_state_dict(kept)
        return model

    def fine_tuned() -> nn.Module:
        start = run(noisy, stop=True)
        return run(clean, steps=steps // 5, start=start)

    short = max(1, steps // 10)
    mixed = partial(both, split=split)
    trim = partial(trimmed, split, short)
    return {
        "no cleaning": lambda: run(noisy),
        "stopped early": lambda: run(noisy, stop=True),
        "symmetric loss, stopped early": lambda: run(reverse, stop=True),
        "largest losses dropped": lambda: run(trim(clean=False)),
        "largest dropped, clean added": lambda: run(trim(clean=True)),
        "clean added": lambda: run(mixed),
        "clean added, a tenth of the steps": lambda: run(mixed, steps=short),
        "stopped early, tuned on clean": fine_tuned,
        "clean alone": lambda: run(clean),
        "labels a clean model agrees with": lambda: run(
            kept_and_clean(split, agreeing(split, run(clean)))
        ),
        "loss correction": lambda: run(corrected(split, run(noisy, steps=short))),
        "oracle": lambda: run(right),
    }
