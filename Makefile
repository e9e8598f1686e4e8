# Every target installs what it needs first; a second call finds it and starts at once.
SHELL := /bin/bash
PY := .venv/bin/python
RUN ?= $(shell ls -td runs/*/ 2>/dev/null | head -1)

.PHONY: help install smoke test check format ui bench gpu-check lock clean

help: ## what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: ## .venv with everything locked
	@PYTHON="$(PYTHON)" bash launch/install.sh

smoke: install ## train a small DBRX on real text, in minutes on two CPU cores
	@$(PY) train/main.py yamls/smoke.yaml $(ARGS)

test: install ## all tests
	@$(PY) -m pytest $(ARGS)

check: install ## format, lint and types
	@.venv/bin/ruff format --check . && .venv/bin/ruff check . && .venv/bin/mypy

format: install ## format, and repair what ruff can
	@.venv/bin/ruff format . && .venv/bin/ruff check --fix .

ui: install ## MLflow's page on the runs made here
	@$(PY) -m train.tracking ui

bench: install ## speed and memory against the peers, both sides in one run
	@$(PY) -m launch.experiments.bench $(ARGS)

gpu-check: install ## prove kernels, numerics, memory and speed of this machine's GPU
	@$(PY) -m launch.gpu_check $(ARGS)

lock: install ## resolve requirements.lock anew from pyproject.toml
	@uv=$$(command -v uv || echo .cache/tools/bin/uv); $$uv pip compile pyproject.toml --group dev --group fast-tokenizer \
	    --generate-hashes --no-annotate --no-header --python-version 3.11 -q -o requirements.lock

clean: ## remove what was installed and cached; runs/ stays
	rm -rf .venv .cache
