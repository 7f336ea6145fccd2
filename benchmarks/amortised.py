"""Error of the hypergradient against products, along real bilevel runs.

    python -m benchmarks.amortised --data-root PATH      # A on MNIST; without it, A on digits

Hyper-cleaning (a weight σ(φ_i) for each training sample, 40% of the labels wrong), warm-started
inner problem. One trajectory, driven by the exact hypergradient, is visited by all strategies,
each with its own memory; at every outer step each one's hypergradient is compared with the exact
damped one (float64). A: softmax regression, two penalties. B: tanh MLP 64-20-10 on digits, with
Gauss-Newton curvature and with the raw Hessian. B batch: strategies solve with the curvature of a
batch, another one at each outer step; the solution x is judged by c - Jᵀx with J of all samples,
against the exact hypergradient of all samples. Slow and fast differ in the outer learning rate; the
row "last step's v" shows by how much the hypergradient drifts in one step.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from hyperopt_torch import (
    IHVP,
    NHGD,
    ConjugateGradient,
    DenseSolve,
    GaussNewton,
    Hessian,
    Identity,
    ImplicitDifferentiation,
    LancBiO,
    Nystrom,
    NystromPCG,
    RecycledCG,
    Solution,
    SubBiO,
)
from hyperopt_torch.estimators import BilevelProblem
from hyperopt_torch.operators import InnerGradient
from hyperopt_torch.recording import InnerObjective, evaluate

from ._bilevel_runs import Cleaning, Setting

Row = dict[str, float]


def strategies(setting: Setting) -> dict[str, IHVP]:
    """Everything in the table, with the damping of the problem."""
    rho = setting.batch_damping or setting.damping
    least = rho or setting.penalty  # for those that need a damping
    nystrom = {"rank": 10, "damping": least}
    return {
        "Identity": Identity(1.0),
        "Identity rescaled": Identity(),
        "Nystrom columns 10": Nystrom(**nystrom),
        "Nystrom gaussian 10": Nystrom(**nystrom, sketch="gaussian"),
        "Nystrom columns 10 rescaled": Nystrom(**nystrom, rescale=True),
        "NHGD per sample": NHGD(rows="per_sample", min_damping=least),
        "NHGD per sample rescaled": NHGD(rows="per_sample", min_damping=least, rescale=True),
        "CG cold 10": ConjugateGradient(10, tol=0.0, damping=rho),
        "CG warm 2": ConjugateGradient(2, tol=0.0, damping=rho, warm_start=True),
        "SubBiO": SubBiO(0.05, damping=rho),
        "LancBiO 10": LancBiO(10, damping=rho),
        "NystromPCG 1": NystromPCG(20, max_iter=1, tol=0.0, damping=rho),
        "NystromPCG 2": NystromPCG(20, max_iter=2, tol=0.0, damping=rho),
        "RecycledCG 2": RecycledCG(max_iter=2, damping=rho),
        "RecycledCG 2, window 20": RecycledCG(20, max_iter=2, damping=rho),
        "RecycledCG 4": RecycledCG(max_iter=4, damping=rho),
        "RecycledCG tol .01": RecycledCG(tol=0.01, damping=rho),
    }


def oracle(setting: Setting) -> ImplicitDifferentiation:
    """Exact to about 1e-8 in float64: dense where H + ρI may be indefinite."""
    if setting.curvature is Hessian and setting.hidden:
        return ImplicitDifferentiation(DenseSolve(setting.damping))
    return ImplicitDifferentiation(
        RecycledCG(100, tol=1e-8, damping=setting.damping), setting.curvature()
    )


def visit(setting: Setting, seed: int, outer_steps: int) -> dict[str, list[Row]]:
    """One run: for each strategy a row per outer step."""
    run, exact_run = Cleaning(setting, seed, torch.float32), Cleaning(setting, seed, torch.float64)
    inner = torch.optim.SGD(run.model.parameters(), lr=setting.inner_lr, momentum=0.9)
    outer = torch.optim.Adam([run.weights], lr=setting.outer_lr)
    exact_levels = (
        torch.optim.SGD(exact_run.model.parameters(), lr=1.0),
        torch.optim.SGD([exact_run.weights], lr=1.0),
    )

    def problem_of(
        levels: tuple[torch.optim.Optimizer, torch.optim.Optimizer], of: Cleaning
    ) -> BilevelProblem:
        objective = InnerObjective.given(of.train_loss, of.x.device)
        return BilevelProblem([levels[0]], levels[1], objective)

    exact = oracle(setting)
    estimators = {
        name: ImplicitDifferentiation(ihvp, setting.curvature())
        for name, ihvp in strategies(setting).items()
    }
    rows: dict[str, list[Row]] = defaultdict(list)
    last = None

    def train(steps: int) -> None:
        problem = problem_of((inner, outer), run)
        watching = [e for e in estimators.values() if e.observes]
        for _ in range(steps):
            inner.zero_grad()
            evaluation = evaluate(run.train_loss)
            for estimator in watching:
                estimator.before_backward(problem, evaluation)
            evaluation.loss.backward(inputs=problem.inner_parameters)
            for estimator in watching:
                estimator.observe(problem, [])
            inner.step()

    train(15 * setting.inner_steps)
    for _ in tqdm(range(outer_steps), desc=f"{setting.name}, seed {seed}", leave=False):
        exact_run.copy_from(run)
        problem = problem_of(exact_levels, exact_run)
        target = exact.estimate(problem, exact_run.val_loss())[0]
        assert target is not None
        if last is not None:
            rows["last step's v"].append(compare(last, target, products=0))
        last = target
        problem = problem_of((inner, outer), run)
        if setting.batch:
            found = on_a_batch(run, problem, estimators)
        else:
            found = {name: one(run, problem, e) for name, e in estimators.items()}
        for name, (hypergradient, products) in found.items():
            rows[name].append(compare(hypergradient.double(), target, products))
        run.weights.grad = target.float()
        outer.step()
        train(setting.inner_steps)
    return rows


def one(
    run: Cleaning, problem: BilevelProblem, estimator: ImplicitDifferentiation
) -> tuple[Tensor, int]:
    """One strategy's hypergradient and its products."""
    (found,) = estimator.estimate(problem, run.val_loss())
    assert found is not None
    assert estimator.report is not None
    return found, estimator.report.matvecs


