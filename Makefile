# Two commands from a bare machine with python3 (3.11 or later) and make:
#   make demo   the main job on smollm2-135m with a small run, ending with where the report lies
#   make test   formatting, types, import order and every test
# Both make their own .venv once; constraints.txt pins what goes into it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q -c constraints.txt
# A variable, since a comma in $(call) would end the argument.
EXTRAS := .[recovery,runtime,serve]
# One more try, since a registry may be busy for a moment.
twice = $(1) || { echo "once more in 5 s"; sleep 5; $(1); }

.DEFAULT_GOAL := help
.PHONY: help demo test fuzz conformance fmt clean

help:
	@sed -n 's/^#   //p' Makefile

demo: $(VENV)/demo.stamp
	$(BIN)/vweights map smollm2-135m -o demo/atlas --repeated --tokens 2048 --edges 12
	@echo "the report: $(CURDIR)/demo/atlas/report.html"

test: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest -n 2

# 10,000 mutated files of every kind, opened one by one; some minutes, and every fault is counted.
fuzz: $(VENV)/test.stamp
	$(BIN)/python tests/fuzz.py

# Tiny checkpoints of every causal type of transformers, each opened and executed again from its maps; some minutes.
conformance: $(VENV)/test.stamp
	PYTHONPATH=tests $(BIN)/python -m conformance

fmt: $(VENV)/test.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) demo dist build .pytest_cache .hypothesis .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The build backend comes from constraints.txt too, so nothing is built with a version of its own choice.
$(VENV)/venv.stamp: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "python3 is too old: 3.11 or later is needed (make PYTHON=python3.12 ...)"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' || { echo "python3 has no venv module: install your system's python3-venv package"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(call twice,$(PIP) hatchling editables)
	@touch $@

$(VENV)/demo.stamp: $(VENV)/venv.stamp pyproject.toml
	$(call twice,$(PIP) --no-build-isolation -e '$(EXTRAS)')
	@touch $@

$(VENV)/test.stamp: $(VENV)/venv.stamp pyproject.toml
	$(call twice,$(PIP) --no-build-isolation -e '.[dev]')
	@touch $@ $(VENV)/demo.stamp
