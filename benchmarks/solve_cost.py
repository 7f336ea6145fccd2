"""What a solve costs beside its products: time, kernels, waits for the device, memory.

    python -m benchmarks.solve_cost [time] [kernels] [memory]
    python -m benchmarks.solve_cost large

1. `outer_step` of the default against the bare products that it does (two gradients and its joint
   products), CPU seconds on one thread, median over pairs run in turn.
2. For each strategy the operations on vectors of n entries, and the waits for the device, of one
   solve beyond its products. What is smaller is on the host, or would be nothing on a device.
3. For each strategy the peak memory of the first `outer_step`, a later one and a query, in vectors
   of n entries, beyond what lives all the time. Every strategy stands on 6 to 8 of them: the
   gradients of both losses, a product, its graph.
4. ``large``, by itself only: two outer steps of the default on a WRN-28-10 (3.6e7 parameters), two
   images: CPU seconds, products, and the peak of this process.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hyperopt_torch as ht

from ._memory import resident
from ._models import wide_resnet_problem
from .overhead import paired_ratio

STRATEGIES: dict[str, Callable[[], dict[str, Any]]] = {
    "default": dict,
    "RecycledCG()": lambda: {"ihvp": ht.RecycledCG()},
    "RecycledCG(20)": lambda: {"ihvp": ht.RecycledCG(20)},
    "NystromPCG()": lambda: {"ihvp": ht.NystromPCG()},
    "CG()": lambda: {"ihvp": ht.CG()},
    "CG(preconditioner=RecycledPairs())": lambda: {
        "ihvp": ht.CG(preconditioner=ht.RecycledPairs())
    },
    "Neumann()": lambda: {"ihvp": ht.Neumann()},
    "LancBiO()": lambda: {"ihvp": ht.LancBiO()},
    "SubBiO(.1)": lambda: {"ihvp": ht.SubBiO(0.1)},
    "Nystrom()": lambda: {"ihvp": ht.Nystrom()},
    "Nystrom(chunk_size=1)": lambda: {"ihvp": ht.Nystrom(chunk_size=1)},
    "NHGD()": lambda: {"ihvp": ht.NHGD()},
    "Identity()": lambda: {"ihvp": ht.Identity()},
    "Identity(rescale=True)": lambda: {"ihvp": ht.Identity(rescale=True)},
}


class Diagonal:
    """f = ½Σ d θ² - Σ φ_j Σ_{i≡j} θ_i over a vector of n entries; g = ½‖θ - 1‖²."""

    def __init__(self, n: int, outer: int = 10, **settings: Any) -> None:
        self.theta = torch.zeros(n, requires_grad=True)
        self.phi = torch.ones(outer, requires_grad=True)
        self.d = torch.logspace(0, -3, n)
        self.bo = ht.BilevelOptimizer(
            torch.optim.SGD([self.theta], lr=0.1),
            torch.optim.SGD([self.phi], lr=0.0),
            self_check=False,
            on_trouble="ignore",
            **settings,
        )

    def train_loss(self) -> Tensor:
        linear = (self.theta.view(len(self.phi), -1).sum(1) * self.phi).sum()
        return (self.d * self.theta).mul(self.theta).sum() / 2 - linear

    def val_loss(self) -> Tensor:
        return (self.theta - 1).square().sum() / 2

    def step(self) -> None:
        self.bo.inner_step(self.train_loss)
        self.bo.outer_step(self.val_loss())


class Network:
    """Hyper-cleaning: a weight for each sample of one batch."""

    def __init__(self, widths: tuple[int, ...], batch: int, act: type[nn.Module]) -> None:
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(widths):
            layers += [nn.Linear(a, b), act()]
        self.model, self.x = nn.Sequential(*layers[:-1]), torch.randn(2, batch, widths[0])
        self.y = torch.randint(widths[-1], (2, batch))
        self.phi = torch.zeros(batch, requires_grad=True)
        self.bo = ht.BilevelOptimizer(
            torch.optim.SGD(self.model.parameters(), lr=0.01),
            torch.optim.SGD([self.phi], lr=0.0),
            self_check=False,
            on_trouble="ignore",
        )

    def train_loss(self) -> tuple[Tensor, Tensor]:
        outputs = self.model(self.x[0])
        losses = F.cross_entropy(outputs, self.y[0], reduction="none")
        return (self.phi.sigmoid() * losses).mean(), outputs

    def val_loss(self) -> Tensor:
        return F.cross_entropy(self.model(self.x[1]), self.y[1])


def outer_step_ratio(problem: Any, products: int, pairs: int = 9) -> float:
    """CPU seconds of outer_step over those of its gradients and its joint products."""
    bo, inner = problem.bo, [p for group in problem.bo.inner.param_groups for p in group["params"]]
    for _ in range(8):
        bo.inner_step(problem.train_loss)
        bo.outer_step(problem.val_loss())

    def ours() -> None:
        bo.outer_step(problem.val_loss())
        assert bo.report.matvecs <= products + 1, bo.report.matvecs

    def bare() -> None:
        b = torch.autograd.grad(problem.val_loss(), inner)
        loss = problem.train_loss()
        outputs = loss[1] if isinstance(loss, tuple) else None
        loss = loss[0] if isinstance(loss, tuple) else loss
        grads = torch.autograd.grad(loss, inner, create_graph=True)
        if outputs is None:
            for _ in range(products):
                torch.autograd.grad(grads, [*inner, problem.phi], b, retain_graph=True)
            return
        # Jᵀ S (J v), J v by the vector-Jacobian product's own derivative; and the cross product.
        residual = torch.autograd.grad(loss, outputs, create_graph=True)[0]
        dummy = torch.zeros_like(outputs, requires_grad=True)
        pulled = torch.autograd.grad(outputs, inner, dummy, create_graph=True)
        for _ in range(products):
            (pushed,) = torch.autograd.grad(pulled, dummy, b, retain_graph=True)
            (scaled,) = torch.autograd.grad(residual, outputs, pushed, retain_graph=True)
            torch.autograd.grad(outputs, inner, scaled, retain_graph=True)
            torch.autograd.grad(grads, problem.phi, b, retain_graph=True)

    return paired_ratio(ours, bare, pairs)


class Timed(ht.operators.Dense):
    """diag(d) with Jᵀx = jᵀx: products apart, timed and not counted."""

    def __init__(self, d: Tensor) -> None:
        super().__init__(d[:, None], d[:, None])
        self.shape, self.seconds, self.inside = (len(d), len(d)), 0.0, False

    def _joint(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._product(x), self._product(x)[:1]

    def _product(self, x: Tensor) -> Tensor:
        start, self.inside = time.process_time(), True
        y = self.matrix[:, 0] * x
        self.seconds, self.inside = self.seconds + time.process_time() - start, False
        return y

    def _products(self, X: Tensor) -> Tensor:
        return torch.stack([self._product(x) for x in X.unbind(1)]).mT


class Kernels(TorchDispatchMode):
    """Counts operations on as many entries as a vector has, views excepted; and reads by host."""

    def __init__(self, operator: Timed) -> None:
        super().__init__()
        self.operator, self.count, self.syncs = operator, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if not self.operator.inside:
            n = self.operator.shape[0]
            tensors = [t for t in tree_leaves((args, kwargs or {}, out)) if isinstance(t, Tensor)]
            view = func.is_view or "as_strided" in func.name()
            self.count += not view and any(t.numel() >= n for t in tensors)
            self.syncs += "_local_scalar_dense" in func.name()
        return out


def kernels(ihvp: ht.IHVP, n: int = 1482) -> tuple[int, int, int]:
    """Products, kernels, and reads of one number by the host, of the ninth solve."""
    b = torch.randn(n)
    for step in range(9):
        operator = Timed(torch.logspace(0, -3, n) * (1 + 0.001 * step))
        with Kernels(operator) as seen:
            ihvp.solution(operator, b)
    return operator.matvecs, seen.count, seen.syncs


class Memory(TorchDispatchMode):
    """The peak of the bytes in storages that live, as operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = self.floor = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.untyped_storage().nbytes() > 4096:
                storage = t.untyped_storage()
                self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, self.now())
        return out

    def now(self) -> int:
        self.live = {k: (ref, size) for k, (ref, size) in self.live.items() if not ref.expired()}
        return sum(size for _, size in self.live.values())


