"""The first program with other libraries: does it run, what accuracy, and is the solve exact?

    python -m benchmarks.peers

Runs the programs of ``benchmarks/lines`` whose library is installed, one process a seed, and adds
their test accuracies to docs/results/peers.csv. Two libraries are imported as ``hypergrad``: run
the other one from a second environment, with ``--programs with_hypertorch``.

Then each library's own conjugate gradients on a problem with a known answer: f = ½wᵀAw − φᵀw and
g = ½‖w − t‖² have the hypergradient A⁻¹(w − t), which n = 3 steps reach but for rounding. Printed
are relative errors, in float64; they go to docs/results/peers.txt.
"""

from __future__ import annotations

import csv
import importlib.metadata
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from hyperopt_torch import CG, BilevelOptimizer

from .lines import OURS, PEERS, PLAIN

PACKAGES = {
    "plain": "torch",
    "first_loop": "hyperopt_torch",
    "with_betty": "betty-ml",
    "with_boat": "boat-torch",
    "with_higher": "higher",
    "with_hypergrad": "hypergrad",
    "with_torchopt": "torchopt",
}
FIELDS = ["program", "library", "seed", "accuracy"]
A = torch.tensor([[3.0, 1.0, 0.0], [1.0, 2.0, 0.5], [0.0, 0.5, 1.0]], dtype=torch.float64)
W, T = torch.tensor([[1.0, -2.0, 0.5], [0.0, 1.0, 2.0]], dtype=torch.float64)


@dataclass
class Settings:
    """Run the first program with every library that is here."""

    programs: tuple[str, ...] = tuple(PACKAGES)
    """Names of files in benchmarks/lines, without ".py"; "first_loop" is ours."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One run of each program for each; runs that are in the file are not done again."""
    table: Path = Path("docs/results/peers.csv")
    """Where the runs go."""


def library(program: str) -> str:
    """Its name and version; a package that pip did not install has none."""
    if program not in PACKAGES:
        return program.removeprefix("with_")
    return f"{PACKAGES[program]} {importlib.metadata.version(PACKAGES[program]).split('+')[0]}"


def accuracy(path: Path, seed: int) -> float:
    """That which the program prints, in a process and a folder of its own."""
    text = path.read_text()
    assert text.count("manual_seed(0)") == 1
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, path.name)
        file.write_text(text.replace("manual_seed(0)", f"manual_seed({seed})"))
        done = subprocess.run(
            [sys.executable, "-W", "ignore", file], capture_output=True, text=True, cwd=folder
        )
    found = re.search(r"test accuracy ([\d.]+)", done.stdout)
    if done.returncode or not found:
        raise SystemExit(f"{path.name} ended with {done.returncode}:\n{done.stderr}")
    return float(found[1])


def inner_loss(w: Tensor, phi: Tensor) -> Tensor:
    return w @ A @ w / 2 - phi @ w


def outer_loss(w: Tensor) -> Tensor:
    return (w - T).square().sum() / 2


def ours(w: Tensor, phi: Tensor) -> Tensor:
    sgd = torch.optim.SGD([w], lr=0.0)
    bilevel = BilevelOptimizer(sgd, torch.optim.SGD([phi], lr=0.0), CG(3))
    bilevel.inner_step(lambda: inner_loss(w, phi))
    return bilevel.hypergradient(outer_loss(w))[0]


def betty(w: Tensor, phi: Tensor) -> Tensor:
    from betty.hypergradient.cg import cg

    config = SimpleNamespace(cg_iterations=3, cg_alpha=1.0)
    inner = SimpleNamespace(
        paths=[],
        config=config,
        cur_batch=None,
        training_step_exec=lambda batch: inner_loss(w, phi),
        parameters=lambda: [w],
        trainable_parameters=lambda: [w],
    )
    outer = SimpleNamespace(trainable_parameters=lambda: [phi])
    return cg([(w - T).detach()], inner, outer, sync=False)[0]


def boat(w: Tensor, phi: Tensor) -> Tensor:
    from boat_torch.utils.op_utils import conjugate_gradient

    def step(params: list[Tensor], loss: Tensor) -> list[Tensor]:
        (slope,) = torch.autograd.grad(loss, params, create_graph=True)
        return [params[0] - 0.1 * slope]

    return conjugate_gradient([w], [phi], outer_loss(w), inner_loss(w, phi), 3, step)[0]


def hypergrad(w: Tensor, phi: Tensor) -> Tensor:
    from hypergrad.approx_hypergrad import conjugate_gradient

    return conjugate_gradient(
        lambda i, o: inner_loss(i[0], o[0]),
        lambda i, o: outer_loss(i[0]) + 0 * o[0].sum(),
        (w.detach(),),
        (phi.detach(),),
        num_iters=3,
        lr=1.0,
    )[0]


def hypertorch(w: Tensor, phi: Tensor) -> Tensor:
    from hypergrad.hypergradients import CG as conjugate_gradient

    def step(params: list[Tensor], hparams: list[Tensor]) -> list[Tensor]:
        loss = inner_loss(params[0], hparams[0])
        (slope,) = torch.autograd.grad(loss, params, create_graph=True)
        return [params[0] - 0.1 * slope]

    return conjugate_gradient([w], [phi], 3, step, lambda p, h: outer_loss(p[0]))[0]


def torchopt(w: Tensor, phi: Tensor) -> Tensor:
    from torchopt.linear_solve import solve_cg

    return solve_cg(maxiter=3)(lambda x: A @ x, (w - T).detach())


SOLVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "hyperopt_torch": ours,
    "betty": betty,
    "boat": boat,
    "hypergrad": hypergrad,
    "hypertorch": hypertorch,
    "torchopt": torchopt,
}


def solve_errors() -> list[str]:
    """A line for each library that is here."""
    exact, lines = torch.linalg.solve(A, W - T), []
    for name, solve in SOLVES.items():
        w, phi = W.clone().requires_grad_(), torch.zeros(3, dtype=A.dtype, requires_grad=True)
        try:
            found = solve(w, phi)
        except ImportError:
            continue
        error = float((found.detach() - exact).norm() / exact.norm())
        lines.append(f"three steps of conjugate gradients, {name:15} relative error {error:.0e}")
    return lines


def main(s: Settings) -> None:
    rows: list[dict[str, Any]] = []
    if s.table.exists():
        with open(s.table, newline="") as file:
            rows = list(csv.DictReader(file))
    paths = {p.stem: p for p in (PLAIN, OURS, *PEERS)}
    done = {(row["program"], row["seed"]) for row in rows}
    todo = [
        (name, seed) for name in s.programs for seed in s.seeds if (name, str(seed)) not in done
    ]
    for program, seed in tqdm(todo, unit="run"):
        found = accuracy(paths[program], seed)
        rows.append(dict(zip(FIELDS, (program, library(program), seed, found), strict=True)))
        with open(s.table, "w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    print("\n".join(solve_errors()))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
