"""Random bilevel problems held against the rules that no user's loop may break.

    python -m tests.fuzz --problems 2000 [--seed 0] [--start K]

Problem k of a seed is always the same: ``--start K --problems 1`` runs a failure again. The rules:

- finite: the hypergradient is finite, or the report says not_finite and φ did not move.
- right: an error of the implicit term above 1 implies trouble (exact methods: far below 1).
- untouched: a query changes nothing, outer_step changes the outer level only; bit for bit.
- remedy: an exception is one of the library's own and says what to do.
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

sys.path.insert(0, str(Path(__file__).parent))  # siblings, as pytest imports them

from cases import STRATEGIES
from oracles import jacobians

from hyperopt_torch import (
    PZOBO,
    BilevelOptimizer,
    FiniteDifference,
    GaussNewton,
    HypergradientError,
    ImplicitDifferentiation,
    Unrolled,
)

RULES = ("finite", "right", "untouched", "remedy")
ADVICE = (
    "use ", "call ", "pass ", "give ", "compute ", "raise ", "lower ", "take ", "look for",
    "evaluate ", "estimator=", "needs ", "set ",
)  # fmt: skip
RAW = ("linalg.", "expected all tensors", "size of tensor", "does not require grad and does not")
INPUTS, BATCH = 3, 6

# Models -----------------------------------------------------------------------------------------


class Dropout(nn.Module):
    """The same mask in every dtype, so that the oracle sees it too."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * (torch.rand(x.shape, dtype=torch.float32) > 0.3).to(x) / 0.7


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(INPUTS, INPUTS), nn.Linear(INPUTS, INPUTS)
        self.second.weight = self.first.weight
        self.out = nn.Linear(INPUTS, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.second(torch.tanh(self.first(x))))


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(5, 3), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        index = torch.nan_to_num(x[:, 0], 0.0, 0.0, 0.0).detach().mul(2).long().remainder(5)
        return self.out(torch.tanh(self.table(index))) + x.sum(1, keepdim=True) * 0.1


class Scalar(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(-0.3))

    def forward(self, x: Tensor) -> Tensor:
        return (self.a * x.sum(1, keepdim=True)).tanh() + self.b


class Beside(nn.Module):
    """A layer and one more parameter, which serves in some way or in none."""

    def __init__(self, extra: Tensor, norm: bool = False) -> None:
        super().__init__()
        self.layer, self.extra, self.norm = nn.Linear(INPUTS, 1), nn.Parameter(extra), norm

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        if self.norm:
            return out + self.extra.norm()  # at zero its second derivative is NaN
        return out + self.extra.sum() if self.extra.numel() == 0 else out


class Reshape(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, None]


def mlp(activation: type[nn.Module], *between: Callable[[], nn.Module]) -> nn.Module:
    layers = [nn.Linear(INPUTS, 4), *(make() for make in between), activation(), nn.Linear(4, 1)]
    return nn.Sequential(*layers)


def frozen() -> nn.Module:
    model = mlp(nn.Tanh)
    model[0].weight.requires_grad_(False)
    return model


def conv() -> nn.Module:
    return nn.Sequential(
        Reshape(), nn.Conv1d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(2 * (INPUTS - 1), 1)
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(INPUTS, 1),
    "tanh": lambda: mlp(nn.Tanh),
    "relu": lambda: mlp(nn.ReLU),
    "gelu": lambda: mlp(nn.GELU),
    "batchnorm": lambda: mlp(nn.Tanh, lambda: nn.BatchNorm1d(4)),
    "dropout": lambda: mlp(nn.Tanh, Dropout),
    "layernorm": lambda: mlp(nn.GELU, lambda: nn.LayerNorm(4)),
    "conv": conv,
    "embedding": Embedded,
    "tied": Tied,
    "frozen": frozen,
    "unused": lambda: Beside(torch.ones(2)),
    "norm-at-zero": lambda: Beside(torch.zeros(2), norm=True),
    "scalar": Scalar,
    "empty": lambda: Beside(torch.zeros(0)),
}

# The two levels ---------------------------------------------------------------------------------

