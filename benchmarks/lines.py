"""How many lines the first program differs from the plain loop by, counted from the sources.

    python -m benchmarks.lines > docs/results/lines.txt
    python -m benchmarks.lines --diff with_betty

Data reweighting on digits, whole programs: the plain loop, ours, and one for each other library, in
``benchmarks/lines``. Blank lines, comments and docstrings count for nothing; a changed line is one
removed and one added. Characters, without spaces, are those of the lines added: they do not depend
on where a call is broken into lines.
"""

from __future__ import annotations

import ast
import difflib
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "benchmarks/lines"
PLAIN, OURS = FOLDER / "plain.py", ROOT / "examples/first_loop.py"
PEERS = sorted(FOLDER.glob("with_*.py"))


@dataclass
class Settings:
    """Count the lines that change."""

    diff: str = ""
    """Print the diff of one program instead, by its name without ".py"."""


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


def characters(diff: list[str]) -> int:
    """Those of the lines added, spaces left out."""
    return sum(len("".join(d[2:].split())) for d in diff if d.startswith("+ "))


def table() -> list[str]:
    """A line a program, the fewest lines added first."""
    lines = [f"{'program':30}{'lines':>7}{'added':>7}{'removed':>9}{'characters added':>18}"]
    lines.append(f"{PLAIN.name:30}{len(code_lines(PLAIN)):7}")
    found = [(count(d := difference(PLAIN, p)), characters(d), p) for p in (OURS, *PEERS)]
    for (added, removed), size, path in sorted(found):
        lines.append(f"{path.name:30}{len(code_lines(path)):7}{added:7}{removed:9}{size:18}")
    return lines


def main(s: Settings) -> None:
    if not s.diff:
        print("\n".join(table()))
        return
    path = next((p for p in (OURS, *PEERS) if p.stem == s.diff), None)
    if path is None:
        raise SystemExit(f"{s.diff}: none of {', '.join(p.stem for p in (OURS, *PEERS))}")
    print("\n".join(difference(PLAIN, path)))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
