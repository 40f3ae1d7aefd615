# `make sweep` on a fresh machine with Python 3.10 or newer: makes .venv, installs, runs the embedded default sweep.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup sweep test test-lowest test-latest check layout docs

setup: .venv/.installed

# The stamp makes set-up idempotent: it runs again only when the requirements have changed.
.venv/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv: 2.5 to 8 minutes, 7 GB of disk"
	$(BIN)/python -m pip install --editable '.[dev]'
	touch $@

sweep: setup
	$(BIN)/python sweeps/run_sweep.py

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile

# All but the slow tests, on the lowest and on the newest versions that pyproject.toml allows, each in an environment of its own.
test-lowest: RESOLUTION := lowest-direct
test-latest: RESOLUTION := highest
test-lowest test-latest:
	$(PYTHON) -m venv .venv-$(RESOLUTION)
	.venv-$(RESOLUTION)/bin/python -m pip install --quiet uv
	.venv-$(RESOLUTION)/bin/uv pip install --python .venv-$(RESOLUTION)/bin/python --resolution $(RESOLUTION) --upgrade --editable '.[dev]'
	.venv-$(RESOLUTION)/bin/python -m pytest -n 2 --dist loadfile -m "not slow"

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