OUTER = ("weights", "decay", "noise", "prox", "linear")


class Levels(nn.Module):
    """Model and φ; ``forward`` is the training loss of a batch."""

    def __init__(self, d: Draw) -> None:
        super().__init__()
        self.model = MODELS[d.model]()
        self.kinds, self.scale, self.sign = d.outer, d.loss_scale, -1.0 if d.maximize else 1.0
        self.source, self.outputs, self.direct = d.source, d.curvature, d.direct
        self.per_sample = d.per_sample
        theta = self.theta()
        made = {
            "weights": lambda: [0.3 * torch.randn(BATCH)],
            "decay": lambda: [torch.full((len(theta),), -2.0)],
            "noise": lambda: [torch.tensor(-1.0)],
            "prox": lambda: [p.detach() + 0.1 * torch.randn_like(p) for p in theta],
            "linear": lambda: [0.1 * torch.randn_like(theta[0])],
        }
        self.phi = nn.ModuleDict({k: nn.ParameterList(made[k]()) for k in d.outer})

    def theta(self) -> list[Tensor]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def forward(self, x: Tensor, y: Tensor) -> Any:
        phi = {k: list(v) for k, v in self.phi.items()}
        if "noise" in phi:
            x = x + phi["noise"][0].exp() * noise(self.source, x)
        outputs = self.model(x)
        losses = (outputs - y).square().mean(1) / 2
        if "weights" in phi:
            losses = losses * phi["weights"][0].sigmoid()[: len(losses)]
        penalty = self._penalty(phi)
        factor = self.sign * self.scale
        if self.per_sample:
            return factor * (losses + penalty)
        loss = factor * (losses.mean() + penalty)
        return (loss, outputs) if self.outputs else loss

    def _penalty(self, phi: dict[str, list[Tensor]]) -> Tensor:
        theta = self.theta_now()
        total = theta[0].new_zeros(())
        if "decay" in phi:
            rates = phi["decay"][0].exp()
            total = total + sum(r * p.square().sum() for r, p in zip(rates, theta, strict=True)) / 2
        if "prox" in phi:
            total = total + sum(
                (p - q).square().sum() for p, q in zip(theta, phi["prox"], strict=True)
            )
        if "linear" in phi:
            total = total + (phi["linear"][0] * theta[0]).sum()
        return total

    def theta_now(self) -> list[Tensor]:
        """Also under functional_call, where tensors that require no grad stand for parameters."""
        return [p for n, p in self.model.named_parameters() if n not in self.still]

    @property
    def still(self) -> set[str]:
        return {"0.weight"} if isinstance(self.model, nn.Sequential) and self._frozen() else set()

    def _frozen(self) -> bool:
        return isinstance(self.model[0], nn.Linear) and not self.model[0].weight.requires_grad

    def loss(self, batch: Sequence[Tensor]) -> Tensor:
        found = self(*batch)
        return (found[0] if isinstance(found, tuple) else found).mean()

    def validation(self, batch: Sequence[Tensor]) -> Tensor:
        x, y = batch
        loss = (self.model(x) - y).square().mean()
        if self.direct:
            loss = loss + 0.1 * sum(p.square().sum() for p in self.phi.parameters())
        return loss


def noise(source: str, x: Tensor) -> Tensor:
    if source == "numpy":
        return torch.as_tensor(np.random.randn(*x.shape)).to(x)  # noqa: NPY002
    if source == "random":
        return torch.full_like(x, random.gauss(0, 1))
    return torch.randn(x.shape, dtype=torch.float32).to(x)


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)


# What a problem draws ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Inner:
    """An optimizer of torch.optim: its name, rate, settings, and whether its decay is coupled."""

    name: str
    lr: float
    settings: dict[str, Any] = field(default_factory=dict)
    coupled: bool = True
    decays: bool = True
    maximizes: bool = True


