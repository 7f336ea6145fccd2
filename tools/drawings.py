"""The drawings of the documentation: what a hypergradient is, and who calls whom in the library.

python -m tools.drawings
"""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

ROOT = Path(__file__).parent.parent
FIGURES = ROOT / "docs" / "figures"


def valley(phi: np.ndarray | float) -> np.ndarray | float:
    """θ*(φ) of f = φ(θ - 2)²/2 + θ²/2, which weighs a sample at 2 by φ and one at 0 by 1."""
    return 2 * phi / (1 + phi)


def concepts() -> None:
    """The valley of the inner problem, and the outer loss along it."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    phi, theta = np.meshgrid(np.linspace(0, 4, 200), np.linspace(-0.5, 2.5, 200))
    f = phi * (theta - 2) ** 2 / 2 + theta**2 / 2
    least = phi * (valley(phi) - 2) ** 2 / 2 + valley(phi) ** 2 / 2
    left.contour(phi, theta, f - least, [0.02, 0.1, 0.3, 0.7, 1.4], colors="0.7", linewidths=0.9)
    line = np.linspace(0, 4, 200)
    left.plot(line, valley(line), "C0", lw=2.5, label="θ*(φ): where ∂f/∂θ = 0")
    left.axhline(1.5, color="C2", ls="--", label="θ that g likes best")
    white = {"fc": "white", "ec": "none", "pad": 1}
    arrow = {"arrowstyle": "-|>", "lw": 2}
    left.annotate("", (1.0, 1.0), (1.0, -0.2), arrowprops={**arrow, "color": "C1"})
    left.text(1.08, 0.25, "inner steps", color="C1", bbox=white)
    left.annotate("", (2.1, 1.55), (1.0, 1.0), arrowprops={**arrow, "color": "C3"})
    left.text(1.7, 1.05, "dθ*/dφ = −H⁻¹ ∂²f/∂θ∂φ", color="C3", bbox=white)
    left.plot(1, 1, "ko", zorder=5)
    left.set(
        xlabel="outer parameter φ",
        ylabel="inner parameter θ",
        title="inner loss f above its minimum",
    )
    left.legend(frameon=False, loc="lower right", fontsize=9)

    right.plot(line, (valley(line) - 1.5) ** 2 / 2, "C0", lw=2.5, label="g(θ*(φ))")
    slope, at = -0.25, 0.125  # of g = (θ - 1.5)²/2 at φ = 1, as the page computes it
    near = np.array([0.4, 1.8])
    right.plot(
        near, at + slope * (near - 1), "C3", lw=2, label="its slope at φ = 1: the hypergradient"
    )
    right.plot(1, at, "ko", zorder=5)
    right.set(xlabel="outer parameter φ", ylabel="outer loss", ylim=(-0.1, 1.2))
    right.set_title("outer loss g along the valley")
    right.legend(frameon=False)
    _save(figure, "concepts")


def _box(axis: Axes, x: float, y: float, title: str, text: str, color: str) -> None:
    style = {"boxstyle": "round,pad=0.1", "fc": color, "ec": "0.3"}
    axis.add_patch(matplotlib.patches.FancyBboxPatch((x, y), 2.7, 0.9, **style))
    axis.text(x + 1.35, y + 0.64, title, ha="center", va="center", weight="bold", fontsize=10)
    axis.text(x + 1.35, y + 0.25, text, ha="center", va="center", fontsize=8.5)


def architecture() -> None:
    """The packages, top to bottom; an arrow goes from the caller to the called."""
    figure, axis = plt.subplots(figsize=(10, 6.4))
    top, middle, low = "#d6e6f5", "#e5f2df", "#fbe9d3"
    _box(axis, 3.9, 6, "BilevelOptimizer", "bilevel.py: the loop talks to it", top)
    _box(axis, 0, 4.5, "recording/", "closures, and their world again", top)
    _box(axis, 3.9, 4.5, "estimators/", "from ∂g/∂θ to dg/dφ", middle)
    _box(axis, 7.8, 4.5, "report, health, checking", "what tells trust", top)
    _box(axis, 0, 3, "inner_optimizer/", "its facts; learned rates", middle)
    _box(axis, 3.9, 3, "ihvp/", "(H + ρI)x = b, a file each", middle)
    _box(axis, 7.8, 3, "distributed/", "sums over processes, parts", low)
    _box(axis, 0, 1.5, "curvature/", "what stands for H", middle)
    _box(axis, 3.9, 1.5, "operators", "matrices known by products", low)
    _box(axis, 7.8, 1.5, "functional", "the same, pure", top)
    _box(axis, 3.9, 0, "inner_gradient, _graph", "one graph of ∇f, all products", low)
    for start, end in (
        ((3.8, 6.3), (1.9, 5.5)),  # BilevelOptimizer
        ((5.25, 5.9), (5.25, 5.5)),
        ((6.7, 6.3), (8.6, 5.5)),
        ((3.8, 4.95), (2.8, 4.95)),  # estimators
        ((5.25, 4.4), (5.25, 4.0)),
        ((3.8, 4.7), (2.8, 4.0)),
        ((3.8, 4.5), (2.6, 2.5)),
        ((6.7, 4.6), (7.7, 3.8)),
        ((5.25, 2.9), (5.25, 2.5)),  # ihvp
        ((2.8, 1.95), (3.8, 1.95)),  # curvature
        ((7.7, 3.1), (6.7, 2.35)),  # distributed
        ((7.7, 2.35), (6.7, 3.1)),  # functional
        ((7.7, 1.95), (6.7, 1.95)),
        ((5.25, 1.4), (5.25, 1.0)),  # operators
    ):
        axis.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": "0.3"})
    axis.set(xlim=(-0.2, 10.7), ylim=(-0.2, 7.1))
    axis.set_axis_off()
    _save(figure, "architecture")


def lora() -> None:
    """The learned weights of the two corpora, from docs/results/lora.txt."""
    text = (ROOT / "docs" / "results" / "lora.txt").read_text()
    clean, noise = (
        [float(v) for v in re.findall(rf"weight of {name} +(\S+)", text)]
        for name in ("clean text", "the noise")
    )
    figure, axis = plt.subplots(figsize=(5, 3.2))
    place = np.arange(len(clean))
    for shift, values, label, color in (
        (-0.2, clean, "clean text", "C0"),
        (0.2, noise, "noise", "C3"),
    ):
        axis.bar_label(axis.bar(place + shift, values, 0.4, label=label, color=color), fmt="%.3f")
    axis.set(xticks=place, xlabel="seed", ylabel="learned weight of the corpus", ylim=(0, 1.3))
    axis.legend(frameon=False, ncols=2, loc="upper center")
    _save(figure, "lora_data_weights")


def _save(figure: plt.Figure, name: str) -> None:
    figure.savefig(FIGURES / f"{name}.png", dpi=110, bbox_inches="tight")
    print(f"figure: docs/figures/{name}.png")


if __name__ == "__main__":
    concepts()
    architecture()
    lora()
