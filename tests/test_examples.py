"""Every example explains itself, runs, prints its table and draws its figure."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent
DATA = ROOT.parent / "shared" / "data"

SMALL = {
    "architecture_weights": ["--steps", "60"],
    "augmentation": ["--steps", "110"],
    "cg_defects": ["--seeds", "0", "--outer-steps", "1"],
    "data_reweighting": [
        *("--steps", "20", "--imbalance", "50", "--strategies", "default", "nystrom"),
    ],
    "dataset_distillation": ["--outer-steps", "5"],
    "few_shot_features": [
        *("--outer-steps", "2", "--inner-steps", "5", "--meta-batch", "1", "--test-tasks", "2"),
        *("--channels", "4"),
    ],
    "few_shot_heads": ["--steps", "5", "5", "--test-tasks", "50", "--channels", "8"],
    "hyper_representation": ["--outer-steps", "3"],
    "imaml": ["--steps", "2", "--tasks", "2", "--test-tasks", "4", "--channels", "8"],
    "imaml_at_prior": [
        *("--inner-steps", "5", "--lams", "2", "--tasks", "1", "--channels", "8"),
    ],
    "lancbio_cleaning": ["--steps", "5", "--train", "200", "--noise", "0.5"],
    "lancbio_synthetic": ["--steps", "5", "--size", "60"],
    "lancbio_text": ["--steps", "5", "--seeds", "0"],
    "learn_learning_rate": ["--steps", "20", "--grid-lr", "0.001", "--grid-decay", "1e-4"],
    "nhgd": ["--outer-steps", "5"],
    "first_loop": [],
    "hyper_cleaning": ["--steps", "20", "--train", "100"],
    "distributed_cleaning": ["--steps", "20"],
    "lora_data_weights": ["--steps", "5", "--batch", "4"],
    "learning_rate_schedule": ["--steps", "10", "--trainings", "2"],
    "low_rank_inverse": [],
    "multitask_weights": ["--steps", "110"],
    "weight_decay": ["--seeds", "0", "--outer-steps", "2"],
}
OF_TRAINERS = {"lora_data_weights"}  # needs libraries beyond the extra of the examples
PROGRAMS = {"first_loop"}  # the documentation's: no command line, no table, no figure


def run(name, *args, cwd):
    return subprocess.run(
        [sys.executable, ROOT / "examples" / f"{name}.py", *args],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )


def test_every_example_is_tried():
    assert {p.stem for p in (ROOT / "examples").glob("*.py")} == set(SMALL)


@pytest.mark.slow  # a process each, which imports torch and matplotlib
@pytest.mark.parametrize("name", SMALL)
def test_runs_small(name, tmp_path):
    if name in OF_TRAINERS:
        pytest.importorskip("peft")
        pytest.importorskip("transformers")
    done = run(name, *SMALL[name], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    figures = list(tmp_path.rglob("*.png"))
    assert bool(figures) is (name not in PROGRAMS)
    assert all(f.stat().st_size < 300 * 1024 for f in figures)
    assert "nan" not in done.stdout.lower()
    assert name in PROGRAMS or len(done.stdout.splitlines()) > 5


ALL_HELP = """
import runpy, sys
folder, *names = sys.argv[1:]
sys.path.insert(0, folder)
for name in names:
    sys.argv = [name, "--help"]
    try:
        runpy.run_path(f"{folder}/{name}.py", run_name="__main__")
    except SystemExit as end:
        assert not end.code, name
    print("END OF", name)
"""


@pytest.mark.slow
def test_help(tmp_path):
    """One process for all: most of each would go into importing torch."""
    names = [name for name in SMALL if name not in OF_TRAINERS | PROGRAMS]
    done = subprocess.run(
        [sys.executable, "-c", ALL_HELP, str(ROOT / "examples"), *names],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    texts = done.stdout.split("END OF")[: len(names)]
    assert all("--seed" in text for text in texts)


@pytest.mark.parametrize("shots", [1, 5])
def test_heads_are_solved(shots, monkeypatch):
    """few_shot_heads.py: implicit differentiation needs the optimum."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    from _shared.heads import fit_head, labels

    torch.manual_seed(0)
    shown = F.relu(torch.randn(5 * shots, 256)) / 16
    y, penalty = labels(len(shown), 5), 0.01

    def slope(head):
        return torch.func.grad(
            lambda w: F.cross_entropy(shown @ w, y) + penalty / 2 * w.square().sum()
        )(head)

    head = fit_head(shown, 5, penalty)
    assert slope(head).norm() < 1e-4 * slope(torch.zeros_like(head)).norm()