INNER = (
    Inner("SGD", 0.1),
    Inner("SGD", 0.05, {"momentum": 0.9}),
    Inner("SGD", 0.05, {"momentum": 0.9, "nesterov": True}),
    Inner("Adam", 0.02),
    Inner("AdamW", 0.02, coupled=False),
    Inner("RMSprop", 0.01),
    Inner("Adagrad", 0.1),
    Inner("Adadelta", 1.0),
    Inner("Adamax", 0.02),
    Inner("NAdam", 0.02),
    Inner("RAdam", 0.02),
    Inner("ASGD", 0.05),
    Inner("Rprop", 0.01, decays=False),
    Inner("Adafactor", 0.02, coupled=False),
    Inner("LBFGS", 0.5, {"max_iter": 3}, decays=False, maximizes=False),
    Inner("Muon", 0.02, coupled=False, maximizes=False),
)
INNER = tuple(inner for inner in INNER if hasattr(torch.optim, inner.name))  # not in old releases
IDIOMS = ("inner_step", "micro", "weighted", "eval", "rebound", "explicit", "accumulate")
CASES = {case.name: case for case in STRATEGIES}
METHODS = (*CASES, "default", "gauss-newton", "differences", "unrolled", "pzobo")
# One application of something that is not the inverse: how wrong it is, only a residual can say.


@dataclass(frozen=True)
class Draw:
    """Problem ``number`` of a seed."""

    number: int
    seed: int
    model: str
    dtype: torch.dtype
    loss_scale: float
    outer: tuple[str, ...]
    inner: Inner
    weight_decay: float
    maximize: bool
    groups: int
    two: bool
    idiom: str
    method: str
    steps: int
    rounds: int
    spoiled: float | None
    huge: bool
    source: str
    direct: bool
    per_sample: bool
    on_trouble: str

    @property
    def curvature(self) -> bool:
        return self.method == "gauss-newton"

    @property
    def stochastic(self) -> bool:
        return self.model == "dropout" or "noise" in self.outer

    def __str__(self) -> str:
        parts = (
            f"{self.model} {str(self.dtype)[6:]} x{self.loss_scale:.0e} φ={'+'.join(self.outer)}",
            f"{self.inner.name}{self.inner.settings or ''} wd={self.weight_decay}",
            f"max={self.maximize} groups={self.groups} two={self.two} {self.idiom} {self.method}",
            f"steps={self.steps} rounds={self.rounds} spoiled={self.spoiled} huge={self.huge}",
        )
        return " ".join(parts)


def draw(number: int, seed: int) -> Draw:
    r = random.Random(f"{seed}/{number}")
    model, inner = r.choice(list(MODELS)), r.choice(INNER)
    # Exact methods often: only they show a small error in what the inner problem is.
    method = r.choice(METHODS) if r.random() < 0.7 else r.choice(("dense", "unrolled"))
    if method == "unrolled" and r.random() < 0.7:
        inner = INNER[r.choice((0, 1))]
    if (model, inner.name) == ("empty", "Adafactor"):
        model = "scalar"  # torch's own step divides by the number of entries
    idioms = IDIOMS if inner.name != "LBFGS" else ("inner_step", "eval", "rebound", "explicit")
    return Draw(
        number=number,
        seed=seed,
        model=model,
        dtype=r.choice((torch.float32, torch.float64)),
        loss_scale=10 ** r.uniform(-4, 4) if r.random() < 0.5 else 1.0,
        outer=tuple(sorted(r.sample(OUTER, r.choice((1, 1, 2))))),
        inner=inner,
        weight_decay=r.choice((0.0, 0.0, 0.01, 0.3)) if inner.decays else 0.0,
        maximize=inner.maximizes and r.random() < 0.2,
        groups=1 if inner.name == "LBFGS" else r.choice((1, 1, 2)),
        two=inner.name == "Muon" or (inner.name != "LBFGS" and r.random() < 0.15),
        idiom=r.choice(idioms),
        method=method,
        steps=r.choice((1, 2, 3, 8)),
        rounds=r.choice((1, 1, 2, 3)),
        spoiled=r.choice((float("nan"), float("inf"))) if r.random() < 0.04 else None,
        huge=r.random() < 0.04,
        source=r.choice(("torch", "numpy", "random")),
        direct=r.random() < 0.3,
        per_sample=method.startswith("nhgd") or (method != "gauss-newton" and r.random() < 0.2),
        on_trouble=r.choice(("ignore", "ignore", "warn", "raise")),
    )


