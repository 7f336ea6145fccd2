"""The data-cleaning problem of the bilevel benchmark of benchopt: test error after ten CPU seconds.

    python -m benchmarks.cleaning_race --data-root PATH

20,000 images of MNIST of which a share has labels drawn anew, 5,000 clean ones for validation, the
10,000 of the test set; pixels standardised on the training images. Inner level: softmax regression
without a bias, the mean of σ(φ_i)·loss_i plus .2·‖θ‖², from θ = 0. Outer level: the mean validation
loss, from φ = -2. The benchmark judges θ as the solver leaves it; the column ``refit`` is of the
exact minimiser at the weights found. Seeds draw images, labels and batches.

Each method is a generator that yields (θ, φ) whenever it may be judged. Only its own work is on the
clock (CPU seconds, one thread). Runs that are in the file already are not done again.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperopt_torch import BilevelOptimizer, Identity, Unrolled

from ._bilevel_runs import images

PENALTY, START = 0.2, -2.0
BATCH, VAL_BATCH, SMALL = 2000, 1000, 64  # ours; that of the benchmark's solvers
MARKS = (2.0, 5.0)  # seconds after which the error is noted, beside the last
State = tuple[Tensor, Tensor | None]


class Clock:
    """The CPU seconds that a method has used, and may use."""

    def __init__(self, limit: float) -> None:
        self.spent, self.limit = 0.0, limit


@dataclass
class Task:
    """The problem: images (n, d), labels (n,); ``right`` says which labels were left alone."""

    x: Tensor
    y: Tensor
    right: Tensor
    x_val: Tensor
    y_val: Tensor
    x_test: Tensor
    y_test: Tensor
    seed: int = 0

    @classmethod
    def draw(
        cls, train: State, test: State, ratio: float, seed: int, n: int = 20_000, n_val: int = 5000
    ) -> Task:
        """n training samples, a share ``ratio`` of their labels drawn from all classes anew."""
        g = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(train[0]), generator=g)[: n + n_val]
        x, true = train[0][chosen].float(), train[1][chosen]
        other = torch.randint(0, 10, (n,), generator=g)
        y = torch.where(torch.rand(n, generator=g) < ratio, other, true[:n])
        mean, std = x[:n].mean(0), x[:n].std(0, correction=0)
        std[std == 0] = 1  # pixels that are always black
        x, x_test = (x - mean) / std, (test[0].float() - mean) / std
        right = y == true[:n]  # a label drawn anew may be the old one
        return cls(x[:n], y, right, x[n:], true[n:], x_test, test[1], seed)

    @cached_property
    def targets(self) -> Tensor:
        return F.one_hot(self.y, 10).to(self.x)

    @cached_property
    def val_targets(self) -> Tensor:
        return F.one_hot(self.y_val, 10).to(self.x)

    def batches(self, size: int, validation: bool = False) -> Iterator[slice]:
        """Contiguous batches, all of them once in a random order, for ever."""
        n = len(self.y_val if validation else self.y)
        size, count = min(size, n), max(n // size, 1)
        g = torch.Generator().manual_seed(2 * self.seed + validation)
        while True:
            for i in torch.randperm(count, generator=g).tolist():
                yield slice(i * size, (i + 1) * size)

    def train_loss(self, theta: Tensor, phi: Tensor, s: slice) -> Tensor:
        losses = F.cross_entropy(self.x[s] @ theta, self.y[s], reduction="none")
        return (phi[s].sigmoid() * losses).mean() + PENALTY * theta.square().sum()

    def val_loss(self, theta: Tensor, s: slice = slice(None)) -> Tensor:
        return F.cross_entropy(self.x_val[s] @ theta, self.y_val[s])

    def start(self) -> tuple[Tensor, Tensor]:
        theta = torch.zeros(self.x.shape[1], 10, requires_grad=True)
        return theta, torch.full((len(self.y),), START, requires_grad=True)


def error(theta: Tensor, x: Tensor, y: Tensor) -> float:
    """The share of wrong predictions."""
    return float(((x @ theta).argmax(1) != y).float().mean())


# With the library ------------------------------------------------------------------------------


def implicit(task: Task, clock: Clock, **settings: object) -> Iterator[State]:
    """One inner step, one outer step; the default strategy unless ``ihvp`` is given."""
    theta, phi = task.start()
    inner, outer = torch.optim.SGD([theta], lr=0.1), torch.optim.Adam([phi], lr=0.3)
    bilevel = BilevelOptimizer(inner, outer, **settings)  # type: ignore[arg-type]
    batches, val_batches = task.batches(BATCH), task.batches(VAL_BATCH, validation=True)
    while True:
        s = next(batches)
        bilevel.inner_step(lambda s=s: task.train_loss(theta, phi, s))
        bilevel.outer_step(task.val_loss(theta, next(val_batches)))
        yield theta, phi


def identity(task: Task, clock: Clock) -> Iterator[State]:
    return implicit(task, clock, ihvp=Identity(rescale=True))


def unrolled(task: Task, clock: Clock) -> Iterator[State]:
    """The inner problem is ten steps from zero, an epoch; its hypergradient is the exact one."""
    theta, phi = task.start()
    inner = torch.optim.SGD([theta], lr=0.1, momentum=0.95)
    outer = torch.optim.Adam([phi], lr=1.0)
    bilevel = BilevelOptimizer(inner, outer, estimator=Unrolled())
    batches, val_batches = task.batches(BATCH), task.batches(VAL_BATCH, validation=True)
    while True:
        with torch.no_grad():
            theta.zero_()
        inner.state.clear()
        for _ in range(max(len(task.y) // BATCH, 1)):
            s = next(batches)
            bilevel.inner_step(lambda s=s: task.train_loss(theta, phi, s))
        yield theta, phi
        bilevel.outer_step(task.val_loss(theta, next(val_batches)))


def anew(task: Task, clock: Clock) -> Iterator[State]:
    """The default for 80% of the time; then a fresh model at its weights, stopped early."""
    for theta, phi in implicit(task, clock):
        yield theta, phi
        if clock.spent > 0.8 * clock.limit:
            break
    weights = phi.detach().sigmoid()
    for theta, _ in stopped(task, weights, lr=0.02, momentum=0.95):
        yield theta, phi


# Without it ------------------------------------------------------------------------------------


def stopped(
    task: Task, weights: Tensor, lr: float, momentum: float, holdout: slice = slice(None)
) -> Iterator[State]:
    """At most 60 steps of SGD on fixed weights; the model of the lowest validation error so far."""
    theta, phi = task.start()
    optimizer = torch.optim.SGD([theta], lr=lr, momentum=momentum)
    phi, batches = weights.logit(), task.batches(BATCH)  # σ(±inf) is 1 and 0
    best, kept = 1.0, theta
    for _ in range(60):
        optimizer.zero_grad()
        task.train_loss(theta, phi, next(batches)).backward()
        optimizer.step()
        with torch.no_grad():
            now = error(theta, task.x_val[holdout], task.y_val[holdout])
        if now < best:
            best, kept = now, theta.detach().clone()
        yield kept, None


def none_stopped(task: Task, clock: Clock) -> Iterator[State]:
    return stopped(task, torch.ones(len(task.y)), lr=0.1, momentum=0.0)


def perfect_stopped(task: Task, clock: Clock) -> Iterator[State]:
    return stopped(task, task.right.float(), lr=0.02, momentum=0.95)


def perfect(task: Task, clock: Clock) -> Iterator[State]:
    yield optimum(task, task.right.float()), None


def clean_alone(task: Task, clock: Clock) -> Iterator[State]:
    """The validation images as training images, but for a fifth that says when to stop."""
    count, x, y = len(task.y_val) * 4 // 5, task.x_val, task.y_val
    alone = Task(x[:count], y[:count], y[:count] >= 0, x, y, task.x_test, task.y_test, task.seed)
    ones = torch.ones(count)
    return stopped(alone, ones, lr=0.05, momentum=0.9, holdout=slice(count, None))


def warm_cg(task: Task, clock: Clock) -> Iterator[State]:
    """As ``implicit``, by autograd alone: two warm steps of conjugate gradients, three products."""
    theta, phi = task.start()
    inner, outer = torch.optim.SGD([theta], lr=0.1), torch.optim.Adam([phi], lr=0.3)
    batches, val_batches = task.batches(BATCH), task.batches(VAL_BATCH, validation=True)
    x = torch.zeros_like(theta)
    while True:
        s = next(batches)
        inner.zero_grad()
        task.train_loss(theta, phi, s).backward(inputs=[theta])
        inner.step()
        (b,) = torch.autograd.grad(task.val_loss(theta, next(val_batches)), theta)
        loss = task.train_loss(theta, phi, s)
        (gradient,) = torch.autograd.grad(loss, theta, create_graph=True)

        def product(v: Tensor, gradient: Tensor = gradient) -> Tensor:
            return torch.autograd.grad(gradient, theta, v, retain_graph=True)[0]

        r = p = b - product(x)
        for _ in range(2):
            Ap = product(p)
            alpha = r.square().sum() / (p * Ap).sum()
            x, new = x + alpha * p, r - alpha * Ap
            p, r = new + new.square().sum() / r.square().sum() * p, new
        phi.grad = -torch.autograd.grad(gradient, phi, x)[0]
        outer.step()
        yield theta, phi


def derivatives(
    task: Task, theta: Tensor, v: Tensor, phi: Tensor, s: slice
) -> tuple[Tensor, Tensor, Tensor]:
    """∇f, Hv and Jᵀv of a batch, in closed form."""
    return combined(task, [(theta, v, phi)], torch.ones(1), s)


def combined(
    task: Task, points: list[tuple[Tensor, Tensor, Tensor]], signs: Tensor, s: slice
) -> tuple[Tensor, Tensor, Tensor]:
    """Σ_k sign_k·(∇f, Hv, Jᵀv) over points (θ, v, φ): few calls, for these batches are small."""
    x, count = task.x[s], len(points)
    columns = torch.cat([t for theta, v, _ in points for t in (theta, v)], 1)
    z = (x @ columns).view(len(x), count, 2, 10)
    P, xv = torch.softmax(z[:, :, 0], -1), z[:, :, 1]  # (B, k, 10)
    w = torch.stack([phi[s] for _, _, phi in points], 1).sigmoid()  # (B, k)
    signed = w * (signs / len(x))
    E, Pv = P - task.targets[s][:, None], P * xv
    pair = torch.cat([E, Pv - P * Pv.sum(-1, keepdim=True)], -1)
    gradient, product = (x.T @ (pair * signed[..., None]).sum(1)).chunk(2, 1)
    cross = ((signed - signed * w) * (E * xv).sum(-1)).sum(1)
    for sign, (theta, v, _) in zip(signs.tolist(), points, strict=True):
        gradient = gradient + 2 * PENALTY * sign * theta
        product = product + 2 * PENALTY * sign * v
    return gradient, product, cross


def val_gradient(
    task: Task, theta: Tensor, s: slice = slice(None), less: Tensor | None = None
) -> Tensor:
    """∇g at θ; or its difference from that at ``less``."""
    x = task.x_val[s]
    if less is None:
        return x.T @ (torch.softmax(x @ theta, 1) - task.val_targets[s]) / len(x)
    P, Q = torch.softmax((x @ torch.cat([theta, less], 1)).view(-1, 2, 10), -1).unbind(1)
    return x.T @ (P - Q) / len(x)


def soba(task: Task, clock: Clock) -> Iterator[State]:
    """Dagréou et al., NeurIPS 2022: a step of θ, v and φ at once, from one batch."""
    theta, phi = (t.detach() for t in task.start())
    v, inner_lr, outer_lr = torch.zeros_like(theta), 0.01, 1000.0
    batches, val_batches = task.batches(SMALL), task.batches(SMALL, validation=True)
    while True:
        for _ in range(20):
            s = next(batches)
            gradient, product, cross = derivatives(task, theta, v, phi, s)
            b = val_gradient(task, theta, next(val_batches))
            theta, v = theta - inner_lr * gradient, v - inner_lr * (product - b)
            phi[s] += outer_lr * cross
        yield theta, phi


def srba(task: Task, clock: Clock, period: int = 200_000) -> Iterator[State]:
    """Dagréou et al., AISTATS 2024: SOBA along directions that add up their own differences.

    Every ``period`` steps they are made anew from all samples: after 512 epochs in the benchmark.
    """
    theta, phi = (t.detach() for t in task.start())
    v, inner_lr, outer_lr, step = torch.zeros_like(theta), 0.001, 100.0, 0
    batches, val_batches = task.batches(SMALL), task.batches(SMALL, validation=True)
    before, signs = (theta, v, phi), torch.tensor([1.0, -1.0])
    while True:
        for _ in range(20):
            if step % period == 0:
                d_theta, product, cross = derivatives(task, theta, v, phi, slice(None))
                d_v, d_phi = product - val_gradient(task, theta), -cross
            else:
                s = next(batches)
                more, product, cross = combined(task, [(theta, v, phi), before], signs, s)
                d_theta, d_v = d_theta + more, d_v + product
                d_v = d_v - val_gradient(task, theta, next(val_batches), before[0])
                d_phi[s] -= cross
            before = theta, v, phi
            theta, v = theta - inner_lr * d_theta, v - inner_lr * d_v
            phi, step = phi - outer_lr * d_phi, step + 1
        yield theta, phi


def optimum(task: Task, weights: Tensor, tol: float = 1e-4) -> Tensor:
    """argmin over θ of Σ w_i loss_i / n + .2 ‖θ‖²: Newton's method, conjugate gradients inside."""
    theta, phi = task.start()[0].detach(), weights.logit()
    everything = slice(None)
    for _ in range(20):
        r = -derivatives(task, theta, theta, phi, everything)[0]
        if r.norm() < tol:
            break
        p, step = r, torch.zeros_like(r)
        for _ in range(6):
            Hp = derivatives(task, theta, p, phi, everything)[1]
            alpha = r.square().sum() / (p * Hp).sum()
            step, new = step + alpha * p, r - alpha * Hp
            p, r = new + new.square().sum() / r.square().sum() * p, new
        theta = theta + step
    return theta


