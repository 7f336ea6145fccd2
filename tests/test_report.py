"""The report alone: each kind of trouble just where it begins, read from the device once.

What the estimators put into it, and what BilevelOptimizer says of it, is in test_trust.py.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hyperopt_torch import HypergradientError, HypergradientWarning
from hyperopt_torch.report import KINDS, SelfCheck, SolveReport, plain

PAGE = Path(__file__).parent.parent / "docs" / "troubleshooting.md"
NAN, INF = math.nan, math.inf


def report(**fields) -> SolveReport:
    """A healthy one, with other numbers where given: on the device, as estimators leave them."""
    healthy = {"rhs_norm": 1.0, "solution_norm": 2.0, "residual": 0.01, "finite": True}
    tensors = {
        name: torch.tensor(v) if isinstance(v, (float, bool)) and name != "precision" else v
        for name, v in {**healthy, **fields}.items()
    }
    return SolveReport("S(damping=1)", 3, **tensors)


def kinds(**fields) -> list[str]:
    return [trouble.kind for trouble in report(**fields).troubles()]


def check(product=0.0, cross=0.0, kink: float | None = 0.0) -> SelfCheck:
    return SelfCheck(product, cross, kink, tolerance=0.02)


AT = {  # kind -> (fields that have it, fields that just do not)
    "not_finite": [
        ({"finite": False}, {"finite": True}),
        ({"finite": None, "solution_norm": INF}, {"finite": None}),
        ({"finite": None, "rhs_norm": NAN}, {"finite": None, "rhs_norm": 1e-30}),
        ({"finite": None, "hypergradient_norm": NAN}, {"hypergradient_norm": 1e30}),
        ({"finite": None, "loss": INF}, {"finite": None, "loss": -1e30}),
        ({"finite": None, "growth": NAN}, {"finite": None, "growth": 0.0}),
    ],
    "self_check": [
        ({"self_check": check(product=0.03)}, {"self_check": check(product=0.02)}),
        ({"self_check": check(cross=1.0)}, {"self_check": check(cross=0.01)}),
        ({"self_check": check(product=NAN)}, {"self_check": None}),
        ({"self_check": check(cross=1.0, kink=None)}, {"self_check": check(cross=1.0, kink=0.5)}),
    ],
    "kink": [({"kink": torch.tensor(0.5)}, {"kink": torch.tensor(0.1)})],
    "unstable": [({"growth": 101.0}, {"growth": 100.0})],
    "astray": [({"astray": torch.tensor(1)}, {"astray": torch.tensor(0)})],
    "negative_curvature": [({"negative_curvature": True}, {"negative_curvature": False})],
    "residual": [
        ({"residual": 1.001}, {"residual": 1.0}),
        ({"residual": INF, "finite": None}, {"residual": None}),
        ({"residual": NAN, "finite": None}, {"residual": 0.0}),  # NaN is not below 1
    ],
    "diverged": [({"diverged": True}, {"diverged": False})],
    "not_converged": [
        ({"converged": False, "residual": None}, {"converged": None, "residual": None}),
        ({"converged": False, "residual": 0.5}, {"converged": False, "residual": 0.05}),
    ],
    "precision": [
        ({"precision": 8e-3, "residual": 1e-3}, {"precision": 8e-3, "residual": 1e-2}),
        ({"precision": 8e-3, "residual": 0.0}, {"precision": None, "residual": 0.0}),
    ],
    "damping": [  # xᵀ(H + ρI)x is at least ρ‖x‖² = .4 where H is positive
        ({"damping": 0.1, "curvature": 0.79}, {"damping": 0.1, "curvature": 0.81}),
        ({"damping": torch.tensor(0.1), "curvature": 0.5}, {"damping": 0.0, "curvature": 1e-9}),
        ({"damping": 0.1, "curvature": 0.5}, {"damping": None, "curvature": 0.5}),
        ({"damping": 0.1, "curvature": 0.5}, {"damping": 0.1, "curvature": None}),
        ({"damping": 0.1, "curvature": 0.5}, {"damping": 0.1, "curvature": -0.5}),
    ],
}


@pytest.mark.parametrize(("kind", "bad", "good"), [(k, *case) for k, v in AT.items() for case in v])
def test_each_kind_begins_where_it_should(kind: str, bad: dict, good: dict):
    assert kinds(**bad) == [kind]
    assert kinds(**good) == []


def test_every_kind_is_here_and_in_the_manual():
    headings = re.findall(r"^### `(\w+)`", PAGE.read_text(), re.MULTILINE)
    assert sorted(AT) == sorted(KINDS) == sorted(headings)


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_names_a_remedy_and_no_placeholder(kind: str):
    (words,) = report(**AT[kind][0][0]).trouble()
    assert len(words) > 50
    assert not re.search(r"[{}]", words)


ZERO = {"rhs_norm": 0.0, "solution_norm": 0.0, "residual": 0.0}


@pytest.mark.parametrize(
    "fields",
    [
        {"precision": 8e-3},
        {"damping": 1.0, "curvature": 0.0},
        {"converged": False},
        {"negative_curvature": True},  # of H, but x = 0 is the solution all the same
        {"residual": None, "converged": False, "solution_norm": None},
        {"growth": 0.0},
    ],
    ids=str,
)
def test_a_right_hand_side_of_zero_is_no_trouble(fields: dict):
    assert kinds(**{**ZERO, **fields}) == []


def test_a_solution_of_zero_is_no_trouble_but_where_it_should_not_be():
    assert kinds(solution_norm=0.0, residual=1.0, damping=1.0, curvature=0.0) == []
    assert kinds(rhs_norm=0.0, residual=2.0) == ["residual"]  # x is 2, should be 0


def test_what_is_not_finite_uses_up_no_other_kind():
    """Each kind is said once: one bad batch must not silence the residual for good."""
    nothing = dict.fromkeys(("rhs_norm", "solution_norm", "residual", "curvature"), NAN)
    rest = {"damping": 1.0, "converged": False, "self_check": check(NAN, NAN, NAN)}
    assert kinds(finite=False, **nothing, **rest) == ["not_finite"]


def test_several_kinds_are_told_the_worst_first():
    found = kinds(damping=1.0, curvature=1e-3, residual=3.0, negative_curvature=True)
    assert found == ["negative_curvature", "residual", "damping"]
    assert kinds(self_check=check(1.0), residual=3.0)[0] == "self_check"


def test_a_text_has_the_figures():
    (words,) = report(self_check=check(0.034, 0.5)).trouble()
    assert "Hx is off by 3.4% and Jᵀx is off by 50.0%" in words
    (words,) = report(damping=0.1, curvature=0.5).trouble()
    assert "80%" in words
    (words,) = report(astray=torch.tensor(3)).trouble()
    assert "after 3 inner step(s)" in words


# --- reading ------------------------------------------------------------------------------------


EVERYTHING = {
    "inner_gradient_norm": 0.5,
    "rank": torch.tensor(7),
    "negative_curvature": False,
    "converged": True,
    "gradients": 4,
    "growth": 1.0,
    "astray": torch.tensor(0),
    "notes": ("rank clamped", "cold start"),
    "loss": torch.tensor(0.25, dtype=torch.bfloat16),
    "hypergradient_norm": 3.0,
    "diverged": False,
    "damping": 0.25,
    "curvature": 5.0,
    "precision": 1e-6,
    "self_check": check(0.25, 0.5),
}


def count_reads(monkeypatch) -> list[int]:
    reads, tolist = [], Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda t: reads.append(1) or tolist(t))
    for name in ("item", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        monkeypatch.setattr(Tensor, name, None)
    return reads


@pytest.mark.parametrize("read", ["as_dict", "troubles", "trouble", "__str__"])
def test_one_transfer_whatever_is_asked(monkeypatch, read: str):
    full = report(**EVERYTHING)
    reads = count_reads(monkeypatch)
    getattr(full, read)()
    assert len(reads) == 1


def test_making_one_reads_nothing(monkeypatch):
    reads = count_reads(monkeypatch)
    dataclasses.replace(report(**EVERYTHING), notes=())
    assert reads == []


def test_many_reports_are_one_transfer(monkeypatch):
    many = [vars(report(residual=float(i))) for i in range(20)]
    reads = count_reads(monkeypatch)
    assert [row["residual"] for row in plain(many)] == [float(i) for i in range(20)]
    assert len(reads) == 1
    assert isinstance(many[0]["residual"], Tensor)  # the report itself stays as it was


def test_as_dict_is_flat_and_plain():
    found = report(**EVERYTHING).as_dict()
    assert json.loads(json.dumps(found)) == found
    names = {field.name for field in dataclasses.fields(SolveReport)} - {"self_check"}
    assert found.keys() == names | {"self_check_product", "self_check_cross"}
    expected = {
        **{"strategy": "S(damping=1)", "matvecs": 3, "rank": 7, "gradients": 4, "astray": 0},
        **{"converged": True, "negative_curvature": False, "finite": True, "loss": 0.25},
        **{"damping": 0.25, "notes": "rank clamped; cold start", "self_check_cross": 0.5},
    }
    assert {name: found[name] for name in expected} == expected
    types = {name: type(found[name]) for name in ("rank", "converged", "loss", "matvecs")}
    assert types == {"rank": int, "converged": bool, "loss": float, "matvecs": int}


def test_what_is_unknown_is_none_and_not_printed():
    bare = SolveReport("S()", 0, torch.ones(()))
    assert bare.as_dict()["residual"] is None
    assert bare.as_dict()["self_check_product"] is None
    assert "residual" not in str(bare)
    assert bare.trouble() == []


def test_as_text_has_every_known_field_every_note_and_every_trouble():
    lines = str(report(**{**EVERYTHING, "residual": 2.0, "astray": torch.tensor(2)})).splitlines()
    names = [line.split()[0] for line in lines]
    known = {name for name, v in report(**EVERYTHING).as_dict().items() if v is not None}
    assert known - {"notes"} <= set(names)
    assert names.count("note") == 2
    assert [line.split()[1] for line in lines if line.startswith("trouble")] == [
        *("against", "after", "residual")
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_numbers_of_any_dtype_are_read_together(dtype: torch.dtype):
    found = report(residual=torch.tensor(0.5, dtype=dtype), rank=torch.tensor(2**24 + 1)).as_dict()
    assert (found["residual"], found["rank"]) == (0.5, 2**24 + 1)


def test_a_tensor_of_one_entry_and_one_that_requires_grad_are_numbers_too():
    odd = report(residual=torch.tensor([0.5], requires_grad=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert odd.as_dict()["residual"] == 0.5


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        report().residual = None


# --- categories ---------------------------------------------------------------------------------


def test_categories_of_their_own():
    """So that `warnings.simplefilter` and `except` can name them."""
    assert issubclass(HypergradientWarning, UserWarning)
    assert issubclass(HypergradientError, RuntimeError)
    assert HypergradientWarning.__module__ == HypergradientError.__module__
    with pytest.raises(HypergradientWarning), warnings.catch_warnings():  # noqa: PT012
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", HypergradientWarning)
        warnings.warn("of somebody else", UserWarning, stacklevel=1)
        warnings.warn("of ours", HypergradientWarning, stacklevel=1)