def inner_optimizers(d: Draw, theta: Sequence[Tensor]) -> list[torch.optim.Optimizer]:
    chosen, rest = list(theta), []
    if d.inner.name == "Muon":
        chosen = [p for p in theta if p.ndim == 2]
        rest = [p for p in theta if p.ndim != 2]
    elif d.two and len(theta) > 1:
        chosen, rest = chosen[:1], chosen[1:]
    settings = dict(d.inner.settings, lr=1e3 if d.huge else d.inner.lr)
    if d.inner.maximizes:
        settings["maximize"] = d.maximize
    if d.inner.decays:
        settings["weight_decay"] = d.weight_decay
    cut = len(chosen) if d.groups == 1 else max(1, len(chosen) // 2)
    groups = [{"params": part} for part in (chosen[:cut], chosen[cut:]) if part]
    found = [getattr(torch.optim, d.inner.name)(groups, **settings)] if groups else []
    if rest:
        found.append(torch.optim.SGD(rest, lr=0.05, maximize=d.maximize))
    return found


def bilevel_of(d: Draw, levels: Levels, inner: list[Any]) -> BilevelOptimizer:
    outer = torch.optim.Adam(levels.phi.parameters(), lr=0.02)
    how: dict[str, Any] = {}
    if d.method in CASES:
        how["ihvp"] = CASES[d.method].make()
    elif d.method == "gauss-newton":
        how = {"ihvp": CASES["cg"].make(), "curvature": GaussNewton()}
    elif d.method == "differences":
        how = {"ihvp": CASES["cg"].make(), "curvature": FiniteDifference()}
    elif d.method in ("unrolled", "pzobo"):
        how["estimator"] = Unrolled() if d.method == "unrolled" else PZOBO()
    only = inner[0] if len(inner) == 1 else inner
    return BilevelOptimizer(only, outer, on_trouble=d.on_trouble, **how)


# The loop ---------------------------------------------------------------------------------------

Step = list[tuple[float, tuple[Tensor, Tensor], int]]  # (weight, batch, seed) of its micro-batches


class Run:
    """One problem under way."""

    def __init__(self, d: Draw) -> None:
        self.d = d
        seed_all(hash((d.seed, d.number)) % 2**31)
        self.levels = Levels(d).to(d.dtype)
        self.inner = inner_optimizers(d, self.levels.theta())
        self.start = copy.deepcopy(self.levels)
        self.bilevel = bilevel_of(d, self.levels, self.inner)
        self.history: list[Step] = []
        self.data = torch.Generator().manual_seed(d.number)
        self.broken: list[tuple[str, str]] = []  # (rule, what)
        self.notes: Counter[str] = Counter()

    def batch(self, spoiled: float | None = None) -> tuple[Tensor, Tensor]:
        x = torch.randn(BATCH, INPUTS, generator=self.data, dtype=torch.float64)
        y = x.sin().sum(1, keepdim=True)
        if spoiled is not None:
            x[0, 0] = spoiled
        return x.to(self.d.dtype), y.to(self.d.dtype)

    def step(self, spoiled: float | None) -> None:
        many = self.d.idiom in ("micro", "weighted")
        count = 3 if many else 1
        seeds = [1000 * len(self.history) + i for i in range(count)]
        weights = [0.5 + i for i in range(count)] if self.d.idiom == "weighted" else [1 / count] * 3
        parts = [(w, self.batch(spoiled), s) for w, s in zip(weights, seeds, strict=False)]
        self.levels.train()
        (self._recorded if many else self._inner_step)(parts)
        self.history.append(parts)

    def _recorded(self, parts: Step) -> None:
        for weight, (x, y), seed in parts:
            seed_all(seed)
            given = weight if self.d.idiom == "weighted" else None
            loss = self.bilevel.record(lambda x=x, y=y: self.levels(x, y), given)
            (weight * loss).backward()
        for optimizer in self.inner:
            optimizer.step()
        for optimizer in self.inner:
            optimizer.zero_grad()

    def _inner_step(self, parts: Step) -> None:
        ((_, (x, y), seed),) = parts
        seed_all(seed)
        self.bilevel.inner_step(lambda: self.levels(x, y))
        if self.d.idiom == "rebound":
            x, y = self.batch()  # the names that the closure looks up

    def validation(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        self.levels.train(self.d.idiom != "eval")
        seed_all(7)
        return self.levels.validation(batch)

    def round(self, last: bool) -> None:
        d = self.d
        for i in range(d.steps):
            self.step(d.spoiled if last and i == d.steps - 1 else None)
        batch = self.batch()
        explicit = None
        if d.idiom == "explicit":
            x, y = self.history[-1][0][1]
            explicit = (lambda: self.levels(x, y),)
        given = explicit or ()
        val = self.validation(batch)
        before = snapshot(self)
        found = self.bilevel.hypergradient(val, *given)
        self.expect_same(before, "hypergradient")
        truth = self.truth(batch) if last else None
        self.judge(found, truth)
        self.move(batch, given, found)
        if d.method in ("unrolled", "pzobo"):
            self.start, self.history = copy.deepcopy(self.levels), []

    def move(self, batch: tuple[Tensor, Tensor], given: tuple[Any, ...], found: Any) -> None:
        """outer_step, or accumulate: the same hypergradient again, and nothing else moves."""
        adds = self.d.idiom == "accumulate"
        what = "accumulate" if adds else "outer_step"
        val = self.validation(batch)
        if adds:
            self.bilevel.outer.zero_grad()
        before, refused = snapshot(self), False
        try:
            getattr(self.bilevel, what)(val, *given)
        except HypergradientError as error:
            refused = True
            if not has_advice(error):
                self.broken.append(("remedy", f"on_trouble=raise without advice: {error}"))
        self.expect_raise(refused)
        steps = not adds and not refused and bool(self.bilevel.report.finite)
        self.expect_same(before, what, ("outer.grad", *(("phi", "outer.state") if steps else ())))
        self.expect_gradient(found, what)

    def expect_raise(self, refused: bool) -> None:
        troubles = self.bilevel.report.trouble()
        if refused != (self.d.on_trouble == "raise" and bool(troubles)):
            self.broken.append(("finite", f"raised: {refused}, with trouble {troubles}"))

    def expect_gradient(self, found: Sequence[Tensor | None], what: str) -> None:
        """What the query said is what the outer level gets."""
        tolerance = 1e-3 if self.d.dtype == torch.float32 else 1e-8
        for p, g in zip(self.levels.phi.parameters(), found, strict=True):
            same = (p.grad is None) == (g is None)
            if same and g is not None:
                gap = (p.grad - g).norm() <= tolerance * g.norm()
                same = bool(gap) or not bool(g.isfinite().all())
            if not same:
                self.broken.append(("right", f"{what} is not what hypergradient said"))
                return

    def expect_same(self, before: dict[str, Any], what: str, but: Sequence[str] = ()) -> None:
        after = snapshot(self)
        for name, value in before.items():
            if name not in but and value != after[name]:
                rule = "finite" if name in ("phi", "outer.state") else "untouched"
                self.broken.append((rule, f"{what} changed {name}"))

    # Judgement ----------------------------------------------------------------------------------

    def judge(self, found: Sequence[Tensor | None], truth: Truth | None) -> None:
        report = self.bilevel.report
        kinds = [t.kind for t in report.troubles()]
        parameters = list(self.levels.phi.parameters())
        pairs = zip(found, parameters, strict=True)
        flat = torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])
        finite = bool(flat.isfinite().all())
        if not finite and "not_finite" not in kinds:
            self.broken.append(("finite", f"NaN or inf in the hypergradient, trouble {kinds}"))
        if truth is None:
            return
        if not truth.finite:
            self.notes["oracle not finite"] += 1
            # ‖θ‖ at 0 is a kink that lies symmetrically: differences cannot tell it from curvature.
            if finite and not kinds and self.d.method != "differences":
                self.broken.append(("finite", "NaN in loss, H, J or b, the answer finite, no word"))
            return
        if not finite:
            self.notes["flagged not finite"] += 1
            return
        self._judge_error(truth.error(flat.double(), self.d.dtype), kinds, report, truth)

    def _judge_error(self, error: float, kinds: list[str], report: Any, truth: Truth) -> None:
        if truth.condition * torch.finfo(self.d.dtype).eps > 0.01:
            self.notes["singular to rounding"] += 1
            return
        self.notes["compared"] += 1
        limit = self._exact_limit(truth)
        if limit is not None:
            self.notes["compared to rounding"] += 1
            if error > limit and "unstable" not in kinds:
                told = f"exact method, error {error:.3g} > {limit:.2g}, trouble {kinds}"
                self.broken.append(("right", told))
            return
        if kinds:
            self.notes["flagged, wrong" if error > 1 else "flagged, right to 1"] += 1
            return
        residual = None if report.residual is None else float(report.residual)
        told = f"error {error:.3g}, residual {residual}, condition {truth.condition:.2g}, no word"
        if error <= 1:
            return
        # A residual bounds the error only through the condition of H and the direction of J: the
        # report cannot know it. These are counted, not forgiven in silence.
        if residual is not None and residual <= 1:
            self.notes[f"residual <= 1, error > 1: {self.d.method}"] += 1
            return
        self.broken.append(("right", told))

    def _exact_limit(self, truth: Truth) -> float | None:
        """What rounding may do to an exact method; None where that is too much to tell."""
        if self.d.method == "dense":
            limit = max(1e-3, 1e3 * truth.condition * torch.finfo(self.d.dtype).eps)
            return limit if limit < 0.1 else None
        return 1e-3 if self.d.method == "unrolled" and self.d.dtype == torch.float64 else None

    def truth(self, batch: tuple[Tensor, Tensor]) -> Truth | None:
        d = self.d
        if d.method == "unrolled":
            return unrolled_by_hand(self, batch)
        random_streams = d.stochastic and (d.idiom == "explicit" or d.inner.name == "LBFGS")
        if d.method == "pzobo" or random_streams or (d.curvature and d.model != "linear"):
            self.notes["no oracle"] += 1
            return None
        return implicit(self, batch)


