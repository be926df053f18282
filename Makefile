# Each target sets up $(VENV) as needed, once; changes to pyproject.toml or the constraints trigger a new set-up.
#
#   make sft                     fine-tune a small model on mixed-length text with 4 processes (or on all GPUs)
#   make test                    run the fast tests, under 10 minutes on 2 idle cores
#   make test-all                run all tests, including slow ones: compilers, whole jobs
#   make lint                    run ruff and mypy
#   make examples                run every other program in examples/ to completion
#   make sft STEPS=20 ARGS="--policy static --cp-size 4"
#
# By default pip picks the torch build: on Linux the CUDA one, several GB, which also runs on a CPU. For the CPU build or
# another CUDA version, pass its index from pytorch.org's install page; for the newest packages, drop the constraints:
#   make sft TORCH_INDEX=https://...
#   make sft CONSTRAINTS=

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints/cpu.txt
STEPS ?= 60
ARGS ?=
TEST_ARGS ?=

NUM_GPUS := $(filter-out 0,$(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU'))
NPROC ?= $(or $(NUM_GPUS),4)
TORCH_INDEX ?=

BIN := $(VENV)/bin
TORCHRUN := $(BIN)/torchrun --standalone --nproc-per-node $(NPROC)
PIP := $(BIN)/python -m pip --disable-pip-version-check
PIN := $(addprefix -c ,$(CONSTRAINTS))
# One thread per process, because ranks share the cores (torchrun's default, made explicit).
export OMP_NUM_THREADS ?= 1

.PHONY: help sft examples test test-all lint format clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^#   //p' Makefile

sft: $(VENV)/.ready-hf
	$(TORCHRUN) examples/sft.py --steps $(STEPS) $(ARGS)

# Each takes no flags and a minute or two on a CPU; sft.py has its own target.
examples: $(VENV)/.ready-hf
	@set -e; for file in $(filter-out examples/sft.py,$(sort $(wildcard examples/*.py))); do \
	  echo "$(TORCHRUN) $$file"; start=$$(date +%s); $(TORCHRUN) $$file; \
	  echo "$$file took $$(($$(date +%s) - start)) s"; done

test: $(VENV)/.ready-dev
	$(BIN)/python -m pytest -m "not slow" $(TEST_ARGS)

test-all: $(VENV)/.ready-dev
	$(BIN)/python -m pytest $(TEST_ARGS)

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.ready-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh' | xargs -r $(BIN)/clang-format -i

clean:
	@[ ! -f $(VENV)/pyvenv.cfg ] || rm -rf $(VENV)
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

# ---- the environment ----

$(VENV)/.ready-dev: $(VENV)/.ready-hf
	$(PIP) install -q $(PIN) --no-build-isolation -e '.[dev]'
	@touch $@

NATIVE := $(wildcard csrc/*.py $(foreach kind,h cuh cpp cu,csrc/*.$(kind) csrc/*/*.$(kind)))

$(VENV)/.ready-hf: $(VENV)/.created pyproject.toml setup.py $(CONSTRAINTS) $(NATIVE)
ifneq ($(TORCH_INDEX),)
	$(PIP) install -q $(PIN) --retries 1 --no-deps --extra-index-url $(TORCH_INDEX) torch
endif
	@# First, because the next command compiles csrc/ against the torch that it finds.
	$(PIP) install -q $(PIN) numpy torch
	$(PIP) install -q $(PIN) --no-build-isolation -e '.[hf]'
	@touch $@
	@echo "$(VENV) is ready; to put hdp and torchrun on PATH: . $(BIN)/activate"

# The stamp comes last, so that an interrupted set-up starts over.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "hdp needs Python 3.10 or later; PYTHON=$(PYTHON) is '$$($(PYTHON) --version 2>&1)'." >&2; \
	  echo "Choose another one: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q $(PIN) --upgrade setuptools
	@touch $@
