"""How many lines the first program differs from the plain loop by, counted from the two sources.

    python -m benchmarks.lines
    python -m benchmarks.lines --diff

Blank lines, comments and docstrings count for nothing; a changed line is one removed and one added.
Other libraries are not counted: none was at hand to run and check the same program with.
"""

from __future__ import annotations

import ast
import difflib
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).parent.parent
PLAIN, OURS = ROOT / "benchmarks/lines/plain.py", ROOT / "examples/first_loop.py"


@dataclass
class Settings:
    """Count the lines that change."""

    diff: bool = False
    """Print the diff as well."""


def code_lines(path: Path) -> list[str]:
    """The lines of a file that hold code."""
    text = path.read_text()
    doc = ast.parse(text).body[0]  # every file here begins with a docstring
    lines = text.splitlines()[doc.end_lineno :]
    return [line for line in lines if line.strip() and not line.strip().startswith("#")]


def difference(plain: Path = PLAIN, ours: Path = OURS) -> list[str]:
    """The diff, unchanged lines included; each begins with "+ ", "- " or two spaces."""
    lines = difflib.ndiff(code_lines(plain), code_lines(ours))
    return [line for line in lines if not line.startswith("?")]


def count(diff: list[str]) -> tuple[int, int]:
    """Lines added, lines removed."""
    return sum(d.startswith("+ ") for d in diff), sum(d.startswith("- ") for d in diff)


def main(s: Settings) -> None:
    diff = difference()
    if s.diff:
        print("\n".join(diff), end="\n\n")
    added, removed = count(diff)
    print(f"plain loop {len(code_lines(PLAIN))} lines, with hyperopt_torch {len(code_lines(OURS))}")
    print(f"added {added}, removed {removed}")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