# Oracles ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Truth:
    """The implicit term in float64, the direct one beside it, and what rounding may do."""

    term: Tensor
    direct: Tensor
    floor: float  # ‖J‖‖x‖: what may cancel
    condition: float
    finite: bool = True

    def error(self, found: Tensor, dtype: torch.dtype) -> float:
        eps = 100 * torch.finfo(dtype).eps * max(1.0, self.condition)  # x is no better
        size = self.term.norm() + eps * (self.floor + self.direct.norm()) + 1e-30
        return float((found - self.direct - self.term).norm() / size)


def in_double(levels: Levels) -> Levels:
    """A copy; only the parameters that the library sees."""
    return copy.deepcopy(levels).double()


def double(batch: Sequence[Tensor]) -> list[Tensor]:
    return [t.double() for t in batch]


def outer_gradients(
    run: Run, levels: Levels, inner: Sequence[Tensor], outer: Sequence[Tensor], batch: Any
) -> tuple[Tensor, Tensor]:
    """b and c."""
    levels.train(run.d.idiom != "eval")
    seed_all(7)
    loss = levels.validation(double(batch))
    grads = torch.autograd.grad(loss, [*inner, *outer], allow_unused=True)
    parts = [
        (torch.zeros_like(p) if g is None else g).flatten()
        for g, p in zip(grads, [*inner, *outer], strict=True)
    ]
    return torch.cat(parts[: len(inner)]), torch.cat(parts[len(inner) :])


