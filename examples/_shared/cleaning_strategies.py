"""The strategies of the cleaning example, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from hyperopt_torch import (
    NHGD,
    ConjugateGradient,
    GaussNewton,
    Hessian,
    Identity,
    LancBiO,
    Neumann,
    Nystrom,
    NystromPCG,
    RecycledCG,
    SubBiO,
)

Name = Literal[
    "cleaning",
    "default",
    "identity",
    "warm-cg",
    "cg",
    "cg-gn",
    "nystrom",
    "neumann",
    "nystrom-pcg",
    "lancbio",
    "subbio",
    "nhgd",
]
# By damping. Fifty clean images are soon overfitted: a damping restrains the weights, too.
STRATEGIES: dict[str, Callable[[float], dict[str, Any]]] = {
    "cleaning": lambda d: {"ihvp": RecycledCG(damping=d), "curvature": GaussNewton()},
    "default": lambda d: {},  # what BilevelOptimizer takes by itself
    "identity": lambda d: {"ihvp": Identity()},
    "warm-cg": lambda d: {
        "ihvp": ConjugateGradient(10, damping=d, warm_start=True),
        "curvature": GaussNewton(),
    },
    "cg": lambda d: {"ihvp": ConjugateGradient(10, damping=d), "curvature": Hessian()},
    "cg-gn": lambda d: {"ihvp": ConjugateGradient(10, damping=d), "curvature": GaussNewton()},
    "nystrom": lambda d: {"ihvp": Nystrom(rank=10, damping=d), "curvature": Hessian()},
    "neumann": lambda d: {"ihvp": Neumann(10, damping=d), "curvature": Hessian()},
    "nystrom-pcg": lambda d: {"ihvp": NystromPCG(damping=d), "curvature": GaussNewton()},
    "lancbio": lambda d: {"ihvp": LancBiO(damping=d), "curvature": GaussNewton()},
    "subbio": lambda d: {"ihvp": SubBiO(1.0, damping=d), "curvature": GaussNewton()},
    "nhgd": lambda d: {
        "ihvp": NHGD(512, rows="per_sample", samples=32, min_damping=d, rescale=True)
    },
}
