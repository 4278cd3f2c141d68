# make train   set up a virtual environment and train the quickstart model
# make test    all tests
# make schemas write schemas/*.json again, after a change to the specs
# make check   format, lint, types, import contracts, fast tests
# make sanitize   every kernel under compute-sanitizer (needs a GPU)
#
# Each installs what it needs once, and again when pyproject.toml or constraints.txt change.
# Extra arguments: make train ARGS="recipe.steps=500", make test ARGS="-k yaml". Another Python: make test PYTHON=python3.13

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# The first Python that is new enough
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
  if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo $$python; exit; fi; done; echo python3)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
REQUIREMENTS := pyproject.toml constraints.txt hatch_build.py
PARALLEL ?= --numprocesses 2 --dist loadfile --no-loadscope-reorder
ARGS ?=

.PHONY: help install train test check sanitize schemas format clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "moeut-compose needs Python 3.11 or newer; name one with make PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/installed: $(REQUIREMENTS) | $(BIN)/python
	$(PIP) install --quiet --upgrade "pip>=25.1"
	$(PIP) install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(PIP) install --quiet --constraint constraints.txt --group test
	@touch $@

$(VENV)/installed-lint: $(VENV)/installed-test
	$(PIP) install --quiet --constraint constraints.txt --group lint
	@touch $@

install: $(VENV)/installed

train: $(VENV)/installed
	$(BIN)/moeut-compose train moeut_tiny --recipe quickstart $(ARGS)

test: $(VENV)/installed-test
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

check: $(VENV)/installed-lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	PYTHONPATH=.:kernels $(BIN)/lint-imports
	$(BIN)/python -m pytest -q $(PARALLEL) -m "not slow and not gpu" $(ARGS)

sanitize: $(VENV)/installed-test
	$(BIN)/python tests/kernels/sanitize.py $(ARGS)

schemas: $(VENV)/installed
	$(BIN)/moeut-compose schema architecture > schemas/architecture.json
	$(BIN)/moeut-compose schema recipe > schemas/recipe.json
	$(BIN)/moeut-compose schema sweep > schemas/sweep.json

format: $(VENV)/installed-lint
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
