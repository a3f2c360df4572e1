# Each target makes its own virtual environment and does nothing where that is done already.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
SHAPES ?= embedded smollm2-135m gpt2 opt-125m tinyllama-1.1b
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: setup run test check bench clean

setup: $(VENV)/.runtime

$(VENV)/.runtime: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Fusebox needs Python 3.11 or newer; set PYTHON=..."; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV); echo "Python's venv module is missing; on Debian install python3-venv."; exit 1; }
	@echo "Installing what Fusebox needs (minutes, once) ..."
	@$(PIP) -r requirements.txt
	@touch $@

$(VENV)/.dev: requirements-dev.txt $(VENV)/.runtime
	@$(PIP) -r requirements-dev.txt
	@touch $@

run: setup
	@$(BIN)/python app.py

check: $(VENV)/.dev
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/python -m benchmarks.readme --check
	@$(BIN)/python -m pytest tests/test_layers.py -q --durations=0

test: $(VENV)/.dev
	@$(BIN)/python -m tests.browser.chromium
	@$(BIN)/python -m pytest -n 2 --dist loadfile

bench: setup
	@$(BIN)/python -m benchmarks.chat
	@$(BIN)/python cli.py bench decode $(SHAPES:%=--shape %) --json benchmarks/results/decode.json
	@$(BIN)/python cli.py bench prefill $(SHAPES:%=--shape %) --json benchmarks/results/prefill.json
	@$(BIN)/python cli.py bench kernels --json benchmarks/results/kernels.json
	@$(BIN)/python cli.py bench kv --json benchmarks/results/kv.json
	@$(BIN)/python -m benchmarks.readme

clean:
	@rm -rf $(VENV)
