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
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro
from _shared.output import print_table, save_figure
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from hyperopt_torch import CG, IHVP, BilevelOptimizer, DenseSolve, Identity, Neumann, Nystrom

METHODS: dict[str, tuple[Callable[[], IHVP], str, str]] = {  # strategy, colour, line
    "exact": (DenseSolve, "black", ":"),
    "CG, l=5": (lambda: CG(5), "tab:green", "--"),
    "Identity": (lambda: Identity(1.0), "tab:gray", "-"),
    "Identity ×100": (lambda: Identity(100.0), "tab:gray", "--"),
    "Neumann, l=5, α=1": (lambda: Neumann(5, scale=1.0), "navy", "-"),
    "Neumann, l=5, α=.1": (lambda: Neumann(5, scale=0.1), "royalblue", "-"),
    "Neumann, l=5, α=.01": (lambda: Neumann(5, scale=0.01), "deepskyblue", "-"),
    "Neumann, l=10, α=.01": (lambda: Neumann(10, scale=0.01), "deepskyblue", "--"),
    "Neumann, l=20, α=.01": (lambda: Neumann(20, scale=0.01), "deepskyblue", ":"),
    "Nyström, k=5, ρ=1": (lambda: Nystrom(5, 1.0), "goldenrod", "-"),
    "Nyström, k=5, ρ=.1": (lambda: Nystrom(5, 0.1), "darkorange", "-"),
    "Nyström, k=5, ρ=.01": (lambda: Nystrom(5, 0.01), "red", "-"),
    "Nyström, k=10, ρ=.01": (lambda: Nystrom(10, 0.01), "red", "--"),
    "Nyström, k=20, ρ=.01": (lambda: Nystrom(20, 0.01), "red", ":"),
}
SWEEP = [m for m in METHODS if "l=5, α" in m or "k=5, ρ" in m]
DEFAULT = ["exact", "CG, l=5", "Identity", "Neumann, l=5, α=.01", "Nyström, k=5, ρ=.01"]
RANKS = [m for m in METHODS if "α=.01" in m or "ρ=.01" in m]
TUNED = [*DEFAULT[:3], *SWEEP]  # Identity ×100 is Identity at another rate

NUMBERS = {  # of the first outer step: title in the table, format
    "products": ("products", ".0f"),
    "residual": ("residual", ".3g"),
    "error": ("error of v", ".3g"),
    "length": ("‖v‖/‖v*‖", ".3g"),
    "cosine": ("cos(v, v*)", ".3f"),
}


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


@dataclasses.dataclass(frozen=True)
class Run:
    loss: np.ndarray  # (outer_steps + 1,) validation loss after n outer steps
    quality: dict[str, np.ndarray]  # (outer_steps,) each, see `inspect`


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
    losses = np.full(settings.outer_steps + 1, np.inf)
    quality = []
    for step in range(settings.outer_steps + 1):
        for _ in range(settings.inner_steps):
            optimizer.inner_step(train_loss)  # bilevel
        val_loss = F.binary_cross_entropy_with_logits(x_val @ theta, y_val)
        if not val_loss < 10:  # diverged: the losses from here on stay inf
            break
        losses[step] = val_loss.item()
        if step == settings.outer_steps:
            break
        exact = oracle.hypergradient(val_loss, train_loss)[0] if watch else None  # bilevel: pure
        optimizer.outer_step(val_loss)  # bilevel: leaves its hypergradient in phi.grad
        quality.append(inspect(optimizer, phi.grad, exact, theta.detach()))
        with torch.no_grad():
            phi.clamp_(1e-8, settings.max_decay)
            theta.zero_()
    quality += [dict.fromkeys(quality[0], np.nan)] * (settings.outer_steps - len(quality))
    return Run(losses, {name: np.array([q[name] for q in quality]) for name in quality[0]})


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


def final_loss(runs: Sequence[Run]) -> float:
    return float(mean_loss(runs)[-1])


def mean_loss(runs: Sequence[Run]) -> np.ndarray:
    return np.mean([r.loss for r in runs], axis=0)


def mean_quality(runs: Sequence[Run], name: str) -> np.ndarray:
    return np.mean([r.quality[name] for r in runs], axis=0)


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    return float(np.corrcoef(np.argsort(np.argsort(a)), np.argsort(np.argsort(b)))[0, 1])


def print_shared(shared: dict[str, list[Run]], settings: Settings) -> None:
    first = {name: {m: mean_quality(r, name)[0] for m, r in shared.items()} for name in NUMBERS}
    shown = sorted({round(n) for n in np.linspace(0, settings.outer_steps, 4)})
    rows = []
    for m in sorted(shared, key=lambda m: first["length"][m]):
        numbers = [f"{first[name][m]:{form}}" for name, (_, form) in NUMBERS.items()]
        rows.append([m, *numbers, *(f"{mean_loss(shared[m])[n]:.3f}" for n in shown)])
    print(f"\nOuter learning rate {settings.outer_lr:g}, mean over {len(settings.seeds)} seeds:")
    print("v at the first outer step, and the validation loss after n outer steps.\n")
    header = ["method", *(title for title, _ in NUMBERS.values())]
    print_table([*header, *(f"loss, n={n}" for n in shown)], rows)
    final = [final_loss(runs) for runs in shared.values()]
    length, error, cosine = (
        rank_correlation(final, list(first[name].values()))
        for name in ("length", "error", "cosine")
    )
    if length < -0.9 and error < 0 < cosine:
        print("\nAt a shared outer learning rate the ordering follows ‖v‖, not accuracy.")
    else:
        print("\nIn this setting the ordering does not simply follow ‖v‖.")
    print(
        f"Rank correlation of the final loss with ‖v‖: {length:.3f}; with the error of v:", end=" "
    )
    print(
        f"{error:.3f};\nwith its cosine: {cosine:.3f}. If accuracy decided: 1 and -1 for these two."
    )