def memory(settings: dict[str, Any], n: int = 200_000) -> tuple[float, float, float]:
    """Peaks, in vectors of n float32 entries: of the first outer_step, a later one, a query."""
    peaks = []
    with Memory() as seen:
        problem = Diagonal(n, **settings)
        base = seen.now()
        for step in range(8):
            problem.bo.inner_step(problem.train_loss)
            seen.peak = 0
            if step < 7:
                problem.bo.outer_step(problem.val_loss())
            else:
                problem.bo.hypergradient(problem.val_loss())
            peaks.append((seen.peak - base) / (4 * n))
    return peaks[0], peaks[6], peaks[7]


def wide_resnet() -> None:
    model, weights, train_loss, val_loss = wide_resnet_problem(28, 10, batch=2)
    bo = ht.BilevelOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.01),
        torch.optim.Adam([weights], lr=0.1),
        self_check=False,
        on_trouble="ignore",
    )
    bo.inner_step(train_loss)
    for step in ("first", "second"):
        start = time.process_time()
        bo.outer_step(val_loss())
        seconds, peak = time.process_time() - start, resident("VmHWM") / 1e9
        print(
            f"WRN-28-10, {step} outer step: {seconds:.0f} s, {bo.report.matvecs} products, "
            f"peak of the process {peak:.1f} GB",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("parts", nargs="*", default=["time", "kernels", "memory"])
    parts = parser.parse_args().parts
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if "large" in parts:
        wide_resnet()
    if "time" in parts:
        print("outer_step of the default / bare products                     ratio")
        small, large = (64, 20, 10), (784, 800, 400, 10)
        for name, problem in (
            ("tanh MLP, n = 1510, Gauss-Newton, batch 500", Network(small, 500, nn.Tanh)),
            ("ReLU MLP, n = 952k, Gauss-Newton, batch 128", Network(large, 128, nn.ReLU)),
        ):
            print(f"  {name:58}{outer_step_ratio(problem, 3):7.2f}", flush=True)
        n, solver = 1_000_000, ht.RecycledCG(20)
        diagonal = Diagonal(n)
        print(f"  {'diagonal, n = 1e6, Hessian':58}{outer_step_ratio(diagonal, 3):7.2f}")
        seconds = []
        for step in range(12):
            operator = Timed(torch.logspace(0, -3, n) * (1 + 0.001 * step))
            before = time.process_time()
            solver.solution(operator, diagonal.theta.detach() + 1)
            seconds.append(time.process_time() - before - operator.seconds)
        print(f"  vector work of a solve, n = 1e6, ms {1e3 * statistics.median(seconds[4:]):29.1f}")
    if "kernels" in parts:
        print("a solve, n = 1482" + " " * 25 + "products  kernels  reads by the host")
        for name, make in STRATEGIES.items():
            ihvp = make().get("ihvp")
            if ihvp is not None and not ihvp.observes:
                found = kernels(ihvp)
                print(f"  {name:40}{found[0]:8}{found[1]:9}{found[2]:9}", flush=True)
    if "memory" in parts:
        print("peak memory in vectors of n entries           first   later   query")
        for name, make in STRATEGIES.items():
            print(f"  {name:42}", *(f"{x:7.1f}" for x in memory(make())), flush=True)


if __name__ == "__main__":
    main()