def on_a_batch(
    run: Cleaning, problem: BilevelProblem, estimators: dict[str, ImplicitDifferentiation]
) -> dict[str, tuple[Tensor, int]]:
    """x from the curvature of one batch, the same for all strategies; Jᵀx from all samples."""
    levels = problem.inner_parameters, problem.outer_parameters
    chosen = torch.randperm(len(run.x), generator=run.generator)[: run.setting.batch]
    batch, full = (
        InnerGradient(e.loss, *levels, e.outputs)
        for e in (evaluate(partial(run.train_loss, chosen)), evaluate(run.train_loss))
    )
    b = batch.layout.flatten(problem.outer_gradients(run.val_loss())[0])
    found = {}
    for name, estimator in estimators.items():
        operator = estimator.curvature.operator(batch)
        with torch.no_grad():
            solution = estimator.ihvp.solve(operator, b)
        x = solution.x if isinstance(solution, Solution) else solution
        own_cross = isinstance(solution, Solution) and solution.cross is not None
        found[name] = -full.cross(x), operator.matvecs + (0 if own_cross else 1)
    return found


def compare(found: Tensor, target: Tensor, products: int) -> Row:
    return {
        "error": float((found - target).norm() / target.norm()),
        "cosine": float(found @ target / (found.norm() * target.norm())),
        "norm ratio": float(found.norm() / target.norm()),
        "products": products,
    }


def settings(data_root: str | None) -> list[Setting]:
    A = Setting("A", data=data_root or "digits", samples=2000 if data_root else 800)
    B = Setting("B", hidden=20, penalty=0.0, damping=0.01, curvature=GaussNewton, inner_lr=0.1)
    raw = replace(B, damping=0.1, curvature=Hessian)
    batch = replace(B, batch=200, batch_damping=0.03)
    slow, fast = {"outer_lr": 0.01}, {"outer_lr": 0.1}
    return [
        replace(A, name="A 1e-2 slow", **slow),
        replace(A, name="A 1e-2 fast", **fast),
        replace(A, name="A 1e-3 slow", penalty=1e-3, **slow),
        replace(A, name="A 1e-3 fast", penalty=1e-3, **fast),
        replace(B, name="B GN .01 slow", outer_lr=0.15),
        replace(B, name="B GN .01 fast", outer_lr=0.6),
        replace(raw, name="B H .1 slow", outer_lr=0.05),
        replace(raw, name="B H .1 fast", outer_lr=0.3),
        replace(batch, name="B batch slow", outer_lr=0.05),
        replace(batch, name="B batch fast", outer_lr=0.3),
    ]


def quantile(values: Iterable[float], q: float) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[round(100 * q) - 1]


def summarise(rows: dict[str, list[Row]], burn_in: int) -> dict[str, Row]:
    table = {}
    for name, steps in rows.items():
        kept = steps[burn_in:]
        table[name] = {
            "error": statistics.median(r["error"] for r in kept),
            "error p90": quantile([r["error"] for r in kept], 0.9),
            "cosine": statistics.median(r["cosine"] for r in kept),
            "norm ratio": statistics.median(r["norm ratio"] for r in kept),
            "products": statistics.mean(r["products"] for r in kept),
        }
    return table


def show(name: str, table: dict[str, Row]) -> None:
    columns = ["products", "error", "error p90", "cosine", "norm ratio"]
    print(f"\n{name:28}" + "".join(f"{c:>11}" for c in columns))
    for strategy, row in table.items():
        print(f"  {strategy:26}" + "".join(f"{row[c]:11.4g}" for c in columns), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--data-root", help="folder that holds MNIST/raw; A uses digits without it")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--outer-steps", type=int, default=40)
    parser.add_argument("--burn-in", type=int, default=5, help="outer steps left out of medians")
    parser.add_argument("--only", default="", help="settings whose name contains this")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for setting in settings(args.data_root):
        if args.only not in setting.name:
            continue
        rows: dict[str, list[Row]] = defaultdict(list)
        for seed in args.seeds:
            for name, steps in visit(setting, seed, args.outer_steps).items():
                rows[name] += steps[args.burn_in :]
        show(setting.name, summarise(rows, 0))


if __name__ == "__main__":
    main()
