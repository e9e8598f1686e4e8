# Every target first installs what it needs; later calls find it and start at once.
SHELL := /bin/bash
STACK ?= default
VENV := $(if $(filter minimum,$(STACK)),.venv-minimum,.venv)
WHEELS ?= .cache/wheels
PY := $(VENV)/bin/python
# Two to four tests at once; those of a file share its fixtures, so they stay together.
PARALLEL := -n logical --maxprocesses 4 --dist loadfile
RUN ?= $(shell ls -td runs/*/ 2>/dev/null | head -1)

.PHONY: help install wheels smoke test test-fast check format ui docs bench gpu-check audit lock clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: ## create .venv with the locked packages; STACK=minimum: the oldest, in .venv-minimum; OPTIONS="--core --system-torch --wheels DIR"
	@PYTHON="$(PYTHON)" STACK="$(STACK)" bash launch/install.sh $(OPTIONS)

wheels: ## collect wheels for machines without a network in WHEELS=DIR; OPTIONS=--core: only the core's
	@PYTHON="$(PYTHON)" STACK="$(STACK)" bash launch/wheels.sh $(OPTIONS) $(WHEELS)

smoke: install ## train a small DBRX on real text, in minutes on two CPU cores
	@$(PY) train/main.py yamls/smoke.yaml $(ARGS)

test: install ## run all tests; STACK=minimum: on the oldest packages
	@$(PY) -m pytest $(PARALLEL) $(ARGS)

test-fast: install ## tests that take a moment each, all of them in under three minutes
	@$(PY) -m pytest $(PARALLEL) -m "not slow" $(ARGS)

check: install ## check format, lint and types
	@$(VENV)/bin/ruff format --check . && $(VENV)/bin/ruff check . && $(PY) -m mypy

format: install ## format, and apply ruff's fixes
	@$(VENV)/bin/ruff format . && $(VENV)/bin/ruff check --fix .

ui: install ## serve MLflow's page on the local runs
	@$(PY) -m train.tracking ui

docs: ## build the documentation site in .cache/site/html
	@PYTHON="$(PYTHON)" bash launch/docs.sh

bench: install ## compare speed and memory with other frameworks, both sides in one run
	@$(PY) -m launch.experiments.bench $(ARGS)

gpu-check: install ## check kernels, numerics, memory and speed of this machine's GPU
	@$(PY) -m launch.gpu_check $(ARGS)

audit: install ## ask a vulnerability service about the locked packages; docs/advisories.md judges them
	@$(PY) -m launch.advisories $(ARGS)

COMPILE = pip compile pyproject.toml --group full --group stores --group dev --group fast-tokenizer --generate-hashes --no-annotate --no-header -q
lock: install ## resolve the locks again from pyproject.toml
	@uv=$$(command -v uv || echo .cache/tools/bin/uv); \
	    $$uv $(COMPILE) --python-version 3.12 --upgrade -o requirements.lock && \
	    $$uv $(COMPILE) --group minimum --python-version 3.11 --upgrade -o requirements-minimum.lock && \
	    $$uv pip compile --group docs --generate-hashes --no-annotate --no-header -q --python-version 3.12 --upgrade -o requirements-docs.lock

clean: ## remove what was installed and cached, but not runs/
	rm -rf .venv .venv-minimum .venv-docs .cache
