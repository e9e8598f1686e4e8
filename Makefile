# Every target first installs what it needs; later calls find it and start at once.
SHELL := /bin/bash
PY := .venv/bin/python
RUN ?= $(shell ls -td runs/*/ 2>/dev/null | head -1)

.PHONY: help install smoke test test-fast check format ui bench gpu-check lock clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: ## create .venv with the locked packages
	@PYTHON="$(PYTHON)" bash launch/install.sh

smoke: install ## train a small DBRX on real text, in minutes on two CPU cores
	@$(PY) train/main.py yamls/smoke.yaml $(ARGS)

test: install ## run all tests
	@$(PY) -m pytest $(ARGS)

test-fast: install ## tests that take a moment each, all of them in under three minutes
	@$(PY) -m pytest -m "not slow" $(ARGS)

check: install ## check format, lint and types
	@.venv/bin/ruff format --check . && .venv/bin/ruff check . && .venv/bin/mypy

format: install ## format, and apply ruff's fixes
	@.venv/bin/ruff format . && .venv/bin/ruff check --fix .

ui: install ## serve MLflow's page on the local runs
	@$(PY) -m train.tracking ui

bench: install ## compare speed and memory with other frameworks, both sides in one run
	@$(PY) -m launch.experiments.bench $(ARGS)

gpu-check: install ## check kernels, numerics, memory and speed of this machine's GPU
	@$(PY) -m launch.gpu_check $(ARGS)

lock: install ## resolve requirements.lock again from pyproject.toml
	@uv=$$(command -v uv || echo .cache/tools/bin/uv); $$uv pip compile pyproject.toml --group dev --group fast-tokenizer \
	    --generate-hashes --no-annotate --no-header --python-version 3.11 -q -o requirements.lock

clean: ## remove what was installed and cached, but not runs/
	rm -rf .venv .cache
