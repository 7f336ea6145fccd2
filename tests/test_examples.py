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
    "imaml": [
        *("--steps", "2", "--meta-batch", "2", "--test-tasks", "4", "--val-tasks", "2"),
        *("--channels", "8"),
    ],
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
