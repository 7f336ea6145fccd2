"""The programs of examples/integrations: θ of the plain program, the hypergradient of an oracle.

The plain program is made from the text of the other, so that the lines counted are those that
were changed.
"""

from __future__ import annotations

import importlib
import os
import re
import socket
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import together
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import hyperopt_torch
from hyperopt_torch import BilevelOptimizer, DenseSolve, Unrolled
from tests import oracles

FOLDER = Path(__file__).parent.parent / "examples" / "integrations"
MARKS = ("# bilevel", "# log")
DAMPING = 1.0  # far from the negative eigenvalues: rounding stays small
PROGRAMS = {  # what it needs, and the arguments of a short run
    "accelerate_loop": (["accelerate"], {"epochs": 1}),
    "hf_trainer_lora": (["accelerate", "peft", "transformers"], {"steps": 4}),
    "lightning_callback": (["lightning"], {"epochs": 1}),
    "lightning_manual": (["lightning"], {"epochs": 1}),
    "tensorboard_log": (["tensorboard"], {"epochs": 1}),
    "torchrun_loop": ([], {"epochs": 1}),
}
RUNS = [(name, PROGRAMS[name][1]) for name in PROGRAMS]
RUNS.append(("accelerate_loop", {"epochs": 1, "precision": "bf16"}))
SMALLER = {  # a model that a dense oracle can take
    "VOCABULARY, LENGTH = 32, 16": "VOCABULARY, LENGTH = 8, 6",
    "n_embd=32": "n_embd=8, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0",  # no noise
}


def source(name: str) -> str:
    text = (FOLDER / f"{name}.py").read_text()
    for old, new in SMALLER.items() if name == "hf_trainer_lora" else ():
        assert old in text
        text = text.replace(old, new)
    return text


def plain(text: str) -> str:
    """The program without this library."""
    kept = [line for line in text.splitlines() if not line.endswith(MARKS)]
    return re.sub(r"# plain: ", "", "\n".join(kept))


def run(text: str, arguments: dict) -> list[Tensor]:
    """θ at the end of the program's main."""
    if "accelerate" in sys.modules:  # its state is one for the whole process
        sys.modules["accelerate"].state.AcceleratorState._reset_state(reset_partial_state=True)
    torch.manual_seed(0)
    namespace = {"__name__": "program"}
    exec(compile(text, "program", "exec"), namespace)
    found = [p.detach().clone() for p in namespace["main"](**arguments).parameters()]
    if dist.is_initialized():  # the programs do it after main, too
        dist.destroy_process_group()
    return found


class Spy(BilevelOptimizer):
    """Outer steps that leave φ where it is; what they would have taken, beside an oracle."""

    made: Spy
    forced: dict | None = None  # the program's own settings, if None; then without an oracle

    def __init__(self, inner, outer, **settings):
        super().__init__(inner, outer, **{**settings, **(Spy.forced or {})})
        for group in outer.param_groups:
            group["lr"] = 0.0
        self.closures: list = []  # since the last outer step
        self.stepped = True
        self.pairs: list[tuple[Tensor, Tensor]] = []  # (found, expected)
        self.count = 0
        Spy.made = self

    def record(self, closure, weight=None):
        if self.stepped:
            self.closures = []
            self.stepped = False
        cells = tuple(types.CellType(c.cell_contents) for c in closure.__closure__ or ())
        code, names = closure.__code__, closure.__globals__
        self.closures.append(types.FunctionType(code, names, None, None, cells))
        return super().record(closure, weight)

    def outer_step(self, val_loss, *args, **kwargs):
        self.count += 1
        self.stepped = True
        if Spy.forced is not None and "ihvp" in Spy.forced:
            if len(self.pairs) < 2:
                found = oracles.flat(self.hypergradient(val_loss))
                self.pairs.append((found, self.expected(val_loss)))
            return val_loss.detach()
        return super().outer_step(val_loss, *args, **kwargs)

    def expected(self, val_loss: Tensor) -> Tensor:
        """By dense matrices from plain autograd, averaged over the processes."""
        problem = self.problem()
        inner, outer = problem.inner_parameters, problem.outer_parameters
        b = oracles.flat(torch.autograd.grad(val_loss, inner, retain_graph=True))

        def train_loss() -> Tensor:
            values = [c() for c in self.closures]
            return torch.stack([(v[0] if type(v) is tuple else v).mean() for v in values]).mean()

        with sdpa_kernel(SDPBackend.MATH):  # the fused one has no second derivative
            H, J = oracles.jacobians(train_loss, inner, outer)
        if dist.is_initialized():
            for t in (H, J, b):
                dist.all_reduce(t)
                t /= dist.get_world_size()
        decay = [  # coupled; AdamW's belongs to no objective
            torch.full_like(p, 0.0 if type(real) is torch.optim.AdamW else group["weight_decay"])
            for real in self._real
            for group in real.param_groups
            for p in group["params"]
        ]
        return -J.mT @ torch.linalg.solve(H + torch.diag(oracles.flat(decay) + DAMPING), b)


