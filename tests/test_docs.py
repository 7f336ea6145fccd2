"""Every block of Python in the pages runs, or says why it does not.

A block that begins with ``>>>`` is a doctest, which pytest collects from docs by itself. Before any
other stands ``<!-- file: PATH -->``, where PATH is the same text, tested as an example; or
``<!-- fragment: WHY -->``. Blocks of kind ``diff`` in the first tutorial are lines of two programs.
"""

import csv
import re
import runpy
from pathlib import Path
from statistics import mean

import pytest

import hyperopt_torch
from benchmarks import lines
from benchmarks.ledger import interval

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r"(?:<!-- (file|fragment): (.+?) -->\n+)?^```python[^\n]*\n(.*?)^```", re.M | re.S
)
LINK = re.compile(r"\]\((?!https?:)([^)#]+)#?([^)]*)\)")
DIFF = re.compile(r"^```diff\n(.*?)^```", re.MULTILINE | re.DOTALL)


def name(page):
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_blocks_of_python_run_or_say_why_not(page):
    for kind, said, block in BLOCK.findall(page.read_text()):
        if kind == "file":
            assert block == (ROOT / said).read_text(), said
        elif kind != "fragment":
            assert block.startswith(">>>"), f"neither doctest, file nor fragment:\n{block}"


@pytest.mark.parametrize("page", ["README.md", "docs/first_loop.md"])
def test_diffs_are_lines_of_the_two_programs(page):
    plain, ours = (
        [line.strip() for line in lines.code_lines(p)] for p in (lines.PLAIN, lines.OURS)
    )
    shown = "".join(DIFF.findall((ROOT / page).read_text())).splitlines()
    assert shown
    for line in shown:
        mark, text = line[0], line[1:].strip()
        assert mark == "+" or text in plain, line
        assert mark == "-" or text in ours, line
    if page == "docs/first_loop.md":  # nothing is left out but the import and what is printed
        added = [line[1:].strip() for line in shown if line[0] == "+"]
        rest = [d[2:].strip() for d in lines.difference() if d.startswith("+ ")]
        left = [line for line in rest if line not in added]
        assert all(line.startswith(("from ", "print(")) for line in left), left


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_lines_are_counted(page):
    added, removed = lines.count(lines.difference())
    of = len(lines.code_lines(lines.PLAIN))
    text = " ".join((ROOT / page).read_text().split())
    assert re.search(rf"{added} lines are added and {removed} removed, of {of}\b", text)


def test_readme_has_the_measured_accuracies():
    with open(ROOT / "docs/results/first_loop.csv", newline="") as file:
        runs = [run for run in csv.DictReader(file) if run["clean"] == "100"]
    text = (ROOT / "README.md").read_text()
    for method in {run["method"] for run in runs} - {
        "plain loop, clean images added",
        "plain loop, clean images alone",
        "learned weights, Identity()",
    }:
        found = mean(float(run["accuracy"]) for run in runs if run["method"] == method)
        assert f"{found:.3f}".lstrip("0") in text, method


def test_readme_has_the_numbers_of_the_main_job():
    with open(ROOT / "docs/results/hyper_cleaning.csv", newline="") as file:
        runs = {(run["method"], run["seed"]): run for run in csv.DictReader(file)}
    text = (ROOT / "README.md").read_text()
    seeds = sorted({seed for _, seed in runs})
    assert " ".join(seeds) in text

    def told(value: float, digits: int = 3) -> None:
        assert f"{value:.{digits}f}".removeprefix("0") in text, value

    def accuracies(method: str) -> list[float]:
        return [float(runs[method, seed]["test_accuracy"]) for seed in seeds]

    for method in (
        *("no cleaning", "clean alone", "cleaning", "oracle", "stopped early"),
        *("largest losses dropped", "stopped early, tuned on clean"),
    ):
        told(mean(accuracies(method)))
    for column in ("precision", "recall"):
        told(mean(float(runs["cleaning", seed][column]) for seed in seeds), 2)
    for better, worse in (
        ("cleaning", "stopped early, tuned on clean"),
        ("loss correction", "cleaning"),
    ):
        gains = [a - b for a, b in zip(accuracies(better), accuracies(worse), strict=True)]
        told(mean(gains))
        told(interval(gains) or 0.0)


def test_lines_beside_other_libraries_are_counted():
    assert (ROOT / "docs/results/lines.txt").read_text().splitlines() == lines.table()


def test_programs_of_other_libraries_are_the_plain_one_with_lines_changed():
    """What is compared is one task: the data, the network and the rates are the same lines."""
    shared = set(lines.code_lines(lines.PLAIN)) & set(lines.code_lines(lines.OURS))
    shared = {line for line in shared if not line.strip().startswith(("for ", "optimizer ="))}
    for path in lines.PEERS:
        assert shared <= set(lines.code_lines(path)), path.name
        compile(path.read_text(), path, "exec")


@pytest.mark.slow
def test_the_plain_loop_runs(capsys):
    runpy.run_path(str(lines.PLAIN))
    assert capsys.readouterr().out.startswith("test accuracy 0.8")


def test_everything_public_is_in_the_reference():
    text = "\n".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    headings = re.findall(r"^::: hyperopt_torch\.(\w+)", text, re.MULTILINE)
    short = re.findall(r"`(\w+)` is a short name", text)
    assert set(hyperopt_torch.__all__) <= {*headings, *short}


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "SECURITY.md"])
def test_links_outside_of_the_site_lead_somewhere(page):
    """Links within the site are checked by ``mkdocs build --strict``."""
    for target, anchor in LINK.findall((ROOT / page).read_text()):
        assert (ROOT / target).exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", (ROOT / target).read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"\W+", "-", h.lower()).strip("-") for h in headings}, anchor
