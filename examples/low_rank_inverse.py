"""How well a low-rank copy of H inverts: Hataya & Yamada 2023, figure 1.

H is a 40×40 matrix of rank 20 whose spectrum decays, and the inverse that an implicit
hypergradient needs is (H + ρI)⁻¹. Each strategy of the library is asked for that inverse column by
column: Nyström with k columns of H, conjugate gradients and the Neumann series with k products for
each right-hand side. The figure shows the matrices they give at k = 5, 10 and 20, and the relative
error in the Frobenius norm against k.

What a copy of rank k misses is multiplied by 1/ρ, where the true inverse has 1/(λ + ρ). Nyström is
exact once k reaches the rank of H. Its k products serve every right-hand side, while CG and Neumann
spend theirs anew on each; a hypergradient has one right-hand side.

    python examples/low_rank_inverse.py
    python examples/low_rank_inverse.py --uneven  # columns of very different length

Remark 1 of the paper wants columns drawn in proportion to H_ii², where the method draws them
uniformly. Both are shown; H_ii is at hand here, as it is not in a hypergradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import tyro
from _shared.output import print_table, save_figure
from matplotlib.image import AxesImage
from torch import Tensor
from tqdm import tqdm

from hyperopt_torch import CG, IHVP, Neumann, Nystrom, Solution
from hyperopt_torch.operators import Dense

LINES = {
    "Nyström": "r.-",
    "Nyström, K ∝ H_ii²": "m.-",
    "CG": "g.-",
    "Neumann": "b.-",
    "best rank k": "k:",
}
Errors = dict[str, dict[int, list[float]]]  # method, k, one entry for each sketch


@dataclasses.dataclass(frozen=True)
class Settings:
    """A quick look: --n 12 --rank 6 --sketches 2."""

    n: int = 40
    rank: int = 20
    decay: float = 0.8
    """Eigenvalue i of H is decay^i, i = 0, 1, ..., rank - 1."""
    damping: float = 0.1
    uneven: bool = False
    """Scale rows and columns of H by 0.85^i: as where some inputs hardly ever change."""
    sketches: int = 10
    """Draws of the columns that Nyström's error is averaged over."""
    seed: int = 0
    out: Path = Path("results/low_rank_inverse.png")
    """Where the figure goes."""


def eigenvalues(settings: Settings) -> Tensor:
    values = settings.decay ** torch.arange(settings.n, dtype=torch.float64)
    return torch.where(torch.arange(settings.n) < settings.rank, values, 0.0)


def make_matrix(settings: Settings) -> Tensor:
    """QΛQᵀ with a random orthonormal Q, so that no column is special."""
    rng = torch.Generator().manual_seed(settings.seed)
    Q, _ = torch.linalg.qr(torch.randn(settings.n, settings.n, generator=rng, dtype=torch.float64))
    H = Q @ torch.diag(eigenvalues(settings)) @ Q.mT
    if settings.uneven:
        scale = 0.85 ** torch.arange(settings.n, dtype=H.dtype)
        H = scale[:, None] * H * scale
        H = H / torch.linalg.matrix_norm(H, 2)
    return H


def relative_error(matrix: Tensor, exact: Tensor) -> float:
    return float((matrix - exact).norm() / exact.norm())


def inverse(strategy: IHVP, H: Tensor) -> Tensor:
    """The matrix that a strategy stands for: its answers to the n unit vectors."""
    columns = []
    for b in torch.eye(len(H), dtype=H.dtype):
        # `fresh` forgets how many sketches were drawn: the same one for every column
        found = strategy.fresh().solve(Dense(H), b)  # bilevel: what stands for (H + ρI)⁻¹ b
        columns.append(found.x if isinstance(found, Solution) else found)
    return torch.stack(columns, dim=1)


def by_diagonal(H: Tensor, k: int, damping: float) -> Tensor:
    """(H_k + ρI)⁻¹ with k columns drawn without replacement in proportion to H_ii²."""
    weights = H.diagonal().square()
    K = torch.multinomial(weights.clamp(min=1e-30), k)
    low_rank = H[:, K] @ torch.linalg.pinv(H[K][:, K], hermitian=True, rtol=1e-10) @ H[K]
    return torch.linalg.inv(low_rank + damping * torch.eye(len(H), dtype=H.dtype))


def best_rank(H: Tensor, k: int, damping: float) -> Tensor:
    """(H_k + ρI)⁻¹ with the k largest eigenpairs: the best that a copy of rank k can give."""
    values, V = torch.linalg.eigh(H)  # ascending
    values = torch.where(torch.arange(len(H)) >= len(H) - k, values, 0.0)
    return V @ torch.diag(1 / (values + damping)) @ V.mT


