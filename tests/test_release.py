"""The version stands in one place; what has to repeat it says the same."""

import re
from pathlib import Path

from hyperopt_torch import __version__

ROOT = Path(__file__).parent.parent


def test_version_and_date_agree():
    changes, citation = (ROOT / "CHANGELOG.md").read_text(), (ROOT / "CITATION.cff").read_text()
    version, date = re.findall(r"^## \[(\d\S*)\] - (\S+)$", changes, re.M)[0]
    assert version == __version__
    assert f"version: {version}\ndate-released: {date}\n" in citation
