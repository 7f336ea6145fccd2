"""The numbers of the documentation, computed from the committed files.

    python -m benchmarks.ledger            # which pages do not say what the files say
    python -m benchmarks.ledger --write    # the pages, written anew
    python -m benchmarks.ledger --commands # what made the files

Experiments leave one row a run in ``docs/results/NAME.csv``; ``NAME.json`` beside it holds the
command, and how its tables are made. Three kinds of markers in README.md and the pages of docs are
looked after:

    <!-- table: NAME/TABLE --> ... <!-- end -->     means over seeds, with their 95% intervals
    <!-- ledger --> ... <!-- end -->                the claims of docs/results/claims.json
    <!-- from: NAME.txt -->                         a block of text follows, lines of that file

A block of text with numbers and without a file is an error.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from math import sqrt
from os.path import relpath
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from scipy.stats import t as student

DOCS = Path(__file__).parent.parent / "docs"
RESULTS = DOCS / "results"
Row = Mapping[str, str]
_MARKER = re.compile(r"(<!-- (table: [\w/.-]+|ledger) -->\n).*?(<!-- end -->)", re.DOTALL)
_BLOCK = re.compile(r"(?:<!-- from: (\S+) -->\n+)?```text\n(.*?)```", re.DOTALL)


@lru_cache
def rows(name: str) -> list[Row]:
    """The runs of an experiment."""
    with open(RESULTS / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


@lru_cache
def recipe(name: str) -> dict[str, Any]:
    """The command of an experiment, and its tables."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def chosen(found: Sequence[Row], where: Mapping[str, Any]) -> list[Row]:
    """The rows with these values; numbers are compared as numbers."""
    return [row for row in found if all(_same(row[key], value) for key, value in where.items())]


def _same(text: str, value: Any) -> bool:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            return float(text) == value
        except ValueError:
            return False
    return text == str(value)


def interval(values: Sequence[float]) -> float | None:
    """Half of the 95% interval of the mean, by Student's t; None for a single value."""
    if len(values) < 2:
        return None
    return float(student.ppf(0.975, len(values) - 1)) * stdev(values) / sqrt(len(values))


def shown(values: Sequence[float], form: str) -> str:
    """Such as 0.912 ± 0.004; no interval where all values are the same."""
    half = interval(values)
    spread = "" if not half or float(format(half, form)) == 0 else f" ± {half:{form}}"
    return f"{mean(values):{form}}{spread}"


def table(name: str, which: str) -> list[str]:
    """The lines of a Markdown table."""
    spec = recipe(name)["tables"][which]
    found = chosen(rows(name), spec.get("where", {}))
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in found:
        groups.setdefault(tuple(row[key] for key in spec["by"]), []).append(row)
    order = [str(value) for value in spec.get("order", [])]
    if order:
        missing = [value for value in order if all(key[0] != value for key in groups)]
        if missing:
            raise SystemExit(f"{name}.csv has no row {', '.join(missing)}")
        groups = {k: groups[k] for v in order for k in groups if k[0] == v}
    columns: dict[str, list[str]] = spec["columns"]
    lines = [
        "| " + " | ".join([*spec["by"], *columns]).replace("_", " ") + " |",
        "|" + "---|" * len(spec["by"]) + "---:|" * len(columns),
    ]
    for key, group in groups.items():
        cells = [_cell(group, *column) for column in columns.values()]
        lines.append("| " + " | ".join([*key, *cells]) + " |")
    seeds = sorted({len(group) for group in groups.values()})
    lines.append("")
    count = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    lines.append(f"*{count} runs a row, mean ± 95% interval; `{recipe(name)['command']}`,")
    lines.append(f"[{name}.csv]({{up}}/results/{name}.csv)*")
    return lines


def _cell(group: Sequence[Row], column: str, form: str) -> str:
    found = [row[column] for row in group if row[column] != ""]
    if not found:
        return ""
    try:
        return shown([float(value) for value in found], form)
    except ValueError:
        return found[0]  # words


def number(spec: Mapping[str, Any]) -> str:
    """One number of a claim, with its label.

    A mean over runs; with "less" the mean of differences, paired by "pair"; or with "find" what a
    pattern finds in an output.
    """
    label = spec["label"]
    if "find" in spec:
        text = (RESULTS / spec["file"]).read_text()
        found = re.search(spec["find"], text, re.MULTILINE)
        if found is None:
            raise SystemExit(f"{spec['file']} has no {spec['find']!r}")
        return f"{label}: {' '.join(found.groups())}"
    name, column, form = spec["file"], spec["column"], spec["format"]
    own = chosen(rows(name), spec["where"])
    if not own:
        raise SystemExit(f"{name}.csv has no row {spec['where']}")
    values = [float(row[column]) for row in own]
    if "less" in spec:
        pair = spec.get("pair", "seed")
        other = {row[pair]: float(row[column]) for row in chosen(rows(name), spec["less"])}
        values = [float(row[column]) - other[row[pair]] for row in own]
    return f"{label}: {shown(values, form)}"


def ledger() -> list[str]:
    """The claims, a line each."""
    lines = ["| claim | source | verdict | numbers | what differs |", "|---|---|---|---|---|"]
    for claim in json.loads((RESULTS / "claims.json").read_text()):
        numbers = "; ".join(map(number, claim.get("numbers", [])))
        told = f"[{claim['claim']}]({claim['page']})" if "page" in claim else claim["claim"]
        cells = [told, claim["source"], f"**{claim['verdict']}**", numbers, claim["deviation"]]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def pages() -> list[Path]:
    """The documentation, and the page before it."""
    return [DOCS.parent / "README.md", *sorted(DOCS.rglob("*.md"))]


def rewritten(page: Path) -> str:
    """The text of a page, what is between its markers made anew."""
    up = relpath(DOCS, page.parent)

    def fill(match: re.Match[str]) -> str:
        kind = match[2]
        lines = ledger() if kind == "ledger" else table(*kind.removeprefix("table: ").split("/"))
        return match[1] + "\n".join(["", *lines, "", ""]).replace("{up}", up) + match[3]

    return _MARKER.sub(fill, page.read_text())


def without_file(page: Path) -> list[str]:
    """What is wrong with the page's blocks of text."""
    wrong = []
    for source, block in _BLOCK.findall(page.read_text()):
        lines = [line.rstrip() for line in block.strip("\n").split("\n")]
        if source and not _within(lines, (RESULTS / source).read_text().split("\n")):
            wrong.append(f"{page.name}: the block {lines[0]!r} is not in {source}")
        elif not source and any(map(str.isdigit, block)):
            wrong.append(f"{page.name}: the block {lines[0]!r} names no file")
    return wrong


def _within(block: Sequence[str], whole: Sequence[str]) -> bool:
    """Whether the lines are in the file, in their order; lines of the file may be left out."""
    rest = iter([line.strip() for line in whole])
    return all(any(line.strip() == known for known in rest) for line in block)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the pages anew")
    parser.add_argument("--check", action="store_true", help="the default: only look")
    parser.add_argument("--commands", action="store_true", help="print what made the files")
    options = parser.parse_args()
    if options.commands:
        made = [path for path in RESULTS.glob("*.csv") if path.with_suffix(".json").exists()]
        names = sorted(path.stem for path in made)  # not the curves, which came with their runs
        print("\n".join(f"{name}: {recipe(name)['command']}" for name in names))
        return
    wrong = []
    for page in pages():
        text = rewritten(page)
        if text != page.read_text():
            if options.write:
                page.write_text(text)
                print(f"written: {page.name}")
            else:
                wrong.append(f"{page.name} does not say what its files say: --write")
        wrong += without_file(page)
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