@pytest.fixture
def ready(monkeypatch, tmp_path):
    """The programs find their neighbour, write to a temporary folder, and use the spy."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setattr(hyperopt_torch, "BilevelOptimizer", Spy)
    monkeypatch.setattr(Spy, "forced", None)
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def needs(name: str) -> None:
    for module in PROGRAMS[name][0]:
        pytest.importorskip(module, reason=f"{name}.py needs {module}: the extra `integrations`")


def test_every_program_is_tried():
    assert {p.stem for p in FOLDER.glob("[!_]*.py")} == set(PROGRAMS)


@pytest.mark.parametrize("name", PROGRAMS)
def test_five_lines_or_fewer(name):
    text = source(name)
    for mark in MARKS:
        assert sum(line.endswith(mark) for line in text.splitlines()) <= 5
    assert len(text.splitlines()) <= 100
    for word in ("hyperopt_torch", "bilevel", "Bilevel", "weight(", "HealthLog"):
        assert word not in plain(text).split('"""', 2)[2]


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_page_shows_the_lines_of_the_program(name):
    page = (FOLDER.parent.parent / "docs" / "integrations.md").read_text()
    block = page.split(f"\n`{name}.py`.")[1].split("```diff\n")[1].split("\n```")[0].splitlines()
    lines = [line.strip() for line in (FOLDER / f"{name}.py").read_text().splitlines()]
    ours = [line.rsplit("  # ", 1)[0] for line in lines if line.endswith(MARKS)]
    theirs = [line.removeprefix("# plain: ") for line in lines if line.startswith("# plain: ")]
    assert [line[2:] for line in block if line.startswith("+")] == ours
    assert [line[2:] for line in block if line.startswith("-")] == theirs


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "arguments"), RUNS)
def test_inner_parameters_are_those_of_the_plain_program(name, arguments, ready):
    needs(name)
    pairs = zip(run(source(name), arguments), run(plain(source(name)), arguments), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
    assert Spy.made.count == Spy.made._steps["outer"] > 3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "arguments"), RUNS)
def test_hypergradient_is_that_of_dense_matrices(name, arguments, ready, monkeypatch):
    needs(name)
    Spy.forced = {"ihvp": DenseSolve(DAMPING)}
    monkeypatch.setattr(importlib.import_module("_digits").network, "__defaults__", (3,))
    run(source(name), arguments)
    rounded = name == "hf_trainer_lora" or "precision" in arguments  # differences; bfloat16
    assert len(Spy.made.pairs) == 2
    for found, expected in Spy.made.pairs:
        error = (found - expected).norm() / expected.norm()
        assert expected.norm() > 0
        assert error < (5e-2 if rounded else 1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_lightning_counts_steps_and_keeps_the_decay(ready, capsys):
    needs("lightning_manual")
    Spy.forced = {"estimator": Unrolled()}  # which automatic optimization refuses
    run(source("lightning_manual"), {"epochs": 1})
    assert "global_step                   12" in capsys.readouterr().out
    assert Spy.made.inner_facts() == (1.0, [1e-3] * 4)
    assert Spy.made.report.strategy.startswith("Unrolled")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_lightning_refuses_trajectories_under_automatic_optimization(ready):
    needs("lightning_callback")
    Spy.forced = {"estimator": Unrolled()}
    with pytest.raises(RuntimeError, match="manual optimization"):
        run(source("lightning_callback"), {"epochs": 1})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_tensorboard_gets_every_curve_and_the_figure(ready, tmp_path):
    needs("tensorboard_log")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(source("tensorboard_log"), {"epochs": 1})
    events = EventAccumulator(str(tmp_path / "results" / "tensorboard")).Reload()
    tags = events.Tags()
    names = {f"bilevel/{name}" for name in ("residual", "length", "products", "val_loss")}
    assert names < set(tags["scalars"])
    assert len(events.Scalars("bilevel/val_loss")) == 12
    assert tags["images"] == ["bilevel/health"]
    assert (tmp_path / "results" / "tensorboard" / "health.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_lightning_accumulates(ready, monkeypatch):
    """The hypergradient is that of both micro-batches, the last of which is inside of the step."""
    needs("lightning_callback")
    Spy.forced = {"ihvp": DenseSolve(DAMPING)}
    monkeypatch.setattr(importlib.import_module("_digits").network, "__defaults__", (3,))
    text = source("lightning_callback")
    text = text.replace("max_epochs=epochs,", "max_epochs=epochs, accumulate_grad_batches=2,")
    counted = "self.history.append(module.bilevel"
    text = text.replace(counted, f"if _[2] % 2: {counted}")
    run(text, {"epochs": 1})
    assert len(Spy.made.closures) == 2
    assert len(Spy.made.pairs) == 2
    for found, expected in Spy.made.pairs:
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-7)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def worker(rank: int, world: int, folder: str) -> None:
    """One of two processes, as torchrun would start it."""
    sys.path.insert(0, str(FOLDER))
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "localhost"}
    # A port for each program: on one, a process that is ahead meets the store of the first again.
    first, second = Path(folder, "ports").read_text().split()
    torch.set_num_threads(1)
    importlib.import_module("_digits").network.__defaults__ = (3,)
    hyperopt_torch.BilevelOptimizer = Spy  # type: ignore[misc]
    Spy.forced = {"ihvp": DenseSolve(DAMPING), "on_trouble": "ignore"}
    os.environ["MASTER_PORT"] = first
    ours = run(source("torchrun_loop"), {"epochs": 1})
    os.environ["MASTER_PORT"] = second
    theirs = run(plain(source("torchrun_loop")), {"epochs": 1})
    torch.save((ours, theirs, Spy.made.pairs), Path(folder, f"{rank}.pt"))


@pytest.mark.slow
def test_two_processes_are_the_union(tmp_path):
    (tmp_path / "ports").write_text(f"{free_port()} {free_port()}")
    found = together(worker, 2, tmp_path)
    for ours, theirs, pairs in found:
        assert all(map(torch.equal, ours, theirs))
        for hypergradient, expected in pairs:
            torch.testing.assert_close(hypergradient, expected, rtol=1e-3, atol=1e-7)
    assert torch.equal(found[0][2][1][0], found[1][2][1][0])