def test_imaml_solves_each_task(monkeypatch):
    """imaml.py: linearised networks under vmap give what the optimizer's Gauss-Newton gives."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import imaml
    from _shared.fewshot import load_few_shot

    from hyperopt_torch import BilevelOptimizer, ConjugateGradient, GaussNewton

    s = imaml.Settings(channels=4, tasks=2, inner_steps=2, lam=2.0)
    data = load_few_shot("digits")
    task = data.train.tasks(2, s.ways, 1, s.queries, torch.Generator().manual_seed(0))
    monkeypatch.setitem(
        imaml.SOLVERS, "cg", (lambda rho: ConjugateGradient(30, tol=0.0, damping=rho), 30)
    )
    each = imaml.Learner("cg", 0, data.width, s)
    found = each.gradients(task)

    whole = imaml.Learner("default", 0, data.width, s)
    whole.bilevel = BilevelOptimizer(
        whole.bilevel.inner,
        whole.bilevel.outer,
        ihvp=ConjugateGradient(30, tol=1e-7),
        curvature=GaussNewton(),
    )
    a, b = (torch.cat([g.flatten() for g in parts]) for parts in (found, whole.gradients(task)))
    assert (a - b).norm() < 1e-3 * b.norm()

    identity = imaml.Learner("identity", 0, data.width, s)
    first = imaml.Learner("first-order", 0, data.width, s)
    first.lam = s.lam  # the same fitted networks
    for a, b in zip(identity.gradients(task), first.gradients(task), strict=True):
        assert torch.allclose(a, b, atol=1e-6)  # x = b / λ is MAML of first order


def test_imaml_counts_its_products(monkeypatch):
    """imaml.py: under vmap there is no report, so the table has them from SOLVERS."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import imaml
    from _shared.fewshot import load_few_shot

    from hyperopt_torch import functional

    operators = []

    class Counted(functional._PullbackOperator):
        def __init__(self, *args):
            super().__init__(*args)
            operators.append(self)

    monkeypatch.setattr(functional, "_PullbackOperator", Counted)
    s = imaml.Settings(channels=4, tasks=2, inner_steps=1)
    data = load_few_shot("digits")
    task = data.train.tasks(2, s.ways, 1, s.queries, torch.Generator().manual_seed(0))
    for name, (_, products) in imaml.SOLVERS.items():
        operators.clear()
        imaml.Learner(name, 0, data.width, s).gradients(task)
        assert [operator.matvecs for operator in operators] == [products], name


def test_zeroth_order_is_the_slope_along_u(monkeypatch):
    """HOZOG in hyper_representation.py, on F with a known gradient."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    from _shared.estimators import zeroth_order

    torch.manual_seed(0)
    phi = torch.randn(3, dtype=torch.float64, requires_grad=True)
    before, slope = phi.detach().clone(), 2 * phi.detach()
    random = torch.get_rng_state()
    loss = zeroth_order(lambda: phi.square().sum(), [phi], 1e-6, 1)
    torch.set_rng_state(random)
    u = torch.randn_like(phi)
    assert torch.equal(phi.detach(), before)
    assert loss == before.square().sum()
    assert torch.allclose(phi.grad, (slope @ u) * u, atol=1e-4)


@pytest.mark.slow
def test_missing_data_is_said(tmp_path):
    done = run("hyper_cleaning", "--data", "mnist", cwd=tmp_path)
    assert done.returncode != 0
    assert "--data-root" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not DATA.exists(), reason="no ../shared/data beside the checkout")
def test_mnist(tmp_path):
    pytest.importorskip("torchvision", reason="the test extra does without torchvision")
    done = run(
        "hyper_cleaning",
        *("--data", "mnist", "--data-root", str(DATA), "--steps", "20", "--train", "100"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "MNIST, 28x28" in done.stdout
