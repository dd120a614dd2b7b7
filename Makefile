# make demo   everything it needs, then RLHF of SmolLM2-135M on real human ratings (ARGS="--help" for its options)
# make test   everything it needs, then the tests                                 (ARGS="tests/ops -x" to choose)
# make test-all   the long ones too: every mesh, every place to be killed in, long fuzzing (see docs/testing.md)
# make lint   ruff (lint and format) and mypy
# make docs   the documentation as a site in build/site; fails for a link that leads nowhere
# make notebooks  the notebooks of the papers, each on a toy in seconds (ARGS="--only 05" to choose)
# make serve  the packages of the reward server; likewise: sweep, wandb, mlflow, trackio, cuda, tpu
# make clean  removes the environment and caches; never runs/
#
# Needs Python 3.11 or newer with venv and pip; another interpreter: make PYTHON=python3.12 demo
PYTHON ?= python3
WORKERS ?= 2
ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
# Modules are compiled when they are first imported: pip would compile all of them, most of which nobody imports.
INSTALL := $(PY) -m pip install --disable-pip-version-check --no-compile --constraint constraints.txt

# Each worker has half of the tests, in their order, and takes over from the other what that has not begun.
PYTEST := $(PY) -m pytest --numprocesses $(WORKERS) --dist worksteal --durations=10

# A stamp is touched when its install has succeeded, so a second `make` installs nothing.
CREATED := $(VENV)/.stamp-created
CORE := $(VENV)/.stamp-core
DEV := $(VENV)/.stamp-dev
DOCS := $(VENV)/.stamp-docs
NOTEBOOKS := $(VENV)/.stamp-notebooks

.PHONY: serve sweep wandb mlflow trackio notebooks cuda tpu demo test test-all lint docs format install dev clean
.DEFAULT_GOAL := demo

demo: $(CORE)
	PPO_JAX_CALLER="make demo" $(PY) -m experiments.sentiment --preset demo $(ARGS)

test: $(DEV)
	$(PYTEST) $(ARGS)

test-all: $(DEV)
	$(PYTEST) -m "" $(ARGS)

lint: $(DEV)
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy

docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet

format: $(DEV)
	$(PY) -m ruff check --fix
	$(PY) -m ruff format

notebooks: $(NOTEBOOKS)
	$(PY) -m experiments.papers.execute --smoke $(ARGS)

# The packages of an extra: the reward server, sweeps, Weights & Biases, MLflow, Trackio, JAX for NVIDIA GPUs or TPUs.
serve sweep wandb mlflow trackio cuda tpu: $(CORE)
	$(INSTALL) --no-build-isolation --editable ".[$@]"

install: $(CORE)
dev: $(DEV)

$(CREATED):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "ppo_jax needs Python 3.11 or newer; name one with: make PYTHON=/path/to/python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	touch $@

$(CORE): $(CREATED) pyproject.toml constraints.txt
	$(INSTALL) setuptools
	$(INSTALL) --no-build-isolation --editable ".[experiments,tensorboard]"
	touch $@

# torch comes first and alone: a local CPU build is then taken where there is one, and trl and peft find it.
$(DEV): $(CREATED) pyproject.toml constraints.txt
	$(INSTALL) setuptools torch==2.13.0
	$(INSTALL) --no-build-isolation --editable ".[dev,parity,experiments,tensorboard,sweep]"
	touch $(CORE) $@

$(DOCS): $(CORE)
	$(INSTALL) --no-build-isolation --editable ".[docs]"
	touch $@

$(NOTEBOOKS): $(CORE)
	$(INSTALL) --no-build-isolation --editable ".[notebooks]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find ppo_jax experiments tests -name __pycache__ -type d -prune -exec rm -rf {} +
