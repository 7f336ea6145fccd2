# What CI calls, and what a developer runs before a commit. Use inside a virtual environment.

.PHONY: test lint types docs bench results experiments

test:
	pip install -e ".[test]" && python -m pytest

lint:
	pip install -q -e ".[dev]"
	ruff check .
	ruff format --check .

types:
	pip install -q -e ".[dev]"
	mypy

docs:
	pip install -q -e ".[docs]"
	mkdocs build --strict

results:  # every table of the documentation, from the committed files
	python -m benchmarks.ledger --write
	python -m benchmarks.draw_amortised
	python -m benchmarks.draw_against_optuna

experiments:  # the commands that made the files, hours of them
	python -m benchmarks.ledger --commands

bench:
	python -m benchmarks.overhead
