# `make sweep` on a fresh machine with Python 3.10 or newer: makes .venv, installs, runs the embedded default sweep.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup sweep test check layout docs

setup: .venv/.installed

# The stamp makes set-up idempotent: it runs again only when the requirements have changed.
.venv/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

sweep: setup
	$(BIN)/python sweeps/run_sweep.py

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

layout: setup
	$(BIN)/python tests/test_layout.py

# The pages that the code says of itself: settings, commands and flags.
docs: setup
	$(BIN)/python -m tests.support.docs_pages