def implicit(run: Run, batch: Any) -> Truth:
    """-Jᵀ(H + ρI + decay)⁻¹ b by dense autograd on a double copy."""
    d, levels = run.d, in_double(run.levels)
    inner, outer = levels.theta(), list(levels.phi.parameters())

    def train() -> Tensor:
        levels.train(not (d.idiom == "explicit" and not run.levels.training))
        total = torch.zeros((), dtype=torch.float64)
        for weight, part, seed in run.history[-1]:
            seed_all(seed)
            total = total + weight * levels.loss(double(part))
        return levels.sign * total

    state = streams()
    b, c = outer_gradients(run, levels, inner, outer, batch)
    H, J = jacobians(train, inner, outer)
    restore(state)
    A = H + torch.diag(decays(run, H.dtype)) + damping(run) * torch.eye(len(H)).double()
    if not all(bool(t.isfinite().all()) for t in (A, J, b, c)):
        return Truth(b, c, 0.0, 0.0, finite=False)
    condition = float(torch.linalg.cond(A))
    x = torch.linalg.lstsq(A, b[:, None]).solution[:, 0]
    return Truth(-J.mT @ x, c, float(J.norm() * x.norm()), condition)


def decays(run: Run, dtype: torch.dtype) -> Tensor:
    """The coupled weight decay of each entry of θ."""
    coupled = {inner.name for inner in INNER if inner.coupled}
    rates = {
        id(p): group.get("weight_decay", 0.0) + group.get("lambd", 0.0)  # lambd: ASGD's own
        if type(optimizer).__name__ in coupled
        else 0.0
        for optimizer in run.inner
        for group in optimizer.param_groups
        for p in group["params"]
    }
    parts = [torch.full((p.numel(),), rates[id(p)], dtype=dtype) for p in run.levels.theta()]
    return torch.cat(parts)


