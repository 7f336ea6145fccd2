"""The table of strategies: a row here buys a strategy every generic test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hyperopt_torch import (
    IHVP,
    NHGD,
    ConjugateGradient,
    DenseSolve,
    Identity,
    LancBiO,
    Neumann,
    Nystrom,
    NystromPCG,
    NystromSketch,
    RecycledCG,
    RecycledPairs,
    SubBiO,
)


@dataclass(frozen=True)
class Case:
    """One strategy, as the laws see it.

    Attributes:
        name: the id of the test.
        make: the strategy in an everyday setting.
        exact: (n, damping) -> the strategy in its exact limit; None if it has none for general H.
        products: products with H that one first solve of ``make()`` takes on n >= 12 parameters,
            the closing joint product of the estimator included; None: that depends on the data.
        vmaps: whether it runs under ``torch.func.vmap``.
        sync_free: whether a solve never waits for the device.
    """

    name: str
    make: Callable[[], IHVP]
    exact: Callable[[int, float], IHVP] | None
    products: int | None
    vmaps: bool = True
    sync_free: bool = True

    def __str__(self) -> str:
        return self.name


WAITS: dict[str, bool] = {"vmaps": False, "sync_free": False}

STRATEGIES = [
    Case(
        "nystrom",
        lambda: Nystrom(5, 0.1),
        lambda n, rho: Nystrom(n, rho),
        products=5 + 1,
    ),
    Case(
        "nystrom-chunked",
        lambda: Nystrom(5, 0.1, chunk_size=2),
        lambda n, rho: Nystrom(n, rho, chunk_size=3),
        products=2 * 5 + 2 + 1,
    ),
    Case(
        "nystrom-space",
        lambda: Nystrom(5, 0.1, chunk_size=1),
        lambda n, rho: Nystrom(n, rho, chunk_size=1),
        products=2 * 5 + 2 + 1,
    ),
    Case(
        "nystrom-gaussian",
        lambda: Nystrom(5, 0.1, sketch="gaussian"),
        lambda n, rho: Nystrom(n, rho, sketch="gaussian"),
        products=5 + 1,
    ),
    Case(
        "nystrom-gaussian-chunked",
        lambda: Nystrom(5, 0.1, sketch="gaussian", chunk_size=2),
        lambda n, rho: Nystrom(n, rho, sketch="gaussian", chunk_size=3),
        products=2 * 5 + 2 + 1,
    ),
    Case(
        "nystrom-woodbury",
        lambda: Nystrom(5, 0.1, solver="woodbury"),
        lambda n, rho: Nystrom(n, rho, solver="woodbury"),
        products=5 + 1,
    ),
    Case(
        "cg",
        lambda: ConjugateGradient(5, damping=0.1),
        lambda n, rho: ConjugateGradient(2 * n, tol=1e-13, damping=rho),
        products=5,
        vmaps=False,
        sync_free=False,
    ),
    Case(
        "cg-warm",
        lambda: ConjugateGradient(5, damping=0.1, warm_start=True),
        lambda n, rho: ConjugateGradient(2 * n, tol=1e-13, damping=rho, warm_start=True),
        products=5,
        vmaps=False,
        sync_free=False,
    ),
    Case(
        "cg-all-steps",
        lambda: ConjugateGradient(5, tol=0.0, damping=0.1),
        lambda n, rho: ConjugateGradient(2 * n, tol=0.0, damping=rho),
        products=5,
    ),
    Case(
        "neumann",
        lambda: Neumann(5, damping=0.1),
        lambda n, rho: Neumann(600, damping=rho),
        products=5 + 8 + 1,
        sync_free=False,
    ),
    Case(
        "neumann-fixed",
        lambda: Neumann(5, scale=0.1, damping=0.1),
        lambda n, rho: Neumann(600, scale=0.15, damping=rho),
        products=5 + 1,
    ),
    Case(
        "cg-sketched",
        lambda: ConjugateGradient(5, tol=0.0, damping=0.1, preconditioner=NystromSketch(4)),
        lambda n, rho: ConjugateGradient(
            2 * n, tol=1e-13, damping=rho, preconditioner=NystromSketch(4)
        ),
        products=4 + 5,
        **WAITS,
    ),
    Case(
        "cg-recycled-pairs",
        lambda: ConjugateGradient(
            5, tol=0.0, damping=0.1, warm_start=True, preconditioner=RecycledPairs(8)
        ),
        lambda n, rho: ConjugateGradient(
            2 * n, tol=1e-13, damping=rho, preconditioner=RecycledPairs(8)
        ),
        products=5,
        **WAITS,
    ),
    Case(
        "nystrom-pcg",
        lambda: NystromPCG(5, tol=0.0, damping=0.1, refresh_every=3),
        lambda n, rho: NystromPCG(n, tol=0.0, damping=rho),
        products=5 + 2,
        **WAITS,
    ),
    Case(
        "recycled-cg",
        lambda: RecycledCG(8, damping=0.1),
        lambda n, rho: RecycledCG(8, tol=1e-13, damping=rho),
        products=None,  # the first solve runs to its tolerance
        **WAITS,
    ),
    Case("lancbio", lambda: LancBiO(3, damping=0.1), None, products=2, **WAITS),
    Case("lancbio-published", lambda: LancBiO(3, damping=0.1, safeguard=False), None, products=2),
    Case("subbio", lambda: SubBiO(0.5, damping=0.1), None, products=1),
    Case("nhgd", lambda: NHGD(16), None, products=1, vmaps=False),
    Case("nhgd-kronecker", lambda: NHGD(structure="kronecker"), None, products=1, vmaps=False),
    Case("nhgd-dense", lambda: NHGD(structure="dense"), None, products=1, vmaps=False),
    Case("identity", lambda: Identity(0.5), None, products=1),
    Case("identity-rescaled", lambda: Identity(), None, products=1),
    Case("nystrom-rescaled", lambda: Nystrom(5, 0.1, rescale=True), None, products=5 + 1),
    # damping relative to ‖H‖: three products of the power method, or none where a sketch tells it
    Case("nystrom-auto", lambda: Nystrom(5), None, products=5 + 1),
    Case("nystrom-auto-space", lambda: Nystrom(5, chunk_size=1), None, products=2 * 5 + 2 + 1),
    Case(
        "cg-auto",
        lambda: ConjugateGradient(5, tol=0.0, damping="auto"),
        None,
        products=3 + 5,
        **WAITS,
    ),
    Case(
        "neumann-auto",
        lambda: Neumann(5, scale=0.1, damping="auto"),
        None,
        products=3 + 5 + 1,
        **WAITS,
    ),
    Case(
        "nystrom-pcg-auto",
        lambda: NystromPCG(5, tol=0.0, damping="auto"),
        None,
        products=3 + 5 + 2,
        **WAITS,
    ),
    Case("lancbio-auto", lambda: LancBiO(3, damping="auto"), None, products=3 + 2, **WAITS),
    Case("subbio-auto", lambda: SubBiO(0.5, damping="auto"), None, products=3 + 1, **WAITS),
    Case("recycled-cg-auto", lambda: RecycledCG(8), None, products=None, **WAITS),
    Case("dense-auto", lambda: DenseSolve("auto"), None, products=3 + 12 + 1, **WAITS),
    Case(
        "dense",
        lambda: DenseSolve(damping=0.1),
        lambda n, rho: DenseSolve(damping=rho),
        products=12 + 1,
    ),
]

EXACT = [case for case in STRATEGIES if case.exact is not None]
