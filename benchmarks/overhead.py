"""What the wrapper costs beside the products that a hypergradient must do.

    python -m benchmarks.overhead

First, what `inner_step` adds to a plain loop's step on a tiny network. Then three tables, each of
ratios of CPU seconds within this run, on one thread (median over pairs run in turn):

1. `outer_step` on a WRN-16-2, batch 16, against the bare autograd calls that it must do: two
   gradients, ten Hessian products, one cross product.
2. One iteration (`inner_step` and `outer_step`) on a logistic regression with 100 parameters,
   against the loop written by hand.
3. Space-efficient against time-efficient Nyström at rank 20 on the WRN, and the growth of the
   peak memory of each from rank 5 to rank 40, in a fresh process each.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperopt_torch import IHVP, BilevelOptimizer, ConjugateGradient, Nystrom

from ._memory import resident
from ._models import wide_resnet_problem


def paired_ratio(a: Callable[[], object], b: Callable[[], object], pairs: int) -> float:
    """Median of CPU seconds a / b over pairs run in turn, after one warm-up of each."""
    a(), b()
    ratios = []
    for i in range(pairs):
        first, second = (a, b) if i % 2 else (b, a)
        times = {}
        for f in (first, second):
            start = time.process_time()
            f()
            times[f] = time.process_time() - start
        ratios.append(times[a] / times[b])
    return statistics.median(ratios)


def bare_products(
    train_loss: Callable[[], Tensor],
    val_loss: Callable[[], Tensor],
    inner: list[Tensor],
    outer: list[Tensor],
    products: int,
) -> None:
    """The autograd calls of one hypergradient and nothing else."""
    b = torch.autograd.grad(val_loss(), inner)
    grads = torch.autograd.grad(train_loss(), inner, create_graph=True)
    for _ in range(products):
        torch.autograd.grad(grads, inner, b, retain_graph=True)
    torch.autograd.grad(grads, outer, b, retain_graph=True)


def outer_step_ratio(ihvp: IHVP, products: int, pairs: int) -> float:
    model, weights, train_loss, val_loss = wide_resnet_problem()
    optimizer = BilevelOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.SGD([weights], lr=0.0), ihvp=ihvp
    )
    inner = list(model.parameters())
    optimizer.outer_step(val_loss(), train_loss)
    assert optimizer.report.matvecs >= products, "stopped early: nothing to compare"
    return paired_ratio(
        lambda: optimizer.outer_step(val_loss(), train_loss),
        lambda: bare_products(train_loss, val_loss, inner, [weights], products),
        pairs,
    )


def logistic_ratio(pairs: int, steps: int = 20) -> float:
    """inner_step + outer_step with CG(10) against the same mathematics by hand."""
    X, Xv = torch.randn(500, 100), torch.randn(500, 100)
    y, yv = torch.rand(500).round(), torch.rand(500).round()
    w = torch.zeros(100, requires_grad=True)
    phi = torch.zeros(100, requires_grad=True)
    inner, outer = torch.optim.SGD([w], lr=0.1), torch.optim.SGD([phi], lr=0.0)

    def train_loss() -> Tensor:
        fit = F.binary_cross_entropy_with_logits(X @ w, y)
        return fit + (phi.exp() * w.square()).sum() / 2

    def val_loss() -> Tensor:
        return F.binary_cross_entropy_with_logits(Xv @ w, yv)

    optimizer = BilevelOptimizer(inner, outer, ihvp=ConjugateGradient(10, tol=1e-12))

    def with_library() -> None:
        for _ in range(steps):
            optimizer.inner_step(train_loss)
            optimizer.outer_step(val_loss())

    def by_hand() -> None:
        for _ in range(steps):
            inner.zero_grad()
            train_loss().backward()
            inner.step()
            (b,) = torch.autograd.grad(val_loss(), [w])
            (grad,) = torch.autograd.grad(train_loss(), [w], create_graph=True)
            x, r, p = torch.zeros_like(b), b, b
            rr = r @ r
            for _ in range(10):
                (Ap,) = torch.autograd.grad(grad, [w], p, retain_graph=True)
                alpha = rr / (p @ Ap)
                x, r = x + alpha * p, r - alpha * Ap
                rr_old, rr = rr, r @ r
                p = r + rr / rr_old * p
            (cross,) = torch.autograd.grad(grad, [phi], x)
            phi.grad = -cross
            outer.step()

    return paired_ratio(with_library, by_hand, pairs)


def nystrom_time_ratio(rank: int, pairs: int) -> float:
    model, weights, train_loss, val_loss = wide_resnet_problem()

    def step(ihvp: IHVP) -> Callable[[], object]:
        optimizer = BilevelOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1),
            torch.optim.SGD([weights], lr=0.0),
            ihvp=ihvp,
        )
        return lambda: optimizer.outer_step(val_loss(), train_loss)

    return paired_ratio(step(Nystrom(rank, chunk_size=1)), step(Nystrom(rank)), pairs)


def peak_megabytes(rank: int, chunk_size: int | None) -> float:
    """Peak resident memory of a fresh process that makes one hypergradient."""
    command = [sys.executable, "-m", "benchmarks.overhead", "--peak", str(rank)]
    if chunk_size is not None:
        command += ["--chunk-size", str(chunk_size)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_own_peak(rank: int, chunk_size: int | None) -> None:
    model, weights, train_loss, val_loss = wide_resnet_problem()
    BilevelOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        torch.optim.SGD([weights], lr=0.0),
        ihvp=Nystrom(rank, chunk_size=chunk_size),
        self_check=False,  # once a run: not what is measured here
    ).outer_step(val_loss(), train_loss)
    print(resident("VmHWM") / 2**20)


def inner_step_microseconds(steps: int = 2000, repetitions: int = 7) -> tuple[float, float]:
    """CPU µs of (the plain loop's step, inner_step) on a tiny model: the least of several means."""
    found = []
    for bilevel in (False, True):
        torch.manual_seed(0)
        model, phi = torch.nn.Sequential(*layers(10, 8, 1)), torch.zeros(16, requires_grad=True)
        x, y = torch.randn(16, 10), torch.randn(16)
        inner = torch.optim.SGD(model.parameters(), lr=1e-3)

        def loss(model=model, phi=phi, x=x, y=y) -> torch.Tensor:
            return (phi.exp() * (model(x)[:, 0] - y).square()).mean()

        bo = BilevelOptimizer(inner, torch.optim.SGD([phi], lr=0.1)) if bilevel else None

        def step(bo=bo, inner=inner, loss=loss) -> None:
            if bo is not None:
                bo.inner_step(loss)
                return
            inner.zero_grad()
            loss().backward()
            inner.step()

        least = float("inf")
        for _ in range(repetitions):
            start = time.process_time()
            for _ in range(steps):
                step()
            least = min(least, (time.process_time() - start) / steps)
        found.append(1e6 * least)
    return found[0], found[1]


def layers(*widths: int) -> list[torch.nn.Module]:
    """Linear layers with tanh between them."""
    found: list[torch.nn.Module] = []
    for a, b in itertools.pairwise(widths):
        found += [torch.nn.Linear(a, b), torch.nn.Tanh()]
    return found[:-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--pairs", type=int, default=5, help="pairs to take the median over")
    parser.add_argument("--ranks", type=int, nargs="+", default=[5, 10, 20, 40])
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--chunk-size", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if args.peak is not None:
        print_own_peak(args.peak, args.chunk_size)
        return
    plain, ours = inner_step_microseconds()
    print("one inner step of a 10-8-1 network, batch 16, CPU microseconds")
    print(
        f"  plain loop {plain:.0f}, inner_step {ours:.0f}, more by {ours - plain:.0f}", flush=True
    )
    print("outer_step / bare products, WRN-16-2, batch 16        ratio")
    for name, ihvp in (
        ("Nystrom(rank=10)", Nystrom(10)),
        ("ConjugateGradient(10)", ConjugateGradient(10, tol=1e-12, damping=5.0)),
    ):
        print(f"  {name:50} {outer_step_ratio(ihvp, 10, args.pairs):6.3f}", flush=True)
    print("iteration / by hand, logistic regression, 100 parameters")
    print(f"  {'ConjugateGradient(10)':50} {logistic_ratio(8 * args.pairs):6.3f}", flush=True)
    print("space-efficient / time-efficient Nystrom, rank 20, seconds")
    print(f"  {'chunk_size=1 / chunk_size=None':50} {nystrom_time_ratio(20, 3):6.3f}", flush=True)
    print("peak memory of one hypergradient, MiB" + " " * 10, *(f"k={k:<6}" for k in args.ranks))
    for name, chunk_size in (("chunk_size=None", None), ("chunk_size=1", 1)):
        peaks = [peak_megabytes(rank, chunk_size) for rank in args.ranks]
        print(f"  {name:45}", *(f"{peak:<8.0f}" for peak in peaks), flush=True)


if __name__ == "__main__":
    main()
