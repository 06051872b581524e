# Every target sets up the environment it needs in $(VENV) from nothing but python3 >= 3.11 and make.
#   make demo PYTHON=python3.12 VENV=.venv312      another interpreter, another environment
PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check
INSTALL = $(PIP) install --progress-bar off -c constraints.txt
# More arguments for pytest: make test PYTEST="tests/chat -x"
PYTEST ?=
# Test processes. Most of a test's time is compilation, which uses one core.
JOBS ?= 2

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo serve test test-slow soak soak-serve lint format types bench torch kernels-toolchain clean

help:  ## What can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

demo: $(VENV)/.installed  ## Train a small M1 with SFT and CISPO on this machine (minutes on two cores)
	$(VENV)/bin/m1jax demo $(ARGS)

# The demo's model where it has been trained, else one with random weights that has the same shape.
MODEL ?= $(if $(wildcard runs/demo/export),runs/demo,runs/serve/m1-demo)

serve: $(VENV)/.installed-serve $(filter runs/serve/m1-demo,$(MODEL))  ## Serve the demo's model, or one with random weights; MODEL=DIRECTORY ARGS="--port 8000"
	$(VENV)/bin/m1jax serve $(MODEL) $(ARGS)

runs/serve/%: | $(VENV)/.installed
	$(VENV)/bin/m1jax init $* $@

test: $(VENV)/.installed-dev  ## The tests; with `make torch` before it, the comparisons with PyTorch too
	$(VENV)/bin/python -m pytest -n $(JOBS) --dist worksteal $(PYTEST)

test-slow: $(VENV)/.installed-dev  ## The tests that take minutes
	$(VENV)/bin/python -m pytest -m slow $(PYTEST)

lint: $(VENV)/.installed-dev  ## Style: ruff check and ruff format
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(VENV)/.installed-dev  ## Rewrite the files the way `make lint` wants them
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

types: $(VENV)/.installed-dev  ## Types: pyright
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

bench: $(VENV)/.installed-torch  ## Speed on CPU beside PyTorch: the model, and lightning attention (minutes on two cores)
	$(VENV)/bin/python -m experiments.cpu_speed.cpu_speed
	$(VENV)/bin/python -m experiments.chunked_cpu.benchmark

soak: $(VENV)/.installed  ## Kill a small training thirty times; it must end as the undisturbed one, to the bit
	$(VENV)/bin/python experiments/soak/soak.py $(ARGS)

soak-serve: $(VENV)/.installed-serve runs/serve/m1-tiny  ## 32 clients for five minutes, some of which leave in the middle
	$(VENV)/bin/python -m experiments.soak_serve.soak_serve runs/serve/m1-tiny $(ARGS)

torch: $(VENV)/.installed-torch  ## Add PyTorch and Transformers, for the tests that compare with them

kernels-toolchain: $(VENV)/.installed-kernels  ## Add the compilers for H200 and TPU, for the tests that compile for them

clean:  ## Remove the environment (not runs/)
	rm -rf $(VENV)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"m1jax needs Python 3.11 or later, but $(PYTHON) is {v[0]}.{v[1]}. Name another one: make PYTHON=python3.12 ...")'
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "$(PYTHON) cannot make virtual environments. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) -e .
	@touch $@

$(VENV)/.installed-serve: $(VENV)/.installed
	$(INSTALL) -e '.[serve]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(INSTALL) -e '.[dev,serve,games]'
	@$(INSTALL) -e '.[tasks]' || echo "reasoning-gym needs a C compiler: without it, its tests are skipped" >&2
	@touch $@

# A plain requirement for torch may take a CUDA build of several GB: this version is the one tested, and where your
# package index has a CPU build of it, name that index in PIP_EXTRA_INDEX_URL.
$(VENV)/.installed-torch: $(VENV)/.installed-dev
	$(INSTALL) torch==2.13.0
	$(INSTALL) -e '.[torch]'
	@touch $@

# The CUDA wheels without their dependencies: compiling needs neither a driver nor the 3 GB of CUDA libraries.
$(VENV)/.installed-kernels: $(VENV)/.installed-dev
	$(INSTALL) -e '.[kernels]'
	version=$$($(VENV)/bin/python -c 'import jax; print(jax.__version__)') && \
	$(PIP) install --progress-bar off --no-deps "jax-cuda12-plugin==$$version" "jax-cuda12-pjrt==$$version" nvidia-cuda-nvcc-cu12
	@touch $@