def plot(
    H: Tensor, exact: Tensor, maps: dict[str, dict[int, Tensor]], errors: Errors, settings: Settings
) -> None:
    figure = plt.figure(figsize=(9.5, 9), layout="constrained")
    grid = figure.add_gridspec(4, 4, height_ratios=[1, 1, 1, 1.3])

    def heat_map(row: int, column: int, matrix: Tensor, title: str) -> AxesImage:
        axis = figure.add_subplot(grid[row, column])
        axis.set(xticks=[], yticks=[])
        axis.set_title(title, fontsize=9)
        limit = float((H if matrix is H else exact).abs().quantile(0.95))
        return axis.imshow(matrix, cmap="RdBu_r", vmin=-limit, vmax=limit)

    heat_map(0, 0, H, f"H, of rank {settings.rank} (own scale)")
    image = heat_map(1, 0, exact, "exact inverse of H + ρI")
    for row, (method, matrices) in enumerate(maps.items()):
        for column, k in enumerate((k for k in (5, 10, 20) if k in matrices), start=1):
            title = f"{method}, {k}: error {relative_error(matrices[k], exact):.2g}"
            heat_map(row, column, matrices[k], title)
    figure.colorbar(image, ax=figure.axes, extend="both", shrink=0.5)
    axis = figure.add_subplot(grid[2, 0])
    values = torch.linalg.eigvalsh(H).flip(0)[: settings.rank]
    axis.semilogy(range(1, settings.rank + 1), values, "k.")
    axis.axhline(settings.damping, color="tab:red", linewidth=1, label="ρ")
    axis.legend()
    axis.set_title("eigenvalues of H", fontsize=9)

    axis = figure.add_subplot(grid[3, :])
    for method, curve in errors.items():
        draws = torch.tensor(list(curve.values()))  # (number of k, sketches or 1)
        (line,) = axis.semilogy(list(curve), draws.mean(1), LINES[method], label=method)
        band = draws.amin(1), draws.amax(1)
        axis.fill_between(list(curve), *band, color=line.get_color(), alpha=0.2, linewidth=0)
    axis.set(xlabel="rank, or products for each right-hand side", ylabel="relative error")
    axis.set_ylim(1e-4, 2)
    axis.grid(alpha=0.3)
    axis.legend()
    save_figure(figure, settings.out)


def main(settings: Settings) -> None:
    torch.set_num_threads(1)  # tiny matrices: more threads would cost more than they save
    H, rho = make_matrix(settings), settings.damping
    exact = torch.linalg.inv(H + rho * torch.eye(settings.n, dtype=H.dtype))
    alpha = 1 / (1 + rho)  # 1 / λ_max(H + ρI)
    strategies: dict[str, Callable[[int], IHVP]] = {  # made from k, with the seed of the moment
        "Nyström": lambda k: Nystrom(k, rho),
        "CG": lambda k: CG(k, tol=0.0, damping=rho),
        "Neumann": lambda k: Neumann(k, scale=alpha, damping=rho),
    }
    ks = [k for k in (1, 2, 3, 4, 5, 7, 10, 13, 16, 18, 19, 20, 21, 22, 25, 30) if k <= settings.n]
    errors: Errors = {method: {} for method in LINES}
    maps: dict[str, dict[int, Tensor]] = {method: {} for method in strategies}
    for k in tqdm(ks):
        for method, strategy in strategies.items():
            draws = []
            for seed in range(settings.sketches if method == "Nyström" else 1):
                torch.manual_seed(settings.seed + seed)
                draws.append(inverse(strategy(k), H))
            maps[method][k] = draws[0]
            errors[method][k] = [relative_error(X, exact) for X in draws]
        torch.manual_seed(settings.seed)
        draws = [relative_error(by_diagonal(H, k, rho), exact) for _ in range(settings.sketches)]
        errors["Nyström, K ∝ H_ii²"][k] = draws
        errors["best rank k"][k] = [relative_error(best_rank(H, k, rho), exact)]

    shown = [k for k in (5, 10, 16, 20, 25) if k in ks]
    rows = [[m, *(f"{sum(c[k]) / len(c[k]):.2g}" for k in shown)] for m, c in errors.items()]
    print_table(["relative error", *(f"k={k}" for k in shown)], rows)
    plot(H, exact, maps, errors, settings)


if __name__ == "__main__":
    main(tyro.cli(Settings))