# The race --------------------------------------------------------------------------------------

METHODS: dict[str, Callable[[Task, Clock], Iterator[State]]] = {
    "default": implicit,
    "default, then anew": anew,
    "Unrolled": unrolled,
    "Identity": identity,
    "warm CG, by hand": warm_cg,
    "SOBA, by hand": soba,
    "SRBA, by hand": srba,
    "no cleaning, stopped early": none_stopped,
    "perfect cleaning": perfect,
    "perfect cleaning, stopped early": perfect_stopped,
    "clean images alone, stopped early": clean_alone,
}


def run(method: Callable[[Task, Clock], Iterator[State]], task: Task, seconds: float) -> dict:
    """One run's row; judged off the clock."""
    clock, row, marks, steps = Clock(seconds), {}, list(MARKS), 0
    states = method(task, clock)
    while clock.spent < seconds:
        begin = time.process_time()
        state = next(states, None)
        clock.spent += time.process_time() - begin
        if state is None:
            break
        theta, phi, steps = *state, steps + 1
        if marks and clock.spent >= marks[0]:
            row[f"error_{marks.pop(0):.0f}s"] = error(theta.detach(), task.x_test, task.y_test)
    theta = theta.detach()
    row |= {"error": error(theta, task.x_test, task.y_test), "cpu_s": clock.spent, "yields": steps}
    row["val_error"] = error(theta, task.x_val, task.y_val)
    row["val_loss"] = float(task.val_loss(theta))
    if phi is not None:
        w = phi.detach().sigmoid()
        row |= {"weight_right": float(w[task.right].mean())}
        row |= {"weight_wrong": float(w[~task.right].mean())}
        gradient = derivatives(task, theta, theta, phi.detach(), slice(None))[0]
        row["inner_gradient"] = float(gradient.norm())
        best = optimum(task, w)
        row["refit"] = error(best, task.x_test, task.y_test)
        row["refit_val_loss"] = float(task.val_loss(best))
    return row


