"""Parameters in parts over two and four processes (FSDP2, gloo): the answer is that of one."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import join, refusal, together
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hyperopt_torch import (
    CG,
    BilevelOptimizer,
    DenseSolve,
    FiniteDifference,
    Identity,
    LancBiO,
    Neumann,
    Nystrom,
    NystromPCG,
    RecycledCG,
    SubBiO,
)

if not hasattr(torch.cpu.Stream, "record_event"):  # as 2.6
    pytest.skip("fully_shard of this torch does not run on the CPU", allow_module_level=True)

SAMPLES, OUTER = 16, 5
STRATEGIES = {
    "default": lambda: {},
    "nystrom": lambda: {"ihvp": Nystrom(5)},
    "nystrom-space": lambda: {"ihvp": Nystrom(5, 0.1, chunk_size=2)},
    "cg": lambda: {"ihvp": CG(8, damping=0.2, warm_start=True)},
    "cg-auto": lambda: {"ihvp": CG(5, tol=0.0, damping="auto")},
    "neumann": lambda: {"ihvp": Neumann(8, damping=0.2)},
    "recycled-cg": lambda: {"ihvp": RecycledCG(10, damping=0.2)},
    "lancbio": lambda: {"ihvp": LancBiO(5, damping=0.2)},
    "subbio": lambda: {"ihvp": SubBiO(0.5, damping=0.2)},
    "identity": lambda: {"ihvp": Identity()},
    "dense": lambda: {"ihvp": DenseSolve(0.2)},
    # Each process draws its own part of a random sketch: its exact limit does not depend on it.
    "nystrom-gaussian": lambda: {"ihvp": Nystrom(99, 0.2, sketch="gaussian")},
    "nystrom-pcg": lambda: {"ihvp": NystromPCG(99, damping=0.2)},
}


def chosen(world: int) -> dict:
    """Without those of many products on four processes: two cores."""
    many = ("dense", "nystrom-gaussian", "nystrom-pcg", "nystrom-space", "neumann", "cg-auto")
    return {k: v for k, v in STRATEGIES.items() if world == 2 or k not in many}


def network(world: int, **options) -> nn.Sequential:
    """A tanh network, its three weights and biases uneven over the processes."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    if world > 1:
        mesh = init_device_mesh("cpu", (world,))
        for module in (net[0], net[2], net):
            fully_shard(module, mesh=mesh, **options)
    return net


