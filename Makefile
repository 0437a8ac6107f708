# `make demo` and `make test` set up .venv by themselves and install again only when pyproject.toml or constraints.txt changed.
#
#   PYTHON=python3.12        the Python that .venv is made with (3.11 or newer)
#   ACCELERATOR=cpu          auto (default: looks for an NVIDIA GPU), cpu or gpu
#   TORCH_CPU_INDEX=URL      where the CPU build of torch comes from if the package index serves only the CUDA build
#   DEMO_ARGS, TEST_ARGS     further flags of `srpo.demo`, `pytest`
#   TEST_JOBS=2              so many files of tests run at once; each test takes one core, two where it starts two ranks

PYTHON ?= python3
VENV ?= .venv
ACCELERATOR ?= auto
DEMO_ARGS ?=
TEST_ARGS ?=
TEST_JOBS ?= 2

# The commands behind `make demo` and `make demo-esci`.
DEMO = $(RUN) -m srpo.demo $(DEMO_ARGS)
DEMO_ESCI = $(RUN) -m srpo.demo @ configs/demo_esci.toml --data "$(DATA)" $(DEMO_ARGS)

RUN = $(VENV)/bin/python
PYTEST = $(RUN) -m pytest
ORDINARY = not slow and not gpu and not multigpu and not nightly

# The working directory stays off sys.path; packages come from the editable install.
export PYTHONSAFEPATH = 1
export ACCELERATOR
export TORCH_CPU_INDEX
export PYRIGHT_PYTHON_IGNORE_WARNINGS = 1
export TOKENIZERS_PARALLELISM = false
# Waiting threads spin for some microseconds, then sleep (figures in bench/LOG.md). The default, milliseconds, makes a step ten
# times as long, or more, beside another busy process; not spinning at all costs a quarter of an idle machine.
export GOMP_SPINCOUNT = 1000
# Torch takes large tensors from huge pages: on a CPU fresh 4-KiB pages cost a tenth of a training step.
export THP_MEM_ALLOC_ENABLE = 1

.PHONY: help demo demo-esci test lint types unit nightly golden bench format vllm megablocks clean
.DEFAULT_GOAL := help

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

demo: $(VENV)/.ready ## the paper's method in miniature: world, SFT, SRPO, evaluation; runs/demo
	$(DEMO)

demo-esci: $(VENV)/.ready ## the same on judged data: make demo-esci DATA=folder of the official ESCI files
	@test -n "$(DATA)" || { echo "error: say where the ESCI files are: make demo-esci DATA=path" >&2; exit 2; }
	$(DEMO_ESCI)

test: lint types unit ## everything that is checked before a commit

lint: $(VENV)/.ready-test ## ruff: rules and format; vulture: dead code
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m vulture

types: $(VENV)/.ready-test ## pyright
	$(RUN) -m pyright --pythonpath $(RUN)

unit: $(VENV)/.ready-test ## the tests for any machine; what is skipped is listed with the reason
	$(PYTEST) -q -rs --durations=25 --durations-min=2 -n $(TEST_JOBS) --dist loadfile -m "$(ORDINARY)" $(TEST_ARGS)

nightly: $(VENV)/.ready-test ## every test that this machine can run, with the long property tests
	HYPOTHESIS_PROFILE=nightly $(PYTEST) -q $(TEST_ARGS)

golden: $(VENV)/.ready-test ## rewrite tests/golden; the diff belongs into the commit that explains it
	SRPO_GOLDEN=write $(PYTEST) -q -m golden $(TEST_ARGS)
	git --no-pager diff --stat -- tests/golden

bench: $(VENV)/.ready-bench ## the same step in srpo and in TRL, in alternation
	$(RUN) bench/end_to_end.py

format: $(VENV)/.ready-test ## ruff: fix and format
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

vllm: $(VENV)/.ready-vllm ## install vLLM's CPU build, for rollout.engine = "vllm" without a GPU (`make test` does, too)

megablocks: $(VENV)/.ready ## build the optional MegaBlocks experts (GPU machine with nvcc)
	$(PYTHON) tools/install.py --venv $(VENV) --megablocks

clean: ## remove what was built; not runs/
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: .ready, .ready-test, .ready-bench, .ready-vllm.
REQUIREMENTS = pyproject.toml constraints.txt tools/install.py
EXTRAS-test = test dev vllm
EXTRAS-bench = bench
EXTRAS-vllm = vllm

$(VENV)/.ready: $(REQUIREMENTS)
	$(PYTHON) tools/install.py --venv $(VENV)
	@touch $@

$(VENV)/.ready-%: $(REQUIREMENTS)
	$(PYTHON) tools/install.py --venv $(VENV) $(EXTRAS-$*)
	@touch $(VENV)/.ready $@
