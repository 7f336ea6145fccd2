"""What figure 2 of Hataya & Yamada (AISTATS 2023) compares: two defects, and the length of v.

    python examples/cg_defects.py

One weight decay per parameter of a logistic regression, as in weight_decay.py: 100 inner steps, one
outer step at a shared rate of 1, nine times. The conjugate gradients of that comparison are those
of betty 0.1.1, and not conjugate gradients: the new direction is made of the OLD residual, and the
residual's update lacks the factor α that the step has. ``BettyCG`` has both, one, or none of them.

At the first outer step v is compared with v* = A⁻¹b: error, length and cosine. At a shared outer
rate the loss after nine steps follows the length. v = 100 b, which knows nothing of the Hessian, is
there to show it, and so is the undamaged solution times 100.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import tyro
from _shared.betty import BettyCG
from _shared.output import save_figure
from _shared.runlog import Row, RunLog
from torch import Tensor
from tqdm import tqdm

from hyperopt_torch import CG, IHVP, BilevelOptimizer, DenseSolve, Identity, Neumann, Nystrom
from hyperopt_torch.operators import LinearOperator


class Lengthened(DenseSolve):
    """A hundred times the exact solution."""

    def solve(self, operator: LinearOperator, rhs: Tensor) -> Tensor:
        found = super().solve(operator, rhs)
        return 100 * (found if isinstance(found, Tensor) else found.x)


METHODS: dict[str, Callable[[], IHVP]] = {
    "exact": DenseSolve,
    "CG, l=5": lambda: CG(5),
    "betty's CG, α=.01": lambda: BettyCG(0.01),
    "betty's CG, α=.1": lambda: BettyCG(0.1),
    "betty's CG, α=1": lambda: BettyCG(1.0),
    "α=.01, right direction": lambda: BettyCG(0.01, old_residual=False),
    "α=.01, right residual": lambda: BettyCG(0.01, long_residual=False),
    "α=.01, both mended": lambda: BettyCG(0.01, old_residual=False, long_residual=False),
    "Nyström, k=5, ρ=.01": lambda: Nystrom(5, 0.01),
    "Nyström, k=5, ρ=1": lambda: Nystrom(5, 1.0),
    "Neumann, l=5, α=.01": lambda: Neumann(5, scale=0.01),
    "Neumann, l=5, α=1": lambda: Neumann(5, scale=1.0),
    "identity ×1": lambda: Identity(1.0),
    "identity ×100": lambda: Identity(100.0),
    "exact ×100": Lengthened,
    "none": lambda: Identity(1.0),  # φ stays
}


@dataclass(frozen=True)
class Settings:
    """What the published comparison compares. A quick look: --seeds 0 --outer-steps 2."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """One data set each."""
    outer_steps: int = 9
    inner_steps: int = 100
    outer_lr: float = 1.0
    """Shared, as published."""
    max_decay: float = 15.0
    """Upper clamp of φ: gradient descent of rate .1 diverges where the curvature passes 20."""
    resume: bool = False
    """Go on where a stopped command was; what is in the table of --out is not done again."""
    out: Path = Path("results")
    """Folder of the figure and the tables."""


def train(method: str, seed: int, s: Settings) -> tuple[Row, list[Row]]:
    """The published protocol: D = 100, 500 + 500 points, labels by a noisy linear rule."""
    g = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # a strategy takes its seed from here
    truth = torch.randn(100, generator=g, dtype=torch.float64)
    x = torch.randn(1000, 100, generator=g, dtype=torch.float64)
    noise = 0.1 * torch.randn(1000, generator=g, dtype=torch.float64)
    y = (x @ truth + noise > 0).double()
    theta = torch.zeros(100, dtype=torch.float64, requires_grad=True)
    phi = torch.ones(100, dtype=torch.float64, requires_grad=True)

    def train_loss() -> Tensor:
        loss = F.binary_cross_entropy_with_logits(x[:500] @ theta, y[:500])
        return loss + phi @ theta**2 / 2

    # The bilevel lines: wrap both optimizers, then inner_step and outer_step.
    inner = torch.optim.SGD([theta], lr=0.1)
    outer = torch.optim.SGD([phi], lr=s.outer_lr, momentum=0.9)
    optimizer = BilevelOptimizer(inner, outer, ihvp=METHODS[method](), on_trouble="ignore")
    oracle = BilevelOptimizer(inner, outer, ihvp=DenseSolve())
    results: Row = {"products": 0}
    curve, began = [], time.process_time()
    for step in range(s.outer_steps + 1):
        for _ in range(s.inner_steps):
            optimizer.inner_step(train_loss)
        val_loss = F.binary_cross_entropy_with_logits(x[500:] @ theta, y[500:])
        curve.append({"step": step, "val_loss": val_loss.item()})
        if step == s.outer_steps or not val_loss < 10:
            break
        if step == 0:  # a hypergradient is -Jᵀv here, J = diag(θ)
            (best,) = oracle.hypergradient(val_loss, train_loss)
            (found,) = optimizer.hypergradient(val_loss, train_loss)
            v, exact = -found / theta.detach(), -best / theta.detach()
            results["error"] = float((v - exact).norm() / exact.norm())
            results["length"] = float(v.norm() / exact.norm())
            results["cosine"] = float(F.cosine_similarity(v, exact, dim=0))
        if method != "none":
            optimizer.outer_step(val_loss)
            results["products"] += optimizer.report.matvecs
        with torch.no_grad():
            phi.clamp_(1e-8, s.max_decay)
            theta.zero_()
    if method == "none":
        results |= {"error": None, "length": None, "cosine": None}
    end = {"val_loss": curve[-1]["val_loss"], "cpu_s": time.process_time() - began}
    return results | end, curve


def draw(s: Settings, log: RunLog) -> None:
    """The final loss against length and error of v: one point a method, the mean of the seeds."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), sharey=True, layout="constrained")
    colours = plt.get_cmap("tab20").colors
    for i, method in enumerate(m for m in METHODS if m != "none"):
        runs = log.select(method=method)
        x1, x2, y = (
            sum(float(r[c]) for r in runs) / len(runs) for c in ("length", "error", "val_loss")
        )
        # Many points lie on one spot: rings, one within the other.
        ring = {"color": colours[i], "ms": 21 - 1.3 * i, "mfc": "none", "mew": 1.5}
        axes[0].plot(x1, y, "o", **ring)
        axes[1].plot(max(x2, 1e-6), y, "o", **ring, label=method)
    axes[0].set(xscale="log", xlabel="‖v‖ / ‖v*‖ at the first step", ylabel="loss at the end")
    axes[1].set(xscale="log", xlabel="error of v (below 1e-6: at 1e-6)")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    save_figure(figure, s.out / "cg_defects.png")


def main(s: Settings) -> None:
    torch.set_num_threads(1)
    log = RunLog(s.out, "cg_defects", s.resume)
    for seed in tqdm(s.seeds, "seeds"):
        for method in METHODS:
            factors = {"method": method, "seed": seed}
            if not log.has(factors):
                log.add(factors, *train(method, seed, s))
    columns = {
        "error of v": ("error", ".3g"),
        "‖v‖/‖v*‖": ("length", ".3g"),
        "cos(v, v*)": ("cosine", ".3f"),
        "loss after nine steps": ("val_loss", ".3f"),
        "products": ("products", ".0f"),
    }
    log.show(("method",), columns)
    draw(s, log)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
