# Every target works alone on a fresh machine, and costs nothing again until pyproject.toml changes.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
CONSTRAINTS ?= $(wildcard constraints.txt)

# The newest torch comes with gigabytes of CUDA libraries, which a machine without an NVIDIA GPU has no use for.
# The constraints name a release whose build for the CPU is small. PIP_CONSTRAINT= (empty) lifts them.
ifeq ($(shell command -v nvidia-smi),)
export PIP_CONSTRAINT ?= $(CONSTRAINTS)
endif

.DEFAULT_GOAL := help
.PHONY: help demo test lint style format evidence bench family generators docs clean

help:  ## say what there is
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

demo: $(VENV)/.hone  ## train the shipped base model on a new skill, in a few minutes
	$(BIN)/hone run quickstart

test: style  ## everything that must hold before a change goes in
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

lint: style  ## style, types and the project's own guards
	$(BIN)/python -m pytest tests/guards

style: $(VENV)/.test  ## style and formatting
	$(BIN)/ruff check src tests bench
	$(BIN)/ruff format --check src tests bench

format: $(VENV)/.test  ## rewrite the sources in the project's style
	$(BIN)/ruff check --fix --select I src tests bench
	$(BIN)/ruff format src tests bench

evidence: $(VENV)/.test  ## run the claims that never ran or whose source has changed, and write their pages
	$(BIN)/hone verify all --stale
	$(BIN)/python -m hone.evidence.pages

bench: $(VENV)/.test  ## speed and memory against peers, side by side; what the quickstart learns over seeds
	$(BIN)/python bench/sft.py --out docs/evidence/bench-sft.json
	$(BIN)/python bench/sft.py --adapter lora --out docs/evidence/bench-sft-lora.json
	$(BIN)/python bench/adapters.py --out docs/evidence/bench-adapters.json
	$(BIN)/python bench/adapter_memory.py --out docs/evidence/bench-adapter-memory.json
	$(BIN)/python bench/adapter_memory.py --sides lora,lisa,sara,spiel,s2ft --tokens 4096 \
	  --out docs/evidence/bench-adapter-memory-4096.json
	$(BIN)/python bench/dpo.py --out docs/evidence/bench-dpo.json
	$(BIN)/python bench/grpo.py --out docs/evidence/bench-grpo.json
	$(BIN)/python bench/ct.py --out docs/evidence/bench-ct.json
	$(BIN)/python bench/quickstart.py --out docs/evidence/quickstart.json

family: $(VENV)/.test  ## compare all adapters on one task, five seeds each; about an hour
	$(BIN)/python bench/family.py --out docs/evidence/compare-adapters.json

generators: $(VENV)/.test  ## compare generators of few steps under one budget, on points and on digits; about two hours
	$(BIN)/python bench/generators.py --task points
	$(BIN)/python bench/generators.py --task digits

docs: $(VENV)/.test  ## write the pages about methods anew and build the documentation into build/site
	$(BIN)/python -m hone.evidence.pages
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:  ## remove the environment and what tools leave behind; runs stay
	rm -rf $(VENV) build dist .pytest_cache .hypothesis .mypy_cache .ruff_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("hone needs Python 3.11 or newer: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.hone: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e .
	@touch $@

$(VENV)/.test: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[test]'
	@touch $@ $(VENV)/.hone
