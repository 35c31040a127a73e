# `make demo` and `make test` need nothing but Python 3.11 or newer: they make .venv and install into it, once.
# Another interpreter: make test PYTHON=python3.12. Arguments for pytest: make test ARGS="-x tests/test_entry.py".
# Another entry: make demo ENTRY=qwen3.6-35b-a3b.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
ENTRY ?= qwen3.6-27b
RUNS ?= 1

bin := $(VENV)/bin
stamp := $(VENV)/.installed
# Twice quiet: errors only, not a warning for each index that lacks a package.
pip := $(bin)/python -m pip install --quiet --quiet --disable-pip-version-check

# Half of the tests for each worker, in order; who has done its half takes from the end of the other's.
pytest := $(bin)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

.PHONY: help demo quick test nightly bench lint style format types imports docs figures install clean
.DELETE_ON_ERROR:

help:  ## Show this list
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(stamp)  ## Build the sample of qwen3.6-27b, gate it against Hugging Face, generate text with it
	$(bin)/python -m coreai_zoo.cli.demo $(ENTRY)

quick: $(stamp)  ## Run the tests that tell in a minute whether a change is sane (tests/suite.py lists them)
	$(pytest) --quick $(ARGS)

test: $(stamp)  ## Run the whole test suite, its longest runs at a small size
	$(pytest) $(ARGS)

nightly: $(stamp)  ## The same with those at full size: 50 random architectures, 7 chains of killed builds, 20 interruptions
	ZOO_NIGHTLY=1 $(pytest) $(ARGS)

bench: $(stamp)  ## Measure quantizer, build and baseline side by side, some three minutes (RUNS=3 for medians)
	$(bin)/python benchmarks/bench.py --runs $(RUNS)

lint: $(stamp)  ## Check style, formatting, types and import directions, all at once
	@$(MAKE) --no-print-directory --keep-going --jobs 4 style format types imports

style:
	$(bin)/ruff check .

format:
	$(bin)/ruff format --check .

types:
	$(bin)/mypy

imports:
	$(bin)/lint-imports --no-logo

docs: $(stamp)  ## Write again what docs/ takes from the commands: their help, and the outputs of the tutorial
	$(bin)/python scripts/command_docs.py
	$(bin)/python scripts/tutorial.py

figures: $(stamp)  ## Measure again the figures that README and docs/ state, some twenty minutes
	$(bin)/python scripts/figures.py

install: $(stamp)  ## Make the environment only

# torch first and by itself, so that its index (pip config, PIP_EXTRA_INDEX_URL) alone decides which build it is.
$(stamp): pyproject.toml $(bin)/python
	@echo "installing into $(VENV) (torch and the Core AI toolchain: some minutes the first time)"
	$(pip) 'torch==$(shell sed -n 's/.*"torch==\([^"]*\)".*/\1/p' pyproject.toml)'
	$(pip) --editable '.[dev]'
	@touch $@

# Debian's python3 has venv without ensurepip unless python3-venv is installed: then virtualenv will do, or another pip.
$(bin)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) is missing or older than 3.11; name another: make PYTHON=python3.12" >&2; exit 3; }
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); $(PYTHON) -m virtualenv $(VENV); } \
		|| { rm -rf $(VENV); $(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --python $(bin)/python install pip; } \
		|| { rm -rf $(VENV); echo "no virtual environment: install python3-venv or virtualenv" >&2; exit 3; }

clean:  ## Remove the environment and caches, not what was built
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
