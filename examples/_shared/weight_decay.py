"""What examples/weight_decay.py compares, and its tables and figure."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from hyperopt_torch import CG, IHVP, DenseSolve, Identity, Neumann, Nystrom

from .output import print_table, save_figure

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
class Run:
    loss: np.ndarray  # (outer_steps + 1,) validation loss after n outer steps
    training: np.ndarray  # the same of the inner loss
    quality: dict[str, np.ndarray]  # (outer_steps,) each, see `inspect` in the example


def final_loss(runs: Sequence[Run]) -> float:
    return float(mean_loss(runs)[-1])


def mean_loss(runs: Sequence[Run]) -> np.ndarray:
    return np.mean([r.loss for r in runs], axis=0)


def mean_quality(runs: Sequence[Run], name: str) -> np.ndarray:
    return np.mean([r.quality[name] for r in runs], axis=0)


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    return float(np.corrcoef(np.argsort(np.argsort(a)), np.argsort(np.argsort(b)))[0, 1])


def print_shared(shared: dict[str, list[Run]], outer_lr: float) -> None:
    some = next(iter(shared.values()))
    outer_steps = len(some[0].loss) - 1
    first = {name: {m: mean_quality(r, name)[0] for m, r in shared.items()} for name in NUMBERS}
    shown = sorted({round(n) for n in np.linspace(0, outer_steps, 4)})
    rows = []
    for m in sorted(shared, key=lambda m: first["length"][m]):
        numbers = [f"{first[name][m]:{form}}" for name, (_, form) in NUMBERS.items()]
        rows.append([m, *numbers, *(f"{mean_loss(shared[m])[n]:.3f}" for n in shown)])
    print(f"\nOuter learning rate {outer_lr:g}, mean over {len(some)} seeds:")
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
    shared: dict[str, list[Run]], tuned: dict[str, tuple[float, list[Run]]], path: Path
) -> None:
    figure, axes = plt.subplots(5, 2, figsize=(8.8, 15), layout="constrained")
    handles = {}

    def curve(axis: Any, m: str, values: np.ndarray, label: str | None = None) -> None:
        _, colour, dash = METHODS[m]
        (handles[m],) = axis.plot(values, dash, color=colour, label=label, marker=".", ms=4)

    panels = {
        "Figure 2: the methods at one rate": (axes[0, 0], [*DEFAULT, "Identity ×100"]),
        "Figure 3: damping ρ, step size α": (axes[1, 0], [*SWEEP, "CG, l=5"]),
        "Figure 4: rank k, number of terms l": (axes[1, 1], RANKS),
    }
    for title, (axis, methods) in panels.items():
        axis.set(title=title, xlabel="outer steps", ylabel="validation loss")
        for m in methods:
            curve(axis, m, mean_loss(shared[m]))
    for m in [*DEFAULT, "Identity ×100"]:
        curve(axes[0, 1], m, np.mean([run.training for run in shared[m]], axis=0))
    axes[0, 1].set(title="Figure 2: the inner loss", xlabel="outer steps", ylabel="inner loss")
    for m, (rate, runs) in tuned.items():
        curve(axes[2, 0], m, mean_loss(runs), f"{rate:.4g}: {m}")
    title = "Learning rates tuned for each method"
    axes[2, 0].set(title=title, xlabel="outer steps", ylabel="validation loss")
    axes[2, 0].legend(fontsize=7)
    axes[2, 1].set_axis_off()
    for m in [*TUNED, "Identity ×100"]:
        curve(axes[3, 0], m, mean_quality(shared[m], "hypergradient length"))
        curve(axes[3, 1], m, mean_quality(shared[m], "hypergradient cosine"))
    axes[3, 0].set(title="Length of the hypergradient / exact", ylabel="ratio", yscale="log")
    axes[3, 1].set(title="Cosine with the exact hypergradient", ylabel="cosine")
    for axis in axes[3]:
        axis.set(xlabel="outer steps, each method along its own run")
    for m, runs in shared.items():
        _, colour, dash = METHODS[m]
        face = {"-": colour, "--": "white", ":": "none"}[dash]
        for axis, name in ((axes[4, 0], "length"), (axes[4, 1], "cosine")):
            point = mean_quality(runs, name)[0], final_loss(runs)
            axis.plot(*point, "o", color=colour, markerfacecolor=face)
    axes[4, 0].set(
        title="Final loss against length", xlabel="‖v‖/‖v*‖ at the first outer step", xscale="log"
    )
    axes[4, 1].set(
        title="Final loss against direction", xlabel="cos(v, v*) at the first outer step"
    )
    for axis in axes[4]:
        axis.set(ylabel="final validation loss")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    order = [m for m in METHODS if m in handles]
    figure.legend(
        [handles[m] for m in order], order, loc="outside lower center", ncols=4, fontsize=8
    )
    save_figure(figure, path)
