# Every command that a person or CI runs. Needs Python 3.11 or newer and nothing else prepared.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test check unit system faults reference clean

help:  ## list the commands
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: $(STAMP)  ## make the virtual environment with everything that tests need

$(VENV)/.package: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[cloud]'
	@touch $@

$(STAMP): $(VENV)/.package
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: $(VENV)/.package  ## install, run the default comparison, say where the report is
	$(BIN)/cooperllm compare demo

test: check unit system  ## everything that CI runs

check: $(STAMP)  ## formatting, lints, types, import contract
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/pyright
	$(BIN)/lint-imports --no-logo

unit: $(STAMP)  ## arithmetic, properties, the house rules, every example in the documentation
	$(BIN)/python -m pytest --quiet tests/unit tests/property tests/policy src

system: $(STAMP)  ## whole runs: the default model, every engine, the command line; two files at a time
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --quiet tests/system --numprocesses 2 --dist loadfile --max-worker-restart 0

SEQUENCES ?= 20
MUTATIONS ?= 100000
faults: $(STAMP)  ## every fault by name, SEQUENCES=20 random sequences of kills of real processes, MUTATIONS=100000 changed messages; 40 minutes
	OMP_NUM_THREADS=1 COOPERLLM_FAULT_SEQUENCES=$(SEQUENCES) $(BIN)/python -m pytest tests/faults -v
	OMP_NUM_THREADS=1 COOPERLLM_MUTATIONS=$(MUTATIONS) $(BIN)/python -m pytest -o addopts= tests/property/test_mutated_messages.py -v

reference: $(STAMP)  ## the reference of the Python interface, from docstrings: reference/index.html
	$(BIN)/python -m pdoc --docformat google --output-directory reference cooperllm $(patsubst src/cooperllm/%,cooperllm.%,$(basename $(filter-out %__,$(basename $(wildcard src/cooperllm/*.py src/cooperllm/[a-z]*)))))

clean:  ## remove the environment and caches; runs stay
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis .import_linter_cache reference