def damping(run: Run) -> float:
    estimator = run.bilevel.estimator
    assert isinstance(estimator, ImplicitDifferentiation)
    chosen = estimator.ihvp.damping
    if chosen == "auto":  # by itself, in the solve that was just done
        assert run.bilevel.report is not None
        return float(run.bilevel.report.damping)
    return float(chosen)


def unrolled_by_hand(run: Run, batch: Any) -> Truth | None:
    """The loop of SGD written out, differentiable all the way."""
    d = run.d
    plain = d.inner.name == "SGD" and not d.inner.settings.get("nesterov")
    if not plain or len(run.inner) > 1 or d.idiom in ("explicit", "eval") or run.d.rounds > 1:
        run.notes["no oracle"] += 1
        return None
    levels, state = in_double(run.start), streams()
    levels.train()
    names = {n: p for n, p in levels.named_parameters() if n.startswith("model.")}
    theta = {n: p.clone() for n, p in names.items() if p.requires_grad}
    outer = list(levels.phi.parameters())
    buffers: dict[str, Tensor | None] = dict.fromkeys(theta)
    for parts in run.history:
        theta, buffers = sgd_step(run, levels, theta, buffers, parts)
    seed_all(7)
    loss = functional_call(Validation(levels), {f"levels.{n}": p for n, p in theta.items()}, batch)
    grads = torch.autograd.grad(loss, outer, allow_unused=True, retain_graph=True)
    direct = 0.1 * sum(p.square().sum() for p in outer) if d.direct else None
    c = [torch.zeros_like(p) for p in outer]
    if direct is not None:
        c = list(torch.autograd.grad(direct, outer))
    restore(state)
    whole = torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(grads, outer)]  # noqa: B905
    )
    flat = torch.cat([part.flatten() for part in c])
    return Truth(whole - flat, flat, 0.0, 1.0, finite=bool(whole.isfinite().all()))


class Validation(nn.Module):
    def __init__(self, levels: Levels) -> None:
        super().__init__()
        self.levels = levels

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.levels.validation(double((x, y)))


def sgd_step(
    run: Run,
    levels: Levels,
    theta: dict[str, Tensor],
    buffers: dict[str, Tensor | None],
    parts: Step,
) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    d, total = run.d, torch.zeros((), dtype=torch.float64)
    for weight, part, seed in parts:
        seed_all(seed)
        found = functional_call(levels, theta, tuple(double(part)))
        total = total + weight * (found[0] if isinstance(found, tuple) else found).mean()
    grads = torch.autograd.grad(
        levels.sign * total, list(theta.values()), create_graph=True, allow_unused=True
    )
    lr, momentum = run.inner[0].param_groups[0]["lr"], d.inner.settings.get("momentum", 0.0)
    moved, kept = {}, {}
    for (name, p), g in zip(theta.items(), grads, strict=True):
        if g is None:
            moved[name], kept[name] = p, buffers[name]
            continue
        g = g + d.weight_decay * p
        old = buffers[name]
        kept[name] = g if old is None else momentum * old + g
        moved[name] = p - lr * kept[name]
    return moved, kept


