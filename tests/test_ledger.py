"""The documentation says what its files say, and the tool that looks after it notices otherwise."""

import json

import pytest

from benchmarks import ledger


@pytest.fixture
def docs(tmp_path, monkeypatch):
    """A documentation of two methods, three seeds each."""
    results = tmp_path / "docs" / "results"
    results.mkdir(parents=True)
    (tmp_path / "README.md").write_text("# Nothing\n")
    (results / "cleaning.csv").write_text(
        "method,seed,noise,accuracy,how\n"
        "plain,0,0.5,0.80,none\nplain,1,0.5,0.84,none\nplain,2,0.5,0.82,none\n"
        "ours,2,0.5,0.92,all\nours,1,0.5,0.93,all\nours,0,0.5,0.91,all\nours,0,0.8,0.1,all\n"
    )
    recipe = {
        "command": "python examples/cleaning.py",
        "tables": {
            "half": {
                "where": {"noise": 0.5},
                "by": ["method"],
                "order": ["ours", "plain"],
                "columns": {"test accuracy": ["accuracy", ".3f"], "how": ["how", ""]},
            }
        },
    }
    (results / "cleaning.json").write_text(json.dumps(recipe))
    gain = {
        "file": "cleaning",
        "column": "accuracy",
        "format": ".3f",
        "where": {"method": "ours", "noise": 0.5},
        "less": {"method": "plain"},
        "label": "gain",
    }
    claim = {"claim": "c", "source": "s", "verdict": "holds", "deviation": "d", "numbers": [gain]}
    (results / "claims.json").write_text(json.dumps([claim]))
    monkeypatch.setattr(ledger, "DOCS", tmp_path / "docs")
    monkeypatch.setattr(ledger, "RESULTS", results)
    ledger.rows.cache_clear()
    ledger.recipe.cache_clear()
    yield tmp_path / "docs"
    ledger.rows.cache_clear()
    ledger.recipe.cache_clear()


def test_a_table_has_means_and_intervals_by_students_t(docs):
    head, _, ours, plain, *_ = ledger.table("cleaning", "half")
    assert head == "| method | test accuracy | how |"
    assert ours == "| ours | 0.920 ± 0.025 | all |"  # 4.303 · .01 / √3
    assert plain == "| plain | 0.820 ± 0.050 | none |"


def test_a_table_of_any_name_is_filled(docs):
    path = docs / "results" / "cleaning.json"
    recipe = json.loads(path.read_text())
    recipe["tables"] = {"n = 3, noise 50%": recipe["tables"]["half"]}
    path.write_text(json.dumps(recipe))
    ledger.recipe.cache_clear()
    page = docs / "page.md"
    page.write_text("<!-- table: cleaning/n = 3, noise 50% -->\n<!-- end -->\n")
    assert "| ours | 0.920 ± 0.025 | all |" in ledger.rewritten(page)


def test_a_claim_pairs_its_differences_by_seed(docs):
    assert "gain: 0.100 ± 0.025" in ledger.ledger()[2]  # .11, .09, .10, whatever their order


def test_pages_are_written_and_then_agree(docs, monkeypatch):
    page = docs / "page.md"
    page.write_text("before\n<!-- table: cleaning/half -->\n<!-- end -->\nafter\n")
    monkeypatch.setattr("sys.argv", ["ledger"])
    with pytest.raises(SystemExit, match="does not say"):
        ledger.main()
    monkeypatch.setattr("sys.argv", ["ledger", "--write"])
    ledger.main()
    assert "| ours | 0.920 ± 0.025 | all |" in page.read_text()
    monkeypatch.setattr("sys.argv", ["ledger", "--check"])
    ledger.main()
    page.write_text(page.read_text().replace("0.920", "0.930"))
    with pytest.raises(SystemExit, match="does not say"):
        ledger.main()


def test_commands_are_told_and_curves_have_none(docs, monkeypatch, capsys):
    (docs / "results" / "cleaning_curves.csv").write_text("method,step,loss\nplain,0,1.0\n")
    monkeypatch.setattr("sys.argv", ["ledger", "--commands"])
    ledger.main()
    assert capsys.readouterr().out == "cleaning: python examples/cleaning.py\n"


def test_blocks_name_a_file_that_has_them(docs):
    page = docs / "page.md"
    (docs / "results" / "run.txt").write_text("a 1\nb 2\nc 3\n")
    page.write_text("<!-- from: run.txt -->\n\n```text\na 1\nc 3\n```\n\n```text\nno number\n```\n")
    assert ledger.without_file(page) == []
    page.write_text("<!-- from: run.txt -->\n\n```text\na 1\nb 3\n```\n")
    assert "not in run.txt" in ledger.without_file(page)[0]
    page.write_text("```text\na 1\n```\n")
    assert "names no file" in ledger.without_file(page)[0]


def test_a_number_is_found_in_an_output(docs):
    (docs / "results" / "run.txt").write_text("a 1\n  b   2.5 x\n")
    spec = {"file": "run.txt", "find": r"^ *b +(\S+)", "label": "b"}
    assert ledger.number(spec) == "b: 2.5"
    with pytest.raises(SystemExit, match="has no"):
        ledger.number(spec | {"find": "c (.)"})


def test_an_unknown_row_is_said(docs):
    spec = {
        "file": "cleaning",
        "column": "accuracy",
        "format": "",
        "where": {"method": "none"},
        "label": "",
    }
    with pytest.raises(SystemExit, match="no row"):
        ledger.number(spec)


@pytest.mark.parametrize("page", ledger.pages(), ids=lambda page: page.name)
def test_the_documentation_says_what_its_files_say(page):
    assert page.read_text() == ledger.rewritten(page)
    assert ledger.without_file(page) == []
