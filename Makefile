# `make demo` and `make test` set everything up by themselves; `make help` lists the rest.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PYTEST_ARGS ?= -n auto --dist worksteal

.PHONY: help demo test lint format tables bench install clean

help:
	@grep -E '^[a-z]+:.*##' Makefile | sed 's/:.*## /\t/'

$(INSTALLED): requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --requirement requirements.txt --group dev
	touch $@

install: $(INSTALLED) ## create .venv with everything that runs and tests need

demo: $(INSTALLED) ## train, evaluate and time a small DHVT on handwritten digits
	$(BIN)/python main.py --cfg configs/demo.yaml

test: lint ## lint, then the whole test suite
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(INSTALLED) ## ruff and codespell
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

format: $(INSTALLED) ## ruff's formatter and its safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

tables: $(INSTALLED) ## count all models again and write the README's table (minutes)
	$(BIN)/python tools/tables.py --update

bench: $(INSTALLED) ## time the families against their literal forms, within 30 minutes on 2 cores
	$(BIN)/python benchmarks/run.py --processes 3 --mode inference --minutes 11 --output benchmarks/results
	$(BIN)/python benchmarks/run.py --processes 2 --mode train --minutes 15 --output benchmarks/results
	$(BIN)/python tools/tables.py --speed

clean: ## remove the environment and caches, never a run's output
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
