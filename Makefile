.DEFAULT_GOAL := help

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.installed

help:  ## show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(READY)  ## 12 minutes: train both stages on the built-in scenes, draw, judge, write runs/demo/report.html
	$(BIN)/dalle demo --minutes 12 --run runs/demo

test: $(READY)  ## every test of one process
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m 'not distributed'

test-distributed: $(READY)  ## several processes at every ZeRO stage train as one does, and survive kills (Linux)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m distributed

lint: $(READY)  ## format, lint and types, without changing a file
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint test test-distributed  ## what CI runs, and what to run before every commit

format: $(READY)  ## rewrite the code in the house format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

install: $(READY)  ## make the virtual environment .venv with the package and its development tools

# DALL_E is the package of the released dVAE, for tests/parity; its torchvision is not needed there.
$(READY): setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Python 3.11 or later is needed; name one: make PYTHON=python3.12 install" >&2; exit 2; }
	@echo "Installing into $(VENV): some minutes, once."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps DALL_E==0.1
	@touch $@

clean:  ## remove .venv, caches and build files; runs stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: help demo test test-distributed lint check format install clean