FIELDS = ("method", "ratio", "seed", "error", "refit", "error_2s", "error_5s", "val_loss")
FIELDS += ("refit_val_loss", "val_error", "inner_gradient", "weight_right", "weight_wrong")
FIELDS += ("yields", "cpu_s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data-root", type=Path, required=True, help="folder that holds MNIST/raw")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 0.7, 0.9])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=10.0, help="CPU seconds of a run")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--out", type=Path, default=Path("docs/results/cleaning_race.csv"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    train, test = images(str(args.data_root)), images(str(args.data_root), "t10k")
    rows: list[dict] = []
    if args.out.exists():
        with open(args.out, newline="") as file:
            rows = list(csv.DictReader(file))
    for method in args.methods:
        for ratio in args.ratios:
            for seed in args.seeds:
                key = {"method": method, "ratio": str(ratio), "seed": str(seed)}
                if any(all(row[k] == v for k, v in key.items()) for row in rows):
                    continue
                row = run(METHODS[method], Task.draw(train, test, ratio, seed), args.seconds)
                rows.append(key | {k: f"{v:.6g}" for k, v in row.items()})
                print(*rows[-1].values(), flush=True)
                with open(args.out, "w", newline="") as file:
                    writer = csv.DictWriter(file, FIELDS, restval="", lineterminator="\n")
                    writer.writeheader()
                    writer.writerows(rows)


if __name__ == "__main__":
    main()
