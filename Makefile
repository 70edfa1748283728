# `make demo` draws pictures, `make test` checks everything that finishes in minutes. Both need only python3 >= 3.11,
# python3-venv, make and git; the rest goes into .venv.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV ?= .venv
OUT ?= out
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
LINTED := muse tests tools configs examples $(wildcard *.py)
TEST := JAX_PLATFORMS=cpu $(BIN)/python -m pytest -q

# One cell a line: Python, jax, flax.
MATRIX := 3.11:0.10.2:0.12.8 3.12:0.11.2:0.12.10 3.13:0.12.0.1:0.12.12

.PHONY: help demo test test-slow test-matrix lint format clean host

help:
	@echo 'make demo         draw a grid of 8 prompts and one inpainting from the shipped weights into $(OUT)/'
	@echo 'make test         lint, types and all tests that finish in minutes'
	@echo 'make test-slow    the tests that take longer'
	@echo 'make test-matrix  the fast tests on every supported Python and jax'
	@echo 'make lint         ruff and pyright        make format    ruff format and import order'

demo: $(VENV)/.demo
	$(BIN)/python tools/demo.py --out=$(OUT)

test: lint
	$(TEST) -n 2 --dist loadscope --no-loadscope-reorder -m 'not slow' tests

test-slow: $(VENV)/.dev
	$(TEST) -m slow tests

lint: $(VENV)/.dev
	$(BIN)/ruff check $(LINTED)
	$(BIN)/ruff format --check $(LINTED)
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.dev
	$(BIN)/ruff check --fix $(LINTED)
	$(BIN)/ruff format $(LINTED)

test-matrix:
	@failed=; for cell in $(MATRIX); do \
	  IFS=: read -r python jax flax <<< "$$cell"; \
	  echo "== Python $$python, jax $$jax, flax $$flax"; \
	  tools/matrix_cell.sh "$$python" "$$jax" "$$flax" || failed="$$failed $$python"; \
	done; \
	if [ -n "$$failed" ]; then echo "failed or missing:$$failed"; exit 1; fi

clean:
	rm -rf $(VENV) .venv-* build dist *.egg-info

# What the machine must bring; a missing one is named in one line.
host:
	@command -v git >/dev/null || { echo 'error: git is missing: apt-get install git' >&2; exit 2; }
	@tools/find_python.sh >/dev/null

# The stamp files say what is installed; `demo` needs less than `dev`.
$(VENV)/.demo: pyproject.toml | host
	[ -x $(BIN)/python ] || "$$(tools/find_python.sh)" -m venv $(VENV)
	$(PIP) install -q -e .
	@touch $@

$(VENV)/.dev: pyproject.toml requirements.txt | host
	[ -x $(BIN)/python ] || "$$(tools/find_python.sh)" -m venv $(VENV)
	$(PIP) install -q -r requirements.txt -e '.[dev]'
	@touch $@ $(VENV)/.demo