class Run:
    """Weights of two terms of a loss, learned on half of the data."""

    def __init__(self, settings: dict, rank: int, world: int, adam: bool = False, **options):
        self.net = network(world, **options)
        generator = torch.Generator().manual_seed(1)
        self.data = torch.randn(2, SAMPLES, 4, dtype=torch.float64, generator=generator)
        self.labels = torch.randint(3, (2, SAMPLES), generator=generator)
        self.phi = torch.full((2,), -1.0, dtype=torch.float64, requires_grad=True)
        self.part = slice(rank * SAMPLES // world, (rank + 1) * SAMPLES // world)
        inner = (
            torch.optim.AdamW(self.net.parameters(), lr=0.02, weight_decay=0.1)
            if adam
            else torch.optim.SGD(self.net.parameters(), lr=0.3, momentum=0.5, weight_decay=0.02)
        )
        self.bo = BilevelOptimizer(
            inner,
            torch.optim.Adam([self.phi], lr=0.1),
            curvature=FiniteDifference(),
            **settings,
        )

    def train(self):
        outputs = self.net(self.data[0, self.part])
        loss = F.cross_entropy(outputs, self.labels[0, self.part])
        weights = self.phi.exp()
        return (
            loss + weights[0] * outputs.square().mean() + weights[1] * outputs[:, 0].pow(4).mean()
        )

    def val(self) -> torch.Tensor:
        outputs = self.net(self.data[1, self.part])
        return F.cross_entropy(outputs, self.labels[1, self.part]) + 0.01 * self.phi.sum()

    def steps(self, outer: int, inner: int = 2) -> None:
        for _ in range(outer):
            for _ in range(inner):
                self.bo.inner_step(self.train)
            self.bo.outer_step(self.val())

    def state(self) -> torch.Tensor:
        theta = [p.detach() for p in self.net.parameters()]
        whole = [t.full_tensor() if hasattr(t, "full_tensor") else t for t in theta]
        return torch.cat([self.phi.detach(), *(t.flatten() for t in whole)])

    def messages(self) -> float:
        group = self.bo._processes.group
        return 0.0 if group is None else float(group.messages)


def worker(rank: int, world: int, folder: str) -> None:
    join(rank, world, folder)
    found: dict = {"messages": {}}
    for name, make in chosen(world).items():
        torch.manual_seed(7 + rank)  # a seed for each process: the strategies must agree on one
        run = Run(make(), rank, world)
        run.steps(OUTER)
        found[name], found["messages"][name] = run.state(), run.messages()

    # What stays gathered after a backward pass must not be taken for the shards that moved.
    torch.manual_seed(7 + rank)
    run = Run({}, rank, world)
    for _ in range(2):
        for _ in range(2):
            run.bo.inner_step(run.train)
        run.net.set_reshard_after_backward(False)
        run.bo.outer_step(run.val())
        run.net.set_reshard_after_backward(True)
    found["resharded late"] = run.state()

    found["query"] = query(rank, world)
    found["list"] = as_lists(rank, world)
    found["resumed"] = resumed(rank, world, folder)
    found["refused"] = refusals(rank, world)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def query(rank: int, world: int) -> bool:
    """Whether a query changes nothing, bit for bit."""
    run = Run({}, rank, world)
    run.steps(2)
    before = [p.detach().to_local().clone() for p in run.net.parameters()]
    grads = [p.grad.to_local().clone() for p in run.net.parameters()]
    places = [p.to_local().data_ptr() for p in run.net.parameters()]
    run.bo.hypergradient(run.val())
    after = list(run.net.parameters())
    return all(
        torch.equal(b, p.to_local()) and torch.equal(g, p.grad.to_local())
        for b, g, p in zip(before, grads, after, strict=True)
    ) and places == [p.to_local().data_ptr() for p in after]


def as_lists(rank: int, world: int) -> torch.Tensor:
    """Both losses as two micro-batches of the same batch."""
    torch.manual_seed(7 + rank)
    run = Run({}, rank, world)
    for _ in range(2):
        for _ in range(2):
            run.bo.inner_step(run.train)
        run.bo.outer_step([run.val, run.val], [run.train, run.train])
    return run.state()


def resumed(rank: int, world: int, folder: str) -> bool:
    """Whether a run goes on bit for bit from a checkpoint of torch.distributed.checkpoint."""
    import torch.distributed.checkpoint as dcp

    run = Run({}, rank, world, adam=True)
    run.steps(2)
    dcp.save(
        {"model": run.net.state_dict(), "bilevel": run.bo, "phi": run.phi.detach().clone()},
        checkpoint_id=f"{folder}/checkpoint",
    )
    run.steps(2)
    other = Run({}, rank, world, adam=True)
    state = {"model": other.net.state_dict(), "bilevel": other.bo, "phi": other.phi.detach()}
    dcp.load(state, checkpoint_id=f"{folder}/checkpoint")
    other.net.load_state_dict(state["model"])
    other.phi.data.copy_(state["phi"])
    other.steps(2)
    return torch.equal(run.state(), other.state())


def refusals(rank: int, world: int) -> dict[str, str]:
    exact = Run({}, rank, world).bo
    silent = Run({}, rank, world)
    silent.steps(1)
    silent.net.set_requires_gradient_sync(False)
    mixed = Run({}, rank, world)
    mixed.bo = BilevelOptimizer(
        torch.optim.SGD([*mixed.net.parameters(), torch.ones(2, requires_grad=True)], lr=0.1),
        mixed.bo.outer,
        curvature=FiniteDifference(),
    )
    outer = Run({}, rank, world)
    head = list(outer.net[2].parameters())
    outer.bo = BilevelOptimizer(
        torch.optim.SGD(outer.net[0].parameters(), lr=0.1),
        torch.optim.SGD(head, lr=0.1),
        curvature=FiniteDifference(),
    )
    return {
        "exact": refusal(lambda: BilevelOptimizer(exact.inner, exact.outer, ihvp=CG(5))),
        "silent": refusal(lambda: silent.bo.outer_step(silent.val())),
        "mixed": refusal(lambda: mixed.steps(1)),
        "outer": refusal(lambda: outer.steps(1)),
    }


@pytest.fixture(scope="module")
def alone() -> dict[str, torch.Tensor]:
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, make in STRATEGIES.items():
            torch.manual_seed(7)  # that of the first process
            run = Run(make(), 0, 1)
            run.steps(OUTER)
            found[name] = run.state()
        torch.manual_seed(7)
        run = Run({}, 0, 1)
        run.steps(2)
        found["resharded late"] = found["list"] = run.state()
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_shards_give_what_one_process_gives_on_all_data(world, alone, tmp_path: Path):
    ranks = together(worker, world, tmp_path)
    for name, expected in alone.items():
        if name in STRATEGIES and name not in chosen(world):
            continue
        for found in ranks:
            assert torch.equal(found[name], ranks[0][name]), f"{name}: processes differ"
        far = (ranks[0][name] - expected).norm() / expected.norm()
        assert far < 1e-6, name
    for found in ranks:
        assert found["query"]
        assert found["resumed"]
        assert "curvature=FiniteDifference()" in found["refused"]["exact"]
        assert "set_requires_gradient_sync(True)" in found["refused"]["silent"]
        assert "one-dimensional mesh" in found["refused"]["mixed"]
        assert "Outer parameters are sharded" in found["refused"]["outer"]
    # A sum over all entries is a message; so are the parts of φ, and the step of a difference.
    assert ranks[0]["messages"]["identity"] <= 5 * 16
    assert ranks[0]["messages"]["default"] <= 5 * 32
