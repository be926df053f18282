# Each target sets up what it needs in $(VENV), once; a change of pyproject.toml or the constraints sets it up again.
#
#   make sft                     fine-tune a small model on mixed-length text over 4 processes (or all GPUs)
#   make test                    the tests, in under 10 minutes on 2 quiet cores
#   make test-all                those and the slow ones: compilers, whole jobs
#   make lint                    ruff and mypy
#   make examples                every other program of examples/, to its end
#   make sft STEPS=20 ARGS="--policy static --cp-size 4"
#
# torch is the build that pip finds first: on Linux the CUDA one, several GB, which runs on a CPU too. For the CPU build,
# or one for another CUDA, name its index from pytorch.org's install page; for the newest packages, no constraints:
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
# One thread per process: ranks share the cores (torchrun's own default, made explicit).
export OMP_NUM_THREADS ?= 1

.PHONY: help sft examples test test-all lint format clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^#   //p' Makefile

sft: $(VENV)/.ready-hf
	$(TORCHRUN) examples/sft.py --steps $(STEPS) $(ARGS)

# Each takes no flags and about a minute on a CPU; the others have a target of their own.
examples: $(VENV)/.ready-hf
	@set -e; for file in $(filter-out examples/sft.py,$(sort $(wildcard examples/*.py))); do \
	  echo "$(TORCHRUN) $$file"; $(TORCHRUN) $$file; done

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
	rm -rf build dist hdp.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

# ---- the environment ----

$(VENV)/.ready-dev: $(VENV)/.ready-hf
	$(PIP) install -q $(PIN) --no-build-isolation -e '.[dev]'
	@touch $@

NATIVE := $(wildcard csrc/*.py $(foreach kind,h cuh cpp cu,csrc/*.$(kind) csrc/*/*.$(kind)))

$(VENV)/.ready-hf: $(VENV)/.created pyproject.toml setup.py $(CONSTRAINTS) $(NATIVE)
ifneq ($(TORCH_INDEX),)
	$(PIP) install -q $(PIN) --retries 1 --no-deps --extra-index-url $(TORCH_INDEX) torch
endif
	$(PIP) install -q $(PIN) --no-build-isolation -e '.[hf]'
	@touch $@

# The stamp is last: an interrupted set-up starts again.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "hdp needs Python 3.10 or later; PYTHON=$(PYTHON) is '$$($(PYTHON) --version 2>&1)'." >&2; \
	  echo "Name another one: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q $(PIN) --upgrade setuptools
	@touch $@
