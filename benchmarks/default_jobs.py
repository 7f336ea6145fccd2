"""Does the default do well without being told anything? Closed loops, to the end.

    python -m benchmarks.default_jobs [JOB ...] [--seeds 0 1 2]

Prints a table, a line a job and strategy: the final outer loss of each seed (validation loss, or
what the job's docstring says), their mean over that of ``Identity()``, and the products
an outer step. Closures return ``(loss, outputs)``, as is recommended. ``solved`` is 60 steps of
conjugate gradients on the Gauss-Newton matrix: close to the exact solve.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import warnings
from collections.abc import Callable, Iterator
from statistics import mean

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from hyperopt_torch import CG, BilevelOptimizer, GaussNewton, Identity

STRATEGIES: dict[str, Callable[[], dict]] = {
    "default": dict,
    "identity": lambda: {"ihvp": Identity()},
    "solved": lambda: {"ihvp": CG(60, tol=1e-3, damping=1e-3), "curvature": GaussNewton()},
}
JOBS: dict[str, Callable[[int, dict], tuple[float, float]]] = {}


def job(function: Callable[[int, dict], tuple[float, float]]) -> Callable:
    JOBS[function.__name__] = function
    return function


class Loop:
    """A bilevel run that counts its products."""

    def __init__(self, inner: torch.optim.Optimizer, outer: torch.optim.Optimizer, settings: dict):
        self.bo, self.products = BilevelOptimizer(inner, outer, **settings), []

    def run(
        self, steps: int, every: int, closure: Callable, val_loss: Callable[[], Tensor]
    ) -> None:
        for step in range(steps):
            self.bo.inner_step(closure(step))
            if step % every == every - 1:
                self.bo.outer_step(val_loss())
                self.products.append(self.bo.report.matvecs)

    def result(self, val_loss: Callable[[], Tensor]) -> tuple[float, float]:
        with torch.no_grad():
            return float(val_loss()), mean(self.products)


def digits(seed: int, wrong: float, n_train: int, n_val: int) -> tuple[Tensor, ...]:
    """x, y with wrong labels, which of them are wrong, and x, y of the validation."""
    data, g = load_digits(), torch.Generator().manual_seed(seed)
    x, y = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    order = torch.randperm(len(x), generator=g)[: n_train + n_val]
    x, y = x[order], y[order]
    labels = y[:n_train].clone()
    bad = torch.rand(n_train, generator=g) < wrong
    labels[bad] = (labels[bad] + torch.randint(1, 10, (int(bad.sum()),), generator=g)) % 10
    return x[:n_train], labels, bad, x[n_train:], y[n_train:]


def mlp(*widths: int, act: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), act()]
    return nn.Sequential(*layers[:-1])


def sgd(model: nn.Module, lr: float, **settings) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, **settings)


@job
def input_noise(seed: int, settings: dict) -> tuple[float, float]:
    """The strength of a Gaussian input noise, for a validation set that carries noise of .5."""
    x, y, _, xv, yv = digits(seed, 0.0, 400, 300)
    xv = xv + 0.5 * torch.randn_like(xv)
    model, log_strength = mlp(64, 64, 64, 10), torch.tensor(0.1).log().requires_grad_()
    loop = Loop(sgd(model, 0.05), torch.optim.Adam([log_strength], lr=0.03), settings)

    def closure(_: int) -> Callable:
        i = torch.randint(len(x), (100,))
        noise = torch.randn_like(x[i])

        def loss() -> tuple[Tensor, Tensor]:
            o = model(x[i] + log_strength.exp() * noise)
            return F.cross_entropy(o, y[i]), o

        return loss

    val_loss = lambda: F.cross_entropy(model(xv), yv)  # noqa: E731
    loop.run(800, 10, closure, val_loss)
    return loop.result(val_loss)


@job
def reweighting(seed: int, settings: dict) -> tuple[float, float]:
    """A weight for each sample, 40% of the labels wrong, mini-batches on both levels."""
    x, y, _, xv, yv = digits(seed, 0.4, 900, 200)
    model, phi = mlp(64, 64, 64, 10), torch.zeros(900, requires_grad=True)
    loop = Loop(sgd(model, 0.05), torch.optim.Adam([phi], lr=0.1), settings)

    def closure(_: int) -> Callable:
        i = torch.randint(len(x), (100,))

        def loss() -> tuple[Tensor, Tensor]:
            o = model(x[i])
            losses = F.cross_entropy(o, y[i], reduction="none")
            return (phi[i].sigmoid() * losses).mean(), o

        return loss

    def val_loss() -> Tensor:
        i = torch.randint(len(xv), (100,))
        return F.cross_entropy(model(xv[i]), yv[i])

    loop.run(600, 5, closure, val_loss)
    return loop.result(lambda: F.cross_entropy(model(xv), yv))


@job
def cleaning(seed: int, settings: dict) -> tuple[float, float]:
    """The same with all samples at once and a tanh network."""
    x, y, _, xv, yv = digits(seed, 0.4, 400, 400)
    model, phi = mlp(64, 16, 10, act=nn.Tanh), torch.zeros(400, requires_grad=True)
    loop = Loop(sgd(model, 0.1), torch.optim.Adam([phi], lr=0.1), settings)

    def closure(_: int) -> Callable:
        def loss() -> tuple[Tensor, Tensor]:
            o = model(x)
            return (phi.sigmoid() * F.cross_entropy(o, y, reduction="none")).mean(), o

        return loss

    val_loss = lambda: F.cross_entropy(model(xv), yv)  # noqa: E731
    loop.run(1500, 10, closure, val_loss)
    return loop.result(val_loss)


@job
def weight_decay(seed: int, settings: dict) -> tuple[float, float]:
    """A weight decay for each tensor of a network that overfits."""
    x, y, _, xv, yv = digits(seed, 0.2, 150, 400)
    model = mlp(64, 32, 10, act=nn.Tanh)
    parameters = list(model.parameters())
    log_decay = torch.full((len(parameters),), -7.0, requires_grad=True)
    loop = Loop(sgd(model, 0.1), torch.optim.Adam([log_decay], lr=0.1), settings)

    def closure(_: int) -> Callable:
        def loss() -> tuple[Tensor, Tensor]:
            o = model(x)
            squares = torch.stack([p.square().sum() for p in parameters])
            return F.cross_entropy(o, y) + log_decay.exp() @ squares, o

        return loss

    val_loss = lambda: F.cross_entropy(model(xv), yv)  # noqa: E731
    loop.run(1000, 10, closure, val_loss)
    return loop.result(val_loss)


@job
def multitask(seed: int, settings: dict) -> tuple[float, float]:
    """The weights of three losses, of which one has random labels."""
    x, y, _, xv, yv = digits(seed, 0.3, 300, 200)
    body, heads = mlp(64, 32), nn.ModuleList([nn.Linear(32, k) for k in (10, 2, 10)])
    targets = y, y % 2, torch.randint(0, 10, (300,))
    log_weights = torch.zeros(3, requires_grad=True)
    model = nn.ModuleList([body, heads])
    outer = torch.optim.Adam([log_weights], lr=0.03)
    loop = Loop(sgd(model, 0.1, weight_decay=1e-4), outer, settings)

    def closure(_: int) -> Callable:
        def loss() -> tuple[Tensor, list[Tensor]]:
            outputs = [head(body(x).relu()) for head in heads]
            losses = [F.cross_entropy(o, t) for o, t in zip(outputs, targets, strict=True)]
            return log_weights.exp() @ torch.stack(losses), outputs

        return loss

    val_loss = lambda: F.cross_entropy(heads[0](body(xv).relu()), yv)  # noqa: E731
    loop.run(600, 10, closure, val_loss)
    return loop.result(val_loss)


@job
def distillation(seed: int, settings: dict) -> tuple[float, float]:
    """Ten images, one a class, for a penalised softmax regression."""
    _, _, _, xv, yv = digits(seed, 0.0, 10, 800)
    images, labels = (0.1 * torch.randn(10, 64)).requires_grad_(), torch.arange(10)
    model = nn.Linear(64, 10)
    loop = Loop(
        torch.optim.SGD(model.parameters(), 0.3), torch.optim.Adam([images], 0.02), settings
    )

    def closure(_: int) -> Callable:
        def loss() -> tuple[Tensor, Tensor]:
            o = model(images)
            return F.cross_entropy(o, labels) + 5e-3 * model.weight.square().sum(), o

        return loss

    val_loss = lambda: F.cross_entropy(model(xv), yv)  # noqa: E731
    loop.run(1500, 10, closure, val_loss)
    return loop.result(val_loss)


@job
def transformer(seed: int, settings: dict) -> tuple[float, float]:
    """The weights of two sources of sequences, of which one is random, for a small transformer."""
    g = torch.Generator().manual_seed(seed)

    def sequences(count: int) -> Tensor:  # each symbol follows from the two before it
        s = torch.randint(0, 8, (count, 12), generator=g)
        for t in range(2, 12):
            s[:, t] = (s[:, t - 1] + 3 * s[:, t - 2]) % 8
        return s

    good, val, bad = sequences(48), sequences(64), torch.randint(0, 8, (48, 12), generator=g)
    embed, head = nn.Embedding(8, 16), nn.Linear(16, 8)
    place = nn.Parameter(0.1 * torch.randn(11, 16))
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, activation="gelu")
    mask = nn.Transformer.generate_square_subsequent_mask(11)
    model = nn.ModuleList([embed, layer, head])
    model.place = place
    logits = torch.zeros(2, requires_grad=True)
    inner = torch.optim.Adam(model.parameters(), lr=3e-3)
    loop = Loop(inner, torch.optim.Adam([logits], lr=0.05), settings)

    def predict(s: Tensor) -> Tensor:
        return head(layer(embed(s[:, :-1]) + place, src_mask=mask)).flatten(0, 1)

    def closure(_: int) -> Callable:
        i = torch.randint(48, (24,))

        def loss() -> tuple[Tensor, list[Tensor]]:
            outputs = [predict(s[i]) for s in (good, bad)]
            targets = [s[i, 1:].flatten() for s in (good, bad)]
            losses = [F.cross_entropy(o, t) for o, t in zip(outputs, targets, strict=True)]
            return logits.sigmoid() @ torch.stack(losses), outputs

        return loss

    val_loss = lambda: F.cross_entropy(predict(val), val[:, 1:].flatten())  # noqa: E731
    loop.run(400, 10, closure, val_loss)
    return loop.result(val_loss)


@job
def imaml(seed: int, settings: dict) -> tuple[float, float]:
    """A starting point for sinusoids, 10 shots, proximal term .5; mean query loss of new tasks."""
    g = torch.Generator().manual_seed(seed)
    meta, model = (mlp(1, 40, 40, 1, act=nn.Tanh) for _ in range(2))
    outer = torch.optim.Adam(meta.parameters(), lr=3e-3)
    bo = BilevelOptimizer(torch.optim.SGD(model.parameters(), lr=0.02), outer, **settings)
    products: list[int] = []

    def task() -> Iterator[tuple[Tensor, Tensor]]:
        amplitude, phase = torch.rand(1, generator=g) * 4.9 + 0.1, torch.rand(1, generator=g) * 3.14
        while True:
            x = torch.rand(10, 1, generator=g) * 10 - 5
            yield x, amplitude * (x - phase).sin()

    def adapt() -> Tensor:
        """The query loss of one more task."""
        samples = task()
        (x, y), (xq, yq) = next(samples), next(samples)

        def loss() -> tuple[Tensor, Tensor]:
            o, both = model(x), zip(model.parameters(), meta.parameters(), strict=True)
            return F.mse_loss(o, y) + 0.25 * sum((p - q).square().sum() for p, q in both), o

        bo.start_from(meta.parameters())
        for _ in range(20):
            bo.inner_step(loss)
        return F.mse_loss(model(xq), yq)

    for _ in range(50):
        outer.zero_grad()
        for _ in range(4):
            bo.accumulate(adapt() / 4)
            products.append(bo.report.matvecs)
        outer.step()
    return mean(float(adapt()) for _ in range(50)), mean(products)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("jobs", nargs="*", metavar="JOB", help=" ".join(JOBS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    seeds = "".join(f"{f'seed {s}':>9}" for s in args.seeds)
    print(f"{'job':14}{'strategy':10}{'products':>9}{seeds}{'to identity':>13}")
    for name in args.jobs or JOBS:
        found = {}
        for strategy, settings in STRATEGIES.items():
            found[strategy] = []
            for seed in args.seeds:
                torch.manual_seed(seed)
                found[strategy].append(JOBS[name](seed, copy.copy(settings())))
        base = mean(loss for loss, _ in found["identity"])
        for strategy, runs in found.items():
            losses = "".join(f"{loss:9.4f}" for loss, _ in runs)
            ratio = mean(loss for loss, _ in runs) / base
            print(
                f"{name:14}{strategy:10}{mean(p for _, p in runs):9.1f}{losses}{ratio:13.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
