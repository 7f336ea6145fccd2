"""A slice of the fuzz; all of it: ``python -m tests.fuzz --problems 2000``."""

import pytest
from fuzz import RULES, play

NUMBERS = range(60)


@pytest.fixture(scope="module")
def outcomes():
    return [play(number) for number in NUMBERS]


@pytest.mark.parametrize("rule", RULES)
def test_rule(outcomes, rule):
    broken = [
        f"{o.draw.number}: {what} ({o.draw})"
        for o in outcomes
        for name, what in o.broken
        if name == rule
    ]
    assert not broken, "\n".join(broken)


def test_oracles_took_part(outcomes):
    assert sum(o.notes["compared"] for o in outcomes) >= len(outcomes) // 4


def test_a_problem_is_reproduced_by_its_number(outcomes):
    number = next(o.draw.number for o in outcomes if o.digest is not None)
    again = play(number)
    assert (again.draw, again.digest) == (outcomes[number].draw, outcomes[number].digest)
