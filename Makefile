# Everything CI runs is a target here, so that a green `make` on a laptop means a green CI.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST := $(BIN)/python -m pytest

.PHONY: env demo test test-faults test-engines test-cluster test-browser test-hub-faults test-hub-clients docs engines-table check gpu clean help
.DEFAULT_GOAL := help

help:
	@echo "make demo          build the environment, quantize a small Nemotron checkpoint and verify it"
	@echo "make test          the test suite (under 6 minutes on 2 cores)"
	@echo "make test-cluster  Ray clusters of two nodes, whose parts are killed (own environment, 1 GB)"
	@echo "make test-engines  transformers and vLLM load what we write (own environments, 3 GB; Python >= 3.11)"
	@echo "make test-browser  reports as Chromium shows them, SmolLM2's among them (needs chromium; Python >= 3.11)"
	@echo "make test-faults   kills, power loss, full disks, races; needs strace; FAULTS=--ci for a share"
	@echo "make test-hub-faults   the Hub: a fault and a kill at every request, races, 200 shards, 10,000 polls"
	@echo "make test-hub-clients  the Hub's tests with each huggingface_hub of CLIENTS (environments of 60 MB)"
	@echo "make docs          the site of docs/, its links and anchors checked, in site/ (own environment, 190 MB)"
	@echo "make check         ruff, mypy --strict, layers, language; wheel and sdist built, installed elsewhere and imported"

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable . --group test --group check
	@touch $(STAMP)

env: $(STAMP)

demo: env
	$(BIN)/nemotron-fp8 demo

# What needs an environment, a device or many minutes of its own has a target of its own.
QUICK := not faults and not engines and not cluster and not browser and not gpu

test: env
	$(PYTEST) -n 2 -m "$(QUICK)"

# Two environments of their own, because vLLM pins a transformers of its own.
ENGINES ?= .venv-engines
VLLM ?= .venv-vllm

$(ENGINES)/.installed: tools/engines_env.sh tests/inference/constraints-transformers.txt pyproject.toml
	PYTHON=$(PYTHON) tools/engines_env.sh transformers $(ENGINES)

$(VLLM)/.installed: tools/engines_env.sh tests/inference/requirements-vllm.txt
	PYTHON=$(PYTHON) tools/engines_env.sh vllm $(VLLM)

test-engines: $(ENGINES)/.installed $(VLLM)/.installed
	VLLM_PYTHON=$(VLLM)/bin/python $(ENGINES)/bin/python -m pytest tests/inference

# A real trained model, read from a package by transformers, as the engines' tests have it.
SMOLLM2 := .cache/engines/smollm2-135m-v1

$(SMOLLM2): | $(ENGINES)/.installed
	PYTHONPATH=. $(ENGINES)/bin/python -c \
	    'from pathlib import Path; from tests.inference.models import smollm2; smollm2(Path("$(@D)"))'

# The pictures stay in .cache/browser.
test-browser: env $(SMOLLM2)
	@command -v chromium chromium-browser google-chrome > /dev/null \
	    || { echo "error: chromium is missing; Debian, Ubuntu: apt-get install chromium"; exit 1; }
	$(PYTEST) tests/browser

# Takes over what the last `make test-engines` measured, and writes it into the tables of docs/engines.md.
engines-table:
	$(PYTHON) -m tools.engines_table --record .cache/engines/results.jsonl

check: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m tools.check_language
	PYTHON=$(BIN)/python tools/check_dist.sh

# An environment of its own: the site is made from the text of the sources, which are not imported.
DOCS ?= .venv-docs

$(DOCS)/.installed: tools/constraints-docs.txt pyproject.toml
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --constraint tools/constraints-docs.txt 'pip>=25.1'
	$(DOCS)/bin/python -m pip install --quiet --constraint tools/constraints-docs.txt --group docs
	@touch $@

# A link or an anchor that leads nowhere, or a docstring that cannot be read, is an error (mkdocs.yml, `validation`).
docs: $(DOCS)/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/python -m mkdocs build --strict --quiet
	@echo "the site is in site/index.html"

# Real kills, real full disks. Needs strace (Debian, Ubuntu: apt-get install strace) and, where not run by root, unshare;
# rows that cannot run here are named. FAULTS=--ci takes a share of a few minutes on two cores.
test-faults: env
	PYTHONPATH=. $(BIN)/python -m tests.faults $(FAULTS)

# An environment of its own, because Ray is large and most people do without.
CLUSTER ?= .venv-ray

$(CLUSTER)/.installed: tools/cluster_env.sh tests/cluster/constraints-ray.txt constraints.txt pyproject.toml
	PYTHON=$(PYTHON) tools/cluster_env.sh $(CLUSTER)

# Clusters of two nodes on this machine, whose parts are killed; a few minutes.
test-cluster: $(CLUSTER)/.installed
	$(CLUSTER)/bin/python -m pytest tests/cluster

# What was counted is in the last lines; HUB takes options of pytest, like HUB='-k two_runs'.
test-hub-faults: env
	$(PYTEST) -n 2 -m faults tests/hub $(HUB)

# The oldest that is supported, the last of the versions over httpx, and the newest.
CLIENTS ?= 1.26.0 1.33.0 2.4.0
HUB_ENVS := .venv-hub

$(HUB_ENVS)/%/.installed: tools/hub_client.sh pyproject.toml | env
	PYTHON=$(BIN)/python tools/hub_client.sh $* $(HUB_ENVS)/$*

test-hub-clients: $(CLIENTS:%=$(HUB_ENVS)/%/.installed)
	set -e; for version in $(CLIENTS); do \
	    $(HUB_ENVS)/$$version/bin/python -m pytest -n 2 -m "$(QUICK)" tests/hub $(HUB); \
	done

# Every GPU test and benchmark of the project; needs a CUDA device of compute capability 9.0.
gpu: env
	NEMOTRON_FP8_TEST_GPU=1 $(PYTEST) -m gpu tests
	$(BIN)/python -m benchmarks.bench_kernels --sweep
	$(BIN)/python -m benchmarks.draw_kernels
	$(BIN)/python -m benchmarks.bench_gpu_convert

clean:
	rm -rf $(VENV) $(ENGINES) $(VLLM) $(CLUSTER) $(DOCS) $(HUB_ENVS) .cache dist build site .hypothesis .mypy_cache .ruff_cache
