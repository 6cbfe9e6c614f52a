# Set-up happens by itself: a virtual environment in .venv from requirements.lock, made once and re-used until the
# lock or pyproject.toml changes. PYTHON=python3.12 chooses the interpreter; ARGS="…" goes to the command.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help setup demo test slow check bench ui clean
.DEFAULT_GOAL := help

help:
	@echo "make demo     the whole Gamma story on the embedded world: train, sweep, evaluate, release"
	@echo "make test     all fast tests"
	@echo "make slow     the slow ones: fuzzing, kills, statistics over thousands of draws"
	@echo "make check    format, lint, types, import direction"
	@echo "make ui       MLflow's UI on the local record"
	@echo "make bench    the side-by-side measurements"
	@echo "make clean    remove .venv and caches; results in mlruns stay"

setup: $(READY)

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Ambergrade needs Python 3.11 or newer; '$(PYTHON)' is `$(PYTHON) --version 2>&1`. Try: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(PIP) install --require-hashes -r requirements.lock
	$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

demo: $(READY)
	$(BIN)/python pipelines/gamma.py experiment=gamma_tiny $(ARGS)

# One thread a process: on few cores several threads wait for each other.
test: export OMP_NUM_THREADS ?= 1
test: export MKL_NUM_THREADS ?= 1
test: $(READY)
	$(BIN)/pytest -m "not slow" $(ARGS)

slow: export OMP_NUM_THREADS ?= 1
slow: export MKL_NUM_THREADS ?= 1
slow: $(READY)
	$(BIN)/pytest -m slow --durations=15 $(ARGS)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY)
	@set -e; for file in bench/*.py; do echo "== $$file"; $(BIN)/python $$file $(ARGS); done

ui: $(READY)
	$(BIN)/python -m ambergrade.track.ui $(ARGS)

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache src/*.egg-info
	find . -path ./mlruns -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
