"""Two and four processes (gloo), each with its part of the data: the answer is the union's."""

from __future__ import annotations

import time
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import join, refusal, together
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hyperopt_torch import (
    CG,
    NHGD,
    PZOBO,
    BilevelOptimizer,
    DenseSolve,
    FiniteDifference,
    GaussNewton,
    Identity,
    LancBiO,
    Neumann,
    Nystrom,
    NystromPCG,
    PerSample,
    RecycledCG,
    SubBiO,
    Unrolled,
)

SAMPLES = 16
STRATEGIES = {
    "default": lambda: {},
    "nystrom": lambda: {"ihvp": Nystrom(5)},
    "nystrom-space": lambda: {"ihvp": Nystrom(5, 0.1, chunk_size=2)},
    "nystrom-gaussian": lambda: {"ihvp": Nystrom(5, sketch="gaussian")},
    "cg": lambda: {"ihvp": CG(8, damping=0.2, warm_start=True)},
    "cg-auto": lambda: {"ihvp": CG(5, tol=0.0, damping="auto"), "curvature": GaussNewton()},
    "neumann": lambda: {"ihvp": Neumann(8, damping=0.2)},
    "nystrom-pcg": lambda: {"ihvp": NystromPCG(5, damping=0.2)},
    "recycled-cg": lambda: {"ihvp": RecycledCG(10, damping=0.2), "curvature": GaussNewton()},
    "lancbio": lambda: {"ihvp": LancBiO(5, damping=0.2)},
    "subbio": lambda: {"ihvp": SubBiO(0.5, damping=0.2)},
    "identity": lambda: {"ihvp": Identity()},
    "dense": lambda: {"ihvp": DenseSolve(0.2)},
    "nhgd": lambda: {"ihvp": NHGD(8)},
    "nhgd-kronecker": lambda: {"ihvp": NHGD(structure="kronecker", rows="per_sample", samples=4)},
    "nhgd-per-sample": lambda: {"ihvp": NHGD(8, rows="per_sample", samples=4)},
    "unrolled": lambda: {"estimator": Unrolled()},
    "pzobo": lambda: {"estimator": PZOBO(2, antithetic=True)},
    "pzobo-limit": lambda: {"estimator": PZOBO(2, smoothing=0)},
    "differences": lambda: {"ihvp": CG(5, damping=0.2), "curvature": FiniteDifference()},
    "differences-nystrom": lambda: {"ihvp": Nystrom(5), "curvature": FiniteDifference()},
}


def run(settings: dict, rank: int, world: int, wrapped: bool = True, **options) -> torch.Tensor:
    """Outer parameters after five outer steps, and the inner ones: hyper-cleaning of a tanh MLP."""
    samples = isinstance(settings.get("ihvp"), NHGD)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    data = torch.randn(2, SAMPLES, 4, dtype=torch.float64)
    labels = torch.randint(3, (2, SAMPLES))
    decay = torch.full((4,), -2.0, dtype=torch.float64, requires_grad=True)
    part = slice(rank * SAMPLES // world, (rank + 1) * SAMPLES // world)
    torch.manual_seed(rank)  # processes differ in this, as they do where data is drawn
    model = DistributedDataParallel(net) if world > 1 and wrapped else net
    bo = BilevelOptimizer(
        torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.5),
        torch.optim.SGD([decay], lr=0.5),
        **settings,
        **options,
    )

    def train():
        outputs = model(data[0, part])
        groups = [p.square().sum() for p in net.parameters()]
        penalty = decay.exp() @ torch.stack(groups)
        losses = F.cross_entropy(outputs, labels[0, part], reduction="none")
        return (PerSample(losses, None, penalty)) if samples else (losses.mean() + penalty, outputs)

    for _ in range(5):
        for _ in range(4):
            bo.inner_step(train)
        bo.outer_step(F.cross_entropy(model(data[1, part]), labels[1, part]))
    group = bo._processes.group
    messages = group.messages if group else 0
    state = torch.cat([decay.detach(), *(p.detach().flatten() for p in net.parameters())])
    return torch.cat([state, torch.tensor([float(messages), float(bo.report.matvecs)])])


