"""The figure of error against products, from the committed output of benchmarks.amortised.

python -m benchmarks.draw_amortised
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).parent.parent / "docs"
COLUMNS = 4
# A colour and a marker each, alike within a family; points with equal products are moved apart.
STYLES = {
    "Identity": ("0.6", "o"),
    "Identity rescaled": ("0.3", "o"),
    "Nystrom columns 10": ("tab:orange", "s"),
    "Nystrom gaussian 10": ("gold", "s"),
    "Nystrom columns 10 rescaled": ("saddlebrown", "s"),
    "NHGD per sample": ("tab:pink", "D"),
    "NHGD per sample rescaled": ("mediumvioletred", "D"),
    "CG cold 10": ("navy", "^"),
    "CG warm 2": ("tab:blue", "^"),
    "SubBiO": ("tab:purple", "v"),
    "LancBiO 10": ("mediumpurple", "v"),
    "NystromPCG 1": ("tab:cyan", "P"),
    "NystromPCG 2": ("teal", "P"),
    "RecycledCG 2": ("tab:green", "*"),
    "RecycledCG 2, window 20": ("limegreen", "*"),
    "RecycledCG 4": ("darkgreen", "*"),
    "RecycledCG tol .01": ("yellowgreen", "*"),
    "last step's v": ("black", "x"),
}
Point = tuple[float, float]  # products a step, median relative error


def read(path: Path) -> dict[str, dict[str, Point]]:
    """By setting and strategy."""
    tables: dict[str, dict[str, Point]] = {}
    name = ""
    for line in path.read_text().split("\n"):
        if line.startswith("  "):
            cells = line.rsplit(maxsplit=5)
            tables[name][cells[0].strip()] = float(cells[1]), float(cells[2])
        elif line.strip():
            name = line[:28].strip()
            tables[name] = {}
    return tables


def main() -> None:
    tables = read(DOCS / "results" / "amortised.txt")
    lines = -(-(len(tables) + 1) // COLUMNS)
    figure, axes = plt.subplots(lines, COLUMNS, figsize=(14, 3.5 * lines), layout="constrained")
    for axis, (name, table) in zip(axes.flat, tables.items(), strict=False):
        taken: dict[int, int] = {}  # points so far, by products
        for strategy, (products, error) in table.items():
            color, marker = STYLES[strategy]
            aside = 0.22 * taken.setdefault(round(products), 0)
            taken[round(products)] += 1
            axis.scatter(products + aside, error, 42, color=color, marker=marker, label=strategy)
        axis.set(title=name, yscale="log", xlabel="products a step", xlim=(-0.8, 12))
        axis.axhline(1, color="0.8", linewidth=1, zorder=0)
    for axis in axes[:, 0]:
        axis.set_ylabel("median relative error")
    for axis in axes.flat[len(tables) :]:
        axis.set_axis_off()
    handles, labels = axes.flat[0].get_legend_handles_labels()
    axes.flat[-1].legend(handles, labels, loc="center", ncols=2, frameon=False, fontsize=8)
    path = DOCS / "figures" / "amortised.png"
    figure.savefig(path, dpi=85)
    print(f"figure: {path.name}")


if __name__ == "__main__":
    main()