def print_tuned(tuned: dict[str, tuple[float, list[Run]]], shared: dict[str, list[Run]]) -> None:
    rows = []
    for m, (rate, runs) in sorted(tuned.items(), key=lambda item: final_loss(item[1][1])):
        step = rate * mean_quality(shared[m], "length")[0]
        pairs = zip(runs, tuned["exact"][1], strict=True)
        gap = [run.loss[-1] - exact.loss[-1] for run, exact in pairs]  # on the same data
        gradient = mean_quality(runs, "inner gradient")
        numbers = [f"{rate:.4g}", f"{step:.3g}", f"{final_loss(runs):.3f}"]
        numbers += [f"{np.mean(gap):+.3f} ± {np.std(gap):.3f}"]
        rows.append([m, *numbers, f"{gradient[0]:.1e}", f"{gradient[-1]:.1e}"])
    print("\nOuter learning rate tuned for each method: factors of 3, lowest mean final loss.\n")
    header = ["method", "rate", "rate·‖v‖/‖v*‖", "final loss", "minus that of exact, ± sd"]
    print_table([*header, "‖∇f‖ first", "‖∇f‖ last"], rows)
    final = [final_loss(runs) for runs in shared.values()]
    tuned_final = [final_loss(runs) for _, runs in tuned.values()]
    print(f"\nFinal losses at the shared rate: {min(final):.3f} to {max(final):.3f};", end=" ")
    print(f"at tuned rates: {min(tuned_final):.3f} to {max(tuned_final):.3f}.")


def plot(
    shared: dict[str, list[Run]], tuned: dict[str, tuple[float, list[Run]]], settings: Settings
) -> None:
    figure, axes = plt.subplots(4, 2, figsize=(8.8, 12), layout="constrained")
    handles = {}

    def curve(axis: Any, m: str, values: np.ndarray, label: str | None = None) -> None:
        _, colour, dash = METHODS[m]
        (handles[m],) = axis.plot(values, dash, color=colour, label=label, marker=".", ms=4)

    panels = {
        "Figure 2: the methods at one rate": (axes[0, 0], [*DEFAULT, "Identity ×100"]),
        "Figure 3: damping ρ, step size α": (axes[0, 1], SWEEP),
        "Figure 4: rank k, number of terms l": (axes[1, 0], RANKS),
    }
    for title, (axis, methods) in panels.items():
        axis.set(title=title, xlabel="outer steps", ylabel="validation loss")
        for m in methods:
            curve(axis, m, mean_loss(shared[m]))
    for m, (rate, runs) in tuned.items():
        curve(axes[1, 1], m, mean_loss(runs), f"{rate:.4g}: {m}")
    title = "Learning rates tuned for each method"
    axes[1, 1].set(title=title, xlabel="outer steps", ylabel="validation loss")
    axes[1, 1].legend(fontsize=7)
    for m in [*TUNED, "Identity ×100"]:
        curve(axes[2, 0], m, mean_quality(shared[m], "hypergradient length"))
        curve(axes[2, 1], m, mean_quality(shared[m], "hypergradient cosine"))
    axes[2, 0].set(title="Length of the hypergradient / exact", ylabel="ratio", yscale="log")
    axes[2, 1].set(title="Cosine with the exact hypergradient", ylabel="cosine")
    for axis in axes[2]:
        axis.set(xlabel="outer steps, each method along its own run")
    for m, runs in shared.items():
        _, colour, dash = METHODS[m]
        face = {"-": colour, "--": "white", ":": "none"}[dash]
        for axis, name in ((axes[3, 0], "length"), (axes[3, 1], "cosine")):
            point = mean_quality(runs, name)[0], final_loss(runs)
            axis.plot(*point, "o", color=colour, markerfacecolor=face)
    axes[3, 0].set(
        title="Final loss against length", xlabel="‖v‖/‖v*‖ at the first outer step", xscale="log"
    )
    axes[3, 1].set(
        title="Final loss against direction", xlabel="cos(v, v*) at the first outer step"
    )
    for axis in axes[3]:
        axis.set(ylabel="final validation loss")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    order = [m for m in METHODS if m in handles]
    figure.legend(
        [handles[m] for m in order], order, loc="outside lower center", ncols=4, fontsize=8
    )
    save_figure(figure, settings.out)


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
    print_shared(shared, settings)
    print_tuned(tuned, shared)
    plot(shared, tuned, settings)


if __name__ == "__main__":
    main(tyro.cli(Settings))
