"""One weight-decay coefficient per parameter: Hataya & Yamada 2023, section 5.1, figures 2 to 4.

Logistic regression in 100 dimensions, 500 training and 500 validation points. The inner loss is the
mean cross-entropy plus ½ Σ φᵢ θᵢ²; 100 steps of gradient descent from zero approach its minimum.
Then comes one outer step on the decay coefficients φ, and θ starts from zero again, nine times.

Read the figures with care: at a shared outer learning rate the ordering of the methods follows the
length ‖v‖ of what they put in place of v* = H⁻¹b, not its accuracy. With φ = 1 the Hessian is close
to the identity and of full rank, so Nyström of rank 5 with ρ = .01 multiplies nearly all of b by
1/ρ = 100. That acts like a larger learning rate; v = 100·b, which uses no Hessian, does the same.
Therefore this script also prints and plots the length and the direction of each hypergradient
against the exact one at the same point, and the comparison at learning rates tuned for each method.
"Exact" means the exact solve: where the inner steps have not converged, it is not the exact
derivative of the run.

    python examples/weight_decay.py
"""

from __future__ import annotations

import dataclasses
from concurrent.futures import Executor, ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import tyro
from _shared.weight_decay import METHODS, TUNED, Run, final_loss, plot, print_shared, print_tuned
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from hyperopt_torch import BilevelOptimizer, DenseSolve


@dataclasses.dataclass(frozen=True)
class Settings:
    """The protocol of the paper. A quick look: --seeds 0 --outer-steps 2."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """One data set each; outer learning rates are tuned on the same ones."""
    outer_steps: int = 9
    inner_steps: int = 100
    inner_lr: float = 0.1
    outer_lr: float = 1.0
    """The shared rate. Tuning starts here."""
    max_decay: float = 15.0
    """Upper clamp of φ. Gradient descent with rate 0.1 diverges where the curvature passes 20. At
    the default shared rate no run reaches the clamp; inf takes it away."""
    dim: int = 100
    points: int = 500
    workers: int = 2
    """Processes, which share the seeds."""
    out: Path = Path("results/weight_decay.png")
    """Where the figure goes."""


def make_data(seed: int, settings: Settings) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    n = settings.points
    w = rng.standard_normal(settings.dim)
    x = rng.standard_normal((2 * n, settings.dim))
    y = (x @ w + 0.1 * rng.standard_normal(2 * n) > 0).astype(float)
    inputs, labels = torch.from_numpy(x), torch.from_numpy(y)
    return inputs[:n], labels[:n], inputs[n:], labels[n:]


def run(method: str, seed: int, outer_lr: float, settings: Settings, watch: bool = True) -> Run:
    """One bilevel run; if watched, with the exact hypergradient beside it, at the same points."""
    torch.manual_seed(seed)  # a strategy takes its seed from here when it is made
    x, y, x_val, y_val = make_data(seed, settings)
    theta = torch.zeros(settings.dim, dtype=x.dtype, requires_grad=True)
    phi = torch.ones(settings.dim, dtype=x.dtype, requires_grad=True)

    def train_loss() -> Tensor:
        return F.binary_cross_entropy_with_logits(x @ theta, y) + phi @ theta**2 / 2

    inner = torch.optim.SGD([theta], lr=settings.inner_lr)
    outer = torch.optim.SGD([phi], lr=outer_lr, momentum=0.9)
    optimizer = BilevelOptimizer(inner, outer, ihvp=METHODS[method][0]())  # bilevel
    oracle = BilevelOptimizer(inner, outer, ihvp=DenseSolve())  # bilevel: asked, never stepped
    losses, training = np.full((2, settings.outer_steps + 1), np.inf)
    quality = []
    for step in range(settings.outer_steps + 1):
        for _ in range(settings.inner_steps):
            optimizer.inner_step(train_loss)  # bilevel
        val_loss = F.binary_cross_entropy_with_logits(x_val @ theta, y_val)
        if not val_loss < 10:  # diverged: the losses from here on stay inf
            break
        losses[step], training[step] = val_loss.item(), train_loss().item()
        if step == settings.outer_steps:
            break
        exact = oracle.hypergradient(val_loss, train_loss)[0] if watch else None  # bilevel: pure
        optimizer.outer_step(val_loss)  # bilevel: leaves its hypergradient in phi.grad
        quality.append(inspect(optimizer, phi.grad, exact, theta.detach()))
        with torch.no_grad():
            phi.clamp_(1e-8, settings.max_decay)
            theta.zero_()
    quality += [dict.fromkeys(quality[0], np.nan)] * (settings.outer_steps - len(quality))
    named = {name: np.array([q[name] for q in quality]) for name in quality[0]}
    return Run(losses, training, named)


def inspect(
    optimizer: BilevelOptimizer, found: Tensor | None, exact: Tensor | None, theta: Tensor
) -> dict[str, float]:
    """The report, and how far a hypergradient and the v in it are from the exact ones."""
    report = optimizer.report
    numbers = {
        "products": float(report.matvecs),
        "residual": float("nan" if report.residual is None else report.residual),
        "inner gradient": float(
            "nan" if report.inner_gradient_norm is None else report.inner_gradient_norm
        ),
    }
    if found is None or exact is None:
        return numbers
    v, v_exact = -found / theta, -exact / theta  # a hypergradient is -Jᵀv here, J = diag(θ)
    return numbers | {
        "error": float((v - v_exact).norm() / v_exact.norm()),
        "length": float(v.norm() / v_exact.norm()),
        "cosine": float(F.cosine_similarity(v, v_exact, dim=0)),
        "hypergradient length": float(found.norm() / exact.norm()),
        "hypergradient cosine": float(F.cosine_similarity(found, exact, dim=0)),
    }


def all_seeds(
    pool: Executor, method: str, outer_lr: float, settings: Settings, watch: bool = True
) -> list[Run]:
    arguments = (repeat(a) for a in (outer_lr, settings, watch))
    return list(pool.map(run, repeat(method), settings.seeds, *arguments))


def tune(
    pool: Executor, method: str, start: list[Run], settings: Settings
) -> tuple[float, list[Run]]:
    """The outer learning rate with the lowest mean final validation loss, and the runs at it.

    Walks away from the shared rate in factors of 3, up or else down, as long as that loss falls.
    One diverged run makes it inf; where the shared rate diverges, the walk starts further down.
    """
    rate, best = settings.outer_lr, start
    while not np.isfinite(final_loss(best)):
        rate /= 3
        best = all_seeds(pool, method, rate, settings, watch=False)
    first = rate
    for factor in (3.0, 1 / 3):
        while rate == first or (rate > first) == (factor > 1):
            runs = all_seeds(pool, method, rate * factor, settings, watch=False)
            if not final_loss(runs) < final_loss(best):
                break
            rate, best = rate * factor, runs
    return rate, best


def main(settings: Settings) -> None:
    # Vectors of 100 entries: more threads would cost more than they save.
    pool = ProcessPoolExecutor(
        settings.workers, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    )
    with pool:
        shared = {
            m: all_seeds(pool, m, settings.outer_lr, settings)
            for m in tqdm(METHODS, desc="shared rate")
        }
        tuned = {m: tune(pool, m, shared[m], settings) for m in tqdm(TUNED, desc="tuned rates")}
    print_shared(shared, settings.outer_lr)
    print_tuned(tuned, shared)
    plot(shared, tuned, settings.out)


if __name__ == "__main__":
    main(tyro.cli(Settings))