# What must not move -----------------------------------------------------------------------------


def streams() -> tuple[Any, ...]:
    return torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002


def restore(state: tuple[Any, ...]) -> None:
    torch.set_rng_state(state[0])
    np.random.set_state(state[1])  # noqa: NPY002
    random.setstate(state[2])


def bits(value: Any) -> Any:
    """Something that compares equal where all bits are."""
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape), value.detach().numpy().tobytes()
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if isinstance(value, dict):
        return tuple((str(k), bits(v)) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(map(bits, value))
    return repr(value)  # NaN too


def snapshot(run: Run) -> dict[str, Any]:
    levels, outer = run.levels, run.bilevel.outer
    phi = list(levels.phi.parameters())
    theta = list(levels.model.parameters())
    torch_state, numpy_state, python_state = streams()
    return {
        "theta": bits(theta),
        "identity": [id(p) for p in theta] + [id(b) for b in levels.buffers()],
        "inner.grad": bits([p.grad for p in theta]),
        "buffers": bits(list(levels.buffers())),
        "modes": [m.training for m in levels.modules()],
        "inner.state": bits([o.state_dict() for o in run.inner]),
        "phi": bits(phi),
        "outer.grad": bits([p.grad for p in phi]),
        "outer.state": bits(outer.state_dict()),
        "torch stream": bits(torch_state),
        "numpy stream": bits(list(numpy_state)),
        "random stream": python_state,
    }


# Running ----------------------------------------------------------------------------------------


@dataclass
class Outcome:
    draw: Draw
    broken: list[tuple[str, str]]
    notes: Counter[str]
    digest: Any = None  # of where the problem ended, to see that it is the same again


def has_advice(error: BaseException) -> bool:
    text = str(error).lower()
    return any(word in text for word in ADVICE) and not any(word in text for word in RAW)


def play(number: int, seed: int = 0) -> Outcome:
    d, run = draw(number, seed), None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            run = Run(d)
            for i in range(d.rounds):
                run.round(last=i == d.rounds - 1)
        except Exception as error:
            broken = run.broken if run else []
            return Outcome(d, broken + _of_error(error), Counter({f"refused: {_head(error)}": 1}))
    return Outcome(d, run.broken, run.notes, bits(list(run.levels.parameters())))


def _of_error(error: Exception) -> list[tuple[str, str]]:
    own = (RuntimeError, ValueError, TypeError)
    raw = isinstance(error, torch.linalg.LinAlgError)
    if isinstance(error, own) and not raw and has_advice(error):
        return []
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    where = " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in reversed(frames))
    return [("remedy", f"{_head(error)} @ {where}")]


def _head(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:110] if str(error) else ''}"


def report(outcomes: Sequence[Outcome], seconds: float) -> int:
    """Prints what was found; the number of broken rules."""
    notes: Counter[str] = sum((o.notes for o in outcomes), Counter())
    for note, count in sorted(notes.items()):
        print(f"{count:6}  {note}")
    for o in outcomes:
        for rule, what in o.broken:
            print(f"FAILED {o.draw.number} [{rule}] {what}\n       {o.draw}")
    failures = Counter(rule for o in outcomes for rule, _ in o.broken)
    for rule in RULES:
        print(f"{rule:10} {len(outcomes)} problems, {failures[rule]} broken")
    print(f"{len(outcomes) / max(seconds, 1e-9):.1f} problems/s")
    return sum(failures.values())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    began = time.perf_counter()
    numbers = range(chosen.start, chosen.start + chosen.problems)
    outcomes = [play(number, chosen.seed) for number in numbers]
    return 1 if report(outcomes, time.perf_counter() - began) else 0


if __name__ == "__main__":
    sys.exit(main())
