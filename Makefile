# Everything happens in .venv, which `make demo` and `make test` set up alike. `make help` lists the targets.

# 3.11 or newer; makes .venv
PYTHON      ?= python3
# Where torch comes from, if not from where pip looks anyway: make test TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=

BIN   := .venv/bin
# The one pinned version stands in pyproject.toml.
TORCH := $(shell sed -n 's/.*"\(torch==[^"]*\)".*/\1/p' pyproject.toml)
PIP   := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo test lint format bench clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' Makefile

.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(PIP) "$(TORCH)" $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(PIP) --editable '.[run,bench,fit,report,trace,auto,onnx,metis,dev]'
	@echo "compiling the solvers' loops, once"
	-@$(BIN)/python -m meshwright solve examples/choice.json --time-limit 25 > /dev/null
	@touch $@

demo: .venv/.installed  ## set up and run the main job
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/demo.sh

test: lint  ## set up and run all checks: lint, floors, types, tests
	$(BIN)/python -m pytest

lint: .venv/.installed  ## ruff, the floors of the house (import-linter), mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports
	$(BIN)/mypy

format: .venv/.installed  ## let ruff fix and format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: .venv/.installed  ## measure our own speed
	$(BIN)/python benchmarks/run.py

clean:  ## remove caches and build leftovers; .venv stays
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache .coverage build dist src/*.egg-info
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
