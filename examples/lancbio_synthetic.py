"""The synthetic problem of LancBiO, with the methods of its paper and others.

    python examples/lancbio_synthetic.py
    python examples/lancbio_synthetic.py --seeds 0 1 2 --size 2000 --steps 300
    python examples/lancbio_synthetic.py --outer-lr 0.3
    python examples/lancbio_synthetic.py --paper

Yang, Gao & Yuan, ICLR 2025; x and y of length n, the eigenvalues of G from 1 to 1e5:

    inner  g = ½ Σ sin(x + y) + log Σ exp(xy) + ½ yᵀ(D₃ + G)y      steps of 1e-5 on y, five each
    outer  f = .1 cos(xᵀD₁y) + ½‖D₂x - y‖²                         steps of 1 on x

y is never far from its optimum and v has to be found in an ill-conditioned system that hardly
moves: the problem asks how much a solver keeps from one outer step to the next. Published is an
ordering: LancBiO lowest in the residual ‖Av - b‖ and in the hypergradient's norm. The norm that is
shown is that of the true hypergradient, by a dense solve: a wrong one may be small by mistake.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from math import log10
from pathlib import Path
from typing import Any

import torch
import tyro
from _shared.runlog import RunLog
from _shared.single_loop import METHODS, Method, Scale, run
from torch import Tensor, nn

GAMMA = 0.5


@dataclass(frozen=True)
class Settings:
    """The synthetic problem of LancBiO. A quick look: --steps 5 --size 60."""

    methods: tuple[Method, ...] = METHODS
    """How the linear system is solved; "soba" is the method, "cg-warm-1" one warm CG step."""
    seeds: tuple[int, ...] = (0,)
    """One problem and one start for each."""
    size: int = 500
    """n, the length of x and of y."""
    steps: int = 1000
    """Outer steps; three times as many for "soba" and "ttsa", with one inner step each."""
    outer_lr: float = 1.0
    """Of SGD on x; 1 as published, where some starts oscillate whatever the solver."""
    paper: bool = False
    """n = 10^4, 10^4 steps, ten seeds. Untried: G takes 800 MB."""
    resume: bool = False
    """Go on where a stopped command was; what is in the table of --out is not done again."""
    threads: int = 1
    """CPU threads."""
    out: Path = Path("results")
    """Folder of the figure and the tables."""


class Synthetic(nn.Module):
    inner_lr = 1e-5  # θ_y; also 1 / λ_max
    noisy = False
    scale = Scale(
        subspace=80,
        growth=(1.1, 20),
        step=1e-5,
        subbio=1e-5,
        damping=1.0,
        rates={"ttsa": 3.0, "bsa": 1.0, "f2sa": 3.0},  # from seed 100 at n = 200
        penalty=0.01,
    )

    def __init__(self, n: int, seed: int, outer_lr: float = 1.0) -> None:
        super().__init__()
        self.outer_lr = outer_lr
        wide: dict[str, Any] = {
            "dtype": torch.float64,
            "generator": torch.Generator().manual_seed(seed),
        }
        self.D1 = 10 * (torch.rand(n, **wide) - 0.5)
        self.D2 = torch.rand(n, **wide) + 0.1
        Q = torch.linalg.qr(torch.randn(n, n, **wide))[0]
        self.G = (Q * torch.linspace(1, 1e5, n, dtype=torch.float64)) @ Q.T
        self.G += (GAMMA * torch.rand(n, **wide)).diag()  # D3
        self.inner = nn.Parameter(torch.randn(n, **wide))  # y
        self.outer = nn.Parameter(torch.randn(n, **wide))  # x

    def draw(self) -> None:
        """There are no batches."""

    def train_loss(self) -> Tensor:
        x, y = self.outer, self.inner
        return GAMMA * (x + y).sin().sum() + (x * y).logsumexp(0) + 0.5 * y @ (self.G @ y)

    def val_loss(self) -> Tensor:
        x, y = self.outer, self.inner
        return 0.1 * (x @ (self.D1 * y)).cos() + 0.5 * (self.D2 * x - y).square().sum()

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.outer], lr=self.outer_lr)

    def hessian(self) -> Tensor:
        """(n, n) ∂²g/∂y²."""
        x, y = self.outer.detach(), self.inner.detach()
        p = (x * y).softmax(0)
        curved = (p * x * x - GAMMA * (x + y).sin()).diag()
        return self.G + curved - torch.outer(p * x, p * x)

    def hypergradient(self) -> Tensor:
        """(n,) ∂f/∂x - Jᵀ A⁻¹ ∂f/∂y, the system solved densely."""
        b, direct = torch.autograd.grad(self.val_loss(), (self.inner, self.outer))
        v = torch.linalg.solve(self.hessian(), b)
        (g,) = torch.autograd.grad(self.train_loss(), self.inner, create_graph=True)
        return direct - torch.autograd.grad(g @ v, self.outer)[0]


def measure(problem: Synthetic) -> dict[str, float]:
    norm = problem.hypergradient().norm().item()
    return {"hypergradient_norm": norm, "hypergradient_log10": log10(norm)}


def draw(s: Settings, log: RunLog) -> None:
    title = f"n = {s.size}, outer rate {s.outer_lr:g}"
    labels = {"residual": "||Av - b||", "hypergradient_norm": "true hypergradient's norm"}
    log.draw("lancbio_synthetic", labels, title, size=s.size, outer_lr=s.outer_lr)


def main(s: Settings) -> None:
    torch.set_num_threads(s.threads)
    if s.paper:
        s = dataclasses.replace(s, size=10_000, steps=10_000, seeds=tuple(range(10)))
    log = RunLog(s.out, "lancbio_synthetic", s.resume)
    for seed in s.seeds:
        for method in s.methods:
            factors = {"method": method, "size": s.size, "seed": seed, "steps": s.steps}
            factors |= {"outer_lr": s.outer_lr}
            if log.has(factors):
                continue
            torch.manual_seed(seed)  # strategies take their seed here
            problem = Synthetic(s.size, seed, s.outer_lr)
            cost, curve = run(problem, method, s.steps, partial(measure, problem))
            log.add(factors, cost | measure(problem), curve)
    columns = {
        "true hypergradient": ("hypergradient_norm", ".2e"),
        "log10 of it": ("hypergradient_log10", ".2f"),
        "||Av - b||": ("residual", ".2e"),
        "median ||Av - b||": ("residual_median", ".2e"),
        "products": ("products", ".0f"),
        "CPU s": ("cpu_s", ".1f"),
    }
    log.show(("size", "outer_lr", "method"), columns)
    draw(s, log)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
