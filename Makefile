# `make demo` and `make test` do all the set-up: they create .venv and install the pinned dependencies once.

PYTHON ?= $(firstword $(foreach version,3.11 3.12 3.13,$(if $(shell python$(version) -V 2>/dev/null),python$(version))) python3)
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check install -qq
STAMP := $(VENV)/.installed
TEST_STAMP := $(VENV)/.installed-for-tests

# One thread per process: the models of demo and tests are small, and more threads only wait for each other.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo environment test lint format clean

demo: $(STAMP)  ## build the corpus, train, evaluate, answer questions; writes runs/demo
	@$(RUN) examples/demo.py

environment: $(TEST_STAMP)  ## all that tests need, in .venv

# Files go in the order of their names: by default, slow ones with a single test go last, and a core waits for the other.
test: $(TEST_STAMP) lint  ## lint, then run every test
	@HF_HUB_OFFLINE=1 $(RUN) -m pytest -q -n auto --dist loadfile --no-loadscope-reorder

lint: $(STAMP)  ## style, docstrings and formatting
	@$(RUN) -m ruff check --quiet .
	@$(RUN) -m ruff format --check --quiet . || (echo "run: make format" && false)

format: $(STAMP)  ## mend what ruff can
	@$(RUN) -m ruff check --fix --quiet .
	@$(RUN) -m ruff format --quiet .

# torch goes first and alone, so that no other package can ask for its newest release and gigabytes of CUDA with it. pip
# compiles modules on one core, so that is left to all cores at the end; it fails for files that are no code of this Python.
$(STAMP): requirements.txt setup.py pyproject.toml
	@echo "Setting up $(VENV) with $(PYTHON) (once, a few minutes)"
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@$(PIP) --no-compile "$$(grep '^torch==' requirements.txt)"
	@$(PIP) --no-compile -r requirements.txt
	@$(PIP) --no-deps --editable .
	@$(RUN) -m compileall -qq -j 0 $(VENV)/lib || true
	@touch $@

$(TEST_STAMP): $(STAMP) requirements-quantization.txt
	@$(PIP) -r requirements-quantization.txt
	@touch $@

clean:  ## forget the environment and every build product; runs/ stays
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
