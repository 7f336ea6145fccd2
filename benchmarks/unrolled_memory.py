"""Memory of the hypergradient through T inner steps: Unrolled against one graph over all steps.

    python -m benchmarks.unrolled_memory

A convolutional network trained by SGD with momentum. Each figure is the peak of resident memory of
a fresh process; the growth with T is what counts. Snapshots are parameters and momentum buffers.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from hyperopt_torch import BilevelOptimizer, Unrolled

from ._memory import resident

_LR, _MOMENTUM = 0.01, 0.9


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 64, 3, padding=1),
        nn.GELU(),
        nn.AvgPool2d(2),
        nn.Conv2d(64, 128, 3, padding=1),
        nn.GELU(),
        nn.AvgPool2d(7),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


def data(batch: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 1, 28, 28), torch.randint(10, (batch,))


def weighted(outputs: Tensor, y: Tensor, phi: Tensor) -> Tensor:
    return (phi.sigmoid() * F.cross_entropy(outputs, y, reduction="none")).mean()


def by_unrolled(steps: int, batch: int) -> Tensor:
    model, phi = network(), torch.zeros(batch, requires_grad=True)
    x, y = data(batch)
    optimizer = BilevelOptimizer(
        torch.optim.SGD(model.parameters(), lr=_LR, momentum=_MOMENTUM),
        torch.optim.SGD([phi], lr=1.0),
        estimator=Unrolled(),
    )
    for _ in range(steps):
        optimizer.inner_step(lambda: weighted(model(x), y, phi))
    (hypergradient,) = optimizer.hypergradient(F.cross_entropy(model(x), y))
    assert hypergradient is not None
    return hypergradient


def by_one_graph(steps: int, batch: int) -> Tensor:
    model, phi = network(), torch.zeros(batch, requires_grad=True)
    x, y = data(batch)
    theta = dict(model.named_parameters())
    velocity = {name: torch.zeros_like(p) for name, p in theta.items()}
    for _ in range(steps):
        loss = weighted(functional_call(model, theta, (x,)), y, phi)
        grads = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
        for (name, p), g in zip(list(theta.items()), grads, strict=True):
            velocity[name] = _MOMENTUM * velocity[name] + g
            theta[name] = p - _LR * velocity[name]
    outer_loss = F.cross_entropy(functional_call(model, theta, (x,)), y)
    return torch.autograd.grad(outer_loss, phi)[0]


METHODS = {"Unrolled": by_unrolled, "one graph": by_one_graph}


def peak(method: str, steps: int, batch: int) -> float:
    """MiB."""
    command = [sys.executable, "-m", "benchmarks.unrolled_memory", "--child", method]
    command += ["--steps", str(steps), "--batch", str(batch)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 50, 100])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--child", choices=METHODS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.child:
        METHODS[args.child](args.steps[0], args.batch)
        print(resident("VmHWM") / 2**20)
        return
    few, *_, many = args.steps
    snapshot = 2 * sum(p.numel() * p.element_size() for p in network().parameters()) / 2**20
    found = {name: method(few, args.batch) for name, method in METHODS.items()}
    gap = (found["Unrolled"] - found["one graph"]).norm() / found["one graph"].norm()
    print(f"relative difference of the two hypergradients after {few} steps: {gap:.1e}")
    print("peak resident memory, MiB  ", *(f"T={t:<7}" for t in args.steps), "MiB a step")
    for name in METHODS:
        peaks = [peak(name, t, args.batch) for t in args.steps]
        slope = (peaks[-1] - peaks[0]) / (many - few)
        print(f"  {name:24}", *(f"{p:<9.0f}" for p in peaks), f"{slope:.3f}", flush=True)
    print(f"  {'a snapshot':24}", *(" " * 9 for _ in args.steps), f"{snapshot:.3f}")


if __name__ == "__main__":
    main()
