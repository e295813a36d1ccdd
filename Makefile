# Thin: each recipe is one command that a person can type. `make help` lists the targets.
# On a host that has its own PyTorch, PY=python3 uses it as it is and sets nothing up.

PYTHON ?= python3
VENV := .venv
PY ?= $(VENV)/bin/python
JOBS ?= auto
OP ?= all
LAYERS ?= $(if $(PEERS),pro flash,demo)
PEERS ?=
ARGS ?=
CUTLASS ?=

NEEDS_GPU = $(PY) -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "$@ needs a GPU that PyTorch can use; here is none")'

ifeq ($(PY),$(VENV)/bin/python)
SETUP := $(VENV)/.installed
endif

.DEFAULT_GOAL := help
.PHONY: help setup demo tune bench report check lint format test test-gpu sanitize emulator-examples sweep wheel constraints clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## */  \1\t/' | expand -t 20

setup: $(SETUP)  ## create .venv and install everything, pinned by constraints.txt

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"fp4suite needs Python 3.11 or newer; {sys.executable} is {v.major}.{v.minor}: set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(SETUP)  ## a small DeepSeek-V4 from checkpoint to tokens: make, tune, load, generate, compare (3 minutes)
	$(PY) -m model demo $(ARGS)

tune: $(SETUP)  ## search tile shapes for LAYERS=pro|flash|demo|PATH and OP=name|all, store the winners in results/tables
	$(PY) -m tuner tune --layers-of $(LAYERS) --op $(OP) $(ARGS)

bench: $(SETUP)  ## time OP=name|all on LAYERS, store rows in results/bench; PEERS=1: one OP against other libraries
	$(PY) -m tuner bench --layers-of $(LAYERS) --op $(OP) $(if $(PEERS),--peers) $(ARGS)

report: $(SETUP)  ## draw plots and tables from the stored rows
	$(PY) -m tuner report $(ARGS)

check: lint test  ## what to run before a push

lint: $(SETUP)  ## ruff, mypy, import-linter, codespell
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(dir $(PY))lint-imports
	$(PY) -m codespell_lib

format: $(SETUP)  ## let ruff reformat
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

test: $(SETUP)  ## all tests that need no GPU (they use one where it is there)
	PYTHONDONTWRITEBYTECODE= $(PY) -m pytest -n $(JOBS) --dist worksteal -m "not gpu" $(ARGS)

test-gpu: $(SETUP)  ## all tests, on the GPU of this machine
	@$(NEEDS_GPU)
	$(PY) -m pytest -n 4 $(ARGS)

sanitize: $(SETUP)  ## every op's kernel once under compute-sanitizer, on the GPU of this machine (ARGS: --op NAME, --m 3,300)
	@$(NEEDS_GPU)
	compute-sanitizer --report-api-errors no --error-exitcode 1 $(PY) -m tests.one_of_each $(ARGS)

emulator-examples: $(SETUP)  ## run the CuTe DSL examples of a checkout CUTLASS=PATH in ptx_emulator (ARGS: names, --schedule all)
	$(PY) -m tests.ptx_emulator.examples --cutlass $(CUTLASS) $(ARGS)

sweep: $(SETUP)  ## compile every config of gemm_nvfp4_sm100, run a covering set of them in ptx_emulator (20 minutes; ARGS)
	$(PY) -m tests.kernels_cute.sweep_sm100 $(ARGS)

wheel: $(SETUP)  ## build the wheel into dist/
	$(PY) -m pip wheel --quiet --no-deps -w dist .

constraints: $(SETUP)  ## write the versions installed now into constraints.txt
	(grep '^#' constraints.txt; $(PY) -m pip freeze --exclude-editable | sed -E 's/\+cpu$$//') > constraints.new && mv constraints.new constraints.txt

clean:  ## remove caches and builds, keep .venv
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