def worker(rank: int, world: int, folder: str) -> None:
    join(rank, world, folder)
    found: dict = {}
    for name, make in STRATEGIES.items():
        torch.manual_seed(7 + rank)  # a seed for each process: the strategies must agree on one
        found[name] = run(make(), rank, world)
    group = dist.group.WORLD
    found["refused"] = {
        "unknown": refusal(lambda: run({}, rank, world, wrapped=False)),
        "own": refusal(lambda: run({}, rank, world, wrapped=False, process_group=False)),
        "given": refusal(lambda: run({}, rank, world, process_group=group)),
    }
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def alone() -> dict[str, torch.Tensor]:
    found = {}
    for name, make in STRATEGIES.items():
        torch.manual_seed(7)  # that of the first process
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found[name] = run(make(), 0, 1)
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_processes_give_what_one_gives_on_all_data(world, alone, tmp_path: Path):
    ranks = together(worker, world, tmp_path)
    for name, expected in alone.items():
        for found in ranks:
            assert torch.equal(found[name], ranks[0][name]), f"{name}: processes differ"
        far = (ranks[0][name][:-2] - expected[:-2]).norm() / expected[:-2].norm()
        assert far < (1e-6 if "differences" in name else 1e-10), name
        messages, products = ranks[0][name][-2:].tolist()
        # b and c, the numbers of the report, and a message a product, or for a batch of them; the
        # self-check once. SubBiO takes one product at first, and three later.
        known = {"identity": 5 * (2 + 1) + 1, "nystrom": 5 * (2 + 2) + 1, "subbio": 10 + 13 + 1}
        assert messages == known.get(name, messages), name
        assert messages <= 5 * (2 + 25 + products)
    refused = ranks[0]["refused"]
    assert "process_group=torch.distributed.group.WORLD" in refused["unknown"]
    assert refused["own"] == refused["given"] == ""


def test_a_group_without_processes_is_refused():
    w, phi = (torch.ones(1, requires_grad=True) for _ in range(2))
    bo = BilevelOptimizer(
        torch.optim.SGD([w], lr=0.1), torch.optim.SGD([phi], lr=0.1), process_group=object()
    )
    bo.inner_step(lambda: (w - phi).square().sum())
    with pytest.raises(RuntimeError, match="init_process_group"):
        bo.outer_step(w.sum())


def failing_worker(rank: int, world: int, folder: str) -> None:
    """The first process waits for the second, whose closure raises in the outer step."""
    join(rank, world, folder, timeout=timedelta(seconds=3))
    torch.manual_seed(0)
    net = nn.Linear(3, 1)
    model = DistributedDataParallel(net)
    phi = torch.zeros(1, requires_grad=True)
    bo = BilevelOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), torch.optim.SGD([phi], lr=0.1))
    bo.inner_step(lambda: model(torch.ones(2, 3)).square().mean() * phi.exp().sum())

    def train():
        if rank == 1:
            raise ZeroDivisionError
        return model(torch.ones(2, 3)).square().mean() * phi.exp().sum()

    val = model(torch.ones(2, 3)).mean()
    try:
        bo.outer_step(val, train)
    except (RuntimeError, ZeroDivisionError) as error:
        kind = type(error).__name__
        torch.save({"kind": kind}, f"{folder}/{rank}.pt")
    if rank == 1:  # alive, so that it is the timeout that ends the other
        while not Path(f"{folder}/0.pt").exists():
            time.sleep(0.2)


def test_a_process_that_raises_ends_the_others_within_the_timeout(tmp_path: Path):
    first, second = together(failing_worker, 2, tmp_path, seconds=120)
    assert second["kind"] == "ZeroDivisionError"
    assert first["kind"] != "ZeroDivisionError"
