"""Seconds and peak memory of one hypergradient in a WRN-28-2, beside the published figures.

    python -m benchmarks.hypergradient_cost
    python -m benchmarks.hypergradient_cost --depth 10 --width 1 --batch 4 --only cg

Each method runs in a fresh process, which alternates training gradients and hypergradients of the
same batch; its seconds are the median, its ratio the median of the pairs. Peak memory is what the
process holds at most above the model and the batches, and its ratio is to the process that makes
training gradients only. On a CPU seconds are CPU seconds and memory is resident memory; on a CUDA
device they are seconds of the synchronised device and the memory that torch allocated there.

Damping is such that no method stops early: this measures cost, not quality. The published column
is table 5 of Hataya & Yamada (AISTATS 2023), on an A100, at their batch size.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from hyperopt_torch import IHVP, BilevelOptimizer, ConjugateGradient, Neumann, Nystrom

from ._memory import resident
from ._models import wide_resnet_problem

DAMPING = 30.0  # conjugate gradients take all their steps: no negative curvature, no early end
STRATEGIES: dict[str, Callable[[int], IHVP]] = {
    "cg": lambda k: ConjugateGradient(k, tol=0.0, damping=DAMPING),
    "neumann": lambda k: Neumann(k, scale=1e-3, damping=DAMPING),
    "nystrom": lambda k: Nystrom(k, damping=DAMPING),
    "nystrom-space": lambda k: Nystrom(k, damping=DAMPING, chunk_size=1),
}
SIZES = (5, 10, 20)
GRADIENT = "gradient"

# Seconds and GB on an A100.
PUBLISHED = {
    "cg": ((0.44, 2.46), (0.83, 2.46), (1.68, 2.46)),
    "neumann": ((0.40, 2.39), (0.75, 2.39), (1.48, 2.39)),
    "nystrom": ((0.24, 4.66), (0.33, 8.15), (0.54, 15.1)),
    "nystrom-space": ((3.11, 1.94), (10.7, 1.94), (41.0, 1.94)),
}
HEADER = (
    *("method", "size", "products", "seconds", "ratio", "MiB", "ratio of MiB"),
    *("A100, s", "A100, GB"),
)


class Meter:
    """Seconds and bytes, of the device that does the work."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self._before = torch.cuda.memory_allocated() if self.cuda else resident("VmRSS")

    def seconds(self, work: Callable[[], object]) -> float:
        if not self.cuda:
            start = time.process_time()
            work()
            return time.process_time() - start
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    def peak(self) -> float:
        """MiB, at most, above what was there when the meter was made."""
        peak = torch.cuda.max_memory_allocated() if self.cuda else resident("VmHWM")
        return (peak - self._before) / 2**20


def measure(args: argparse.Namespace) -> dict[str, float]:
    """In this process: one method, ``args.child`` = (name, size)."""
    name, size = args.child[0], int(args.child[1])
    device = torch.device(args.device)
    with torch.device(device):
        model, weights, train_loss, val_loss = wide_resnet_problem(
            args.depth, args.width, args.batch
        )
    inner = list(model.parameters())
    meter = Meter(device)

    def gradient() -> object:
        return torch.autograd.grad(train_loss(), inner)

    if name == GRADIENT:
        gradient()
        peak = meter.peak()
        times = [meter.seconds(gradient) for _ in range(args.repeats)]
        return {"products": 0, "seconds": statistics.median(times), "ratio": 1.0, "MiB": peak}
    optimizer = BilevelOptimizer(
        torch.optim.SGD(inner, lr=0.1), torch.optim.SGD([weights], lr=0.0), STRATEGIES[name](size)
    )

    def hypergradient() -> object:
        return optimizer.outer_step(val_loss(), train_loss)

    hypergradient()  # the warm-up, and the peak: nothing larger follows
    peak = meter.peak()
    report = optimizer.report
    if report.matvecs < size:
        raise SystemExit(f"{name} {size} stopped early, after {report.matvecs} products")
    pairs = [(meter.seconds(gradient), meter.seconds(hypergradient)) for _ in range(args.repeats)]
    return {
        "products": report.matvecs,
        "seconds": statistics.median(h for _, h in pairs),
        "ratio": statistics.median(h / g for g, h in pairs),
        "MiB": peak,
    }


def in_fresh_process(name: str, size: int, args: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.hypergradient_cost", "--child", name, str(size)]
    for option in ("depth", "width", "batch", "repeats", "device"):
        command += [f"--{option}", str(getattr(args, option))]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} {size} failed:\n{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="products or rank")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--depth", type=int, default=28, help="6n + 4")
    parser.add_argument("--width", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="pairs to take the median over")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="CSV file for the table")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.child:
        print(json.dumps(measure(args)))
        return
    where = torch.cuda.get_device_name() if args.device.startswith("cuda") else "one CPU thread"
    print(f"one hypergradient, WRN-{args.depth}-{args.width}, batch {args.batch}, {where}")
    line = "{:14} {:>4} {:>8} {:>9} {:>7} {:>7} {:>12} {:>8} {:>8}"
    print(line.format(*HEADER))
    rows: list[list[object]] = []
    base = 0.0
    for name, size in [(GRADIENT, 0), *((n, k) for n in args.only for k in args.sizes)]:
        found = in_fresh_process(name, size, args)
        base = base or found["MiB"]
        published = PUBLISHED[name][SIZES.index(size)] if size in SIZES else ("", "")
        row = [name, size or "", f"{found['products']:.0f}", f"{found['seconds']:.2f}",
               f"{found['ratio']:.1f}", f"{found['MiB']:.0f}", f"{found['MiB'] / base:.2f}",
               *published]  # fmt: skip
        rows.append(row)
        print(line.format(*map(str, row)), flush=True)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with open(args.out, "w", newline="") as file:
            csv.writer(file).writerows([HEADER, *rows])
        print(f"table: {args.out}")


if __name__ == "__main__":
    main()
