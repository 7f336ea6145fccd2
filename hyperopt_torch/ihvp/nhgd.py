"""Natural hypergradient descent: the Fisher matrix of the inner gradients stands for H."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._tensors import wide_dtype
from ..errors import check_choice, check_count, check_number
from ..operators import LinearOperator
from ._fisher import DampingRule, DenseFisher, DiagonalFisher, Fisher, Inverse, WindowFisher
from ._kronecker import KroneckerFisher
from .base import IHVP, InnerStep, Preconditioner, Solution

STRUCTURES = ("window", "dense", "kronecker", "diagonal")
_MEAN_GAIN = 0.1  # of the running mean gradient: about ten steps


class NHGD(IHVP, Preconditioner):
    """x = (F + κI + ρI)⁻¹ b, where F = Σ ω_i s_i s_iᵀ is made of gradients s_i met while training.

    F is the empirical Fisher matrix: every inner step feeds rows to it, and none costs a product
    with H. For a negative log-likelihood F approaches H where the model is well specified and θ
    near its optimum; for another loss it is a matrix of the same shape and no more. The curvature κ
    of a penalty is no part of F: where the closure tells the penalty apart, in a ``PerSample``, it
    is added, as the mean diagonal entry of the penalty's Hessian (μ for μ‖θ‖²/2).

    Args:
        window: rows that structure "window" keeps, >= 1.
        structure: "window" keeps the last rows and inverts by Woodbury's identity; "dense" keeps
            all of F and its inverse, by rank-one updates (n <= 2048); "kronecker" a block for each
            layer, of two factors L ⊗ R / tr L, where L = Σ ω M Mᵀ and R = Σ ω MᵀM and M is a row's
            part for the layer's weight, one column more for its bias; "diagonal" the diagonal.
        damping: ρ as a fraction of the mean diagonal entry of F, >= 0. Relative, since F has the
            size of squared gradients, which fall by orders of magnitude in training.
        min_damping: the least ρ > 0, absolute. Where f has a penalty μ‖θ‖²/2 that the closure does
            not tell apart, pass μ: F lacks it.
        decay: β in (0, 1]; a row that is a steps old has weight ω ∝ β^a. 1: all rows that are kept
            weigh the same.
        rows: "batch" makes one row √B ∇f a step out of the gradient that is there anyway, penalty
            included: the mean of ∇f, which has no place in F, vanishes near the optimum.
            "batch_centred" takes a running mean off, which leaves the noise that F is made of.
            "per_sample" makes ``samples`` rows √w_i ∇ℓ_i, for which the training closure must
            return per-sample losses, or ``PerSample(losses, weights, penalty)``.
        samples: rows a step of "per_sample", evenly spread over the batch, others every step.
        batch_size: B of "batch"; None takes it from the per-sample losses or from the outputs that
            the closure returned. Where nobody knows it B = 1 is taken, and the report says so.
        rescale: whether to replace x by its best multiple xᵀb / xᵀ(H + ρI)x · x, which the closing
            product gives for nothing.

    Raises:
        ValueError: an argument is out of its range.

    Exact limit: F = H, as for infinitely many rows of a well-specified model at its optimum. The
    blocks of "kronecker" are those of F where inputs and output gradients of a layer are
    independent, for a single row of rank one, and for tensors of one dimension.

    Trouble: before the first inner step there is no F: ``RuntimeError``; as a preconditioner it is
    the identity then. Rows that are not finite, as a GradScaler meets them, are left out; while
    there are no others x = b. What F misses, all but ``window`` directions, is multiplied by 1/ρ,
    which is large: the report's residual shows it, and ``rescale`` tames it.
    ``negative_curvature`` is set where xᵀ(H + ρI)x <= 0. A step with another number of parameters
    starts F anew.

    Cost: no product but the closing joint one. "batch" adds a copy of the gradient to an inner
    step, "batch_centred" two more, "per_sample" a backward pass a row. With window m: mn memory;
    mn flops for each row that is new at a solve, 4mn a solve; m×m algebra in float64. "dense": 2n²
    memory, O(n²) flops a row, O(n³) now and then (at every solve where there is a penalty or, as a
    preconditioner, a damping). "kronecker", for a weight (o, i): o² + i² memory, oi(o + i) flops a
    row, o³ + i³ a solve; a side longer than 2048 keeps the diagonal of its factor. No sync.

    Example:
        >>> from hyperopt_torch.operators import Dense
        >>> nhgd = NHGD(window=4, damping=2 / 9)
        >>> nhgd.observe(InnerStep(torch.tensor([3.0, 0.0]), batch_size=1))  # F = diag(9, 0), ρ = 1
        >>> nhgd.solve(Dense(torch.diag(torch.tensor([9.0, 0.0]))), torch.tensor([10.0, 1.0])).x
        tensor([1., 1.])

    Reference: Kong, Chen, Zhang & Mou, "Natural hypergradient descent", arXiv:2602.10905. The
    windowed and diagonal forms, the relative damping and ``rescale`` are this library's. It offers
    K-FAC (Martens & Grosse, 2015) for scale, whose factors are made of a layer's inputs and output
    gradients; these are made of the rows, as those of Shampoo (Gupta, Koren & Singer, 2018).
    """

    def __init__(
        self,
        window: int = 128,
        *,
        structure: str = "window",
        damping: float = 1e-3,
        min_damping: float = 1e-6,
        decay: float = 1.0,
        rows: str = "batch",
        samples: int = 8,
        batch_size: int | None = None,
        rescale: bool = False,
    ) -> None:
        super().__init__()
        self.window = check_count("window", window)
        self.structure = check_choice("structure", structure, STRUCTURES)
        self.damping = check_number("damping", damping)
        self.min_damping = check_number("min_damping", min_damping, positive=True)
        self.decay = check_number("decay", decay, positive=True)
        if decay > 1:
            raise ValueError(f"Invalid decay: {decay!r}; expected a number in (0, 1].")
        self.rows = check_choice("rows", rows, ("batch", "batch_centred", "per_sample"))
        self.samples = check_count("samples", samples)
        if (structure, rows) == ("window", "per_sample") and samples > window:
            raise ValueError(f"Invalid samples: {samples}; expected <= window = {window}.")
        self.batch_size = None if batch_size is None else check_count("batch_size", batch_size)
        self.rescale = bool(rescale)
        self._fisher = self._make_fisher()

    def _make_fisher(self) -> Fisher:
        rule = DampingRule(self.damping, self.min_damping)
        if self.structure == "dense":
            return DenseFisher(rule, self.decay)
        if self.structure == "diagonal":
            return DiagonalFisher(rule, self.decay)
        if self.structure == "kronecker":
            return KroneckerFisher(rule, self.decay)
        return WindowFisher(rule, self.decay, self.window)

    @property
    def vectors(self) -> int:
        return self.window + 19 if self.structure == "window" else 8

    def initial_state(self) -> dict[str, Any]:
        return {"n": 0, "steps": 0, "penalty": 0.0}

    @property
    def damping_used(self) -> Tensor | None:
        """ρ of the last solve, a 0-d tensor on the device; None before it.

        With structure "dense" it moves between the value of the rule and twice that.
        """
        return self.state.get("damping_used")

    # --- feeding ------------------------------------------------------------------------------

    def samples_wanted(self, batch_size: int) -> Sequence[int]:
        if self.rows != "per_sample":
            return ()
        count = min(self.samples, batch_size)
        # Evenly spread, and shifted by one at every step: a fixed batch is gone through whole.
        shift = self.state["steps"] % math.ceil(batch_size / count)
        return [(i * batch_size // count + shift) % batch_size for i in range(count)]

    def observe(self, step: InnerStep) -> None:
        X = step.gradient[None]  # (r, n)
        if self.rows == "per_sample":
            X = step.rows(self.samples_wanted(step.batch_size or self.samples))
        if not self._fisher.fits(self.state, X, step):
            self.state = self.initial_state() | self._fisher.begin(X, step) | {"n": X.shape[1]}
        self._fisher.place(self.state, X.device, X.dtype)
        if self.rows == "per_sample":
            self._fisher.add(self.state, X, 1.0)
        else:
            X = X if self.rows == "batch" else self._centred(X)
            self._fisher.add(self.state, X, self._batch_scale(step))
            self.state["batch_known"] = (self.batch_size or step.batch_size) is not None
        self.state["steps"] += 1

    def _batch_scale(self, step: InnerStep) -> Tensor | float:
        """√B, for E[ḡḡᵀ] is F/B where the mean gradient ḡ is noise."""
        root = math.sqrt(self.batch_size or step.batch_size or 1)
        if step.weights is None:
            return root
        # ḡḡᵀ goes with w², but F with w. (The weights may have another dtype than θ.)
        w = step.weights.to(wide_dtype(step.gradient)).clamp(min=0)
        return root * (w.sum() / w.square().sum()).sqrt()

    def _centred(self, X: Tensor) -> Tensor:
        """X - mean, and the mean moved on; the first row is left as it is."""
        mean = self.state.setdefault("mean", torch.zeros_like(X))
        X = X - mean
        gain = max(1 / (self.state["steps"] + 1), _MEAN_GAIN)
        mean.add_(X.nan_to_num(0.0, 0.0, 0.0), alpha=gain)  # X itself is left out if it overflowed
        return X

    def observe_penalty(self, curvature: Tensor) -> None:
        self.state["penalty"] = curvature.clamp(min=0).to(wide_dtype(curvature))

    # --- solving ------------------------------------------------------------------------------

    def solve(self, operator: LinearOperator, rhs: Tensor) -> Solution:
        if self.state["n"] != operator.shape[0]:
            raise RuntimeError(
                "NHGD has seen no gradient of these parameters yet: call inner_step(closure) "
                "before outer_step(val_loss). Its Fisher matrix is made of the inner steps."
            )
        inverse = self._inverse(operator, 0.0)
        rho = self.state["damping_used"] = inverse.damping
        x = inverse.apply(rhs)
        Hx, cross = operator.joint(x)
        Ax = Hx + rho * x
        curvature = operator.inner(x, Ax)
        if self.rescale:  # as base.rescaled, whose ρ is a number
            scale = torch.where(curvature <= 0, 1.0, operator.inner(x, rhs) / curvature)
            x, Ax, cross = scale * x, scale * Ax, scale * cross
        bb, r = operator.inner(rhs, rhs), rhs - Ax
        known = self.state.get("batch_known", True)
        return Solution(
            x,
            cross=cross,
            residual=(operator.inner(r, r) / torch.where(bb > 0, bb, 1.0)).sqrt(),
            rank=inverse.rank,
            negative_curvature=(curvature <= 0) & (bb > 0),
            notes=() if known else (_BATCH_UNKNOWN,),
        )

    def prepare(self, operator: LinearOperator, damping: float) -> Callable[[Tensor], Tensor]:
        """r -> (F + κI + max(damping, ρ) I)⁻¹ r; r -> r before the first inner step."""
        if self.state["n"] != operator.shape[0]:
            return lambda r: r
        return self._inverse(operator, damping).apply

    def _inverse(self, operator: LinearOperator, least: float) -> Inverse:
        self._fisher.place(self.state, operator.device, operator.dtype)
        return self._fisher.inverse(self.state, operator, least)


_BATCH_UNKNOWN = (
    "the batch size B is unknown and taken for 1, which makes x about B times too long: return "
    "(loss, outputs) or per-sample losses from the training closure, or pass batch_size"
)
