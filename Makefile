# Two commands: `make demo` and `make test`. Both set up .venv by themselves and are quick the second time.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
DEMO := runs/quickstart

# Without an NVIDIA driver this release of torch: pip prefers its CPU build wherever one is offered.
TORCH := $(if $(shell command -v nvidia-smi),torch,torch==2.13.0)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test lint clean

demo: .venv/run $(DEMO)/assets/model/model.safetensors
	$(BIN)/chord-megatron train examples/quickstart/quickstart.yaml --nproc-per-node 2
	$(BIN)/chord-megatron report $(DEMO)/run
	$(BIN)/python examples/quickstart/solve.py $(DEMO)/run

test: lint
	$(BIN)/python -m pytest

lint: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf .venv $(DEMO)

$(DEMO)/assets/model/model.safetensors: examples/quickstart/make_quickstart.py | .venv/run
	$(BIN)/python $< --output-dir $(DEMO)/assets

.venv/run: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv (a few minutes the first time)"
	$(PIP) "$(TORCH)"
	$(PIP) --editable .
	touch $@

.venv/dev: .venv/run
	$(PIP) --editable '.[dev]'
	touch $@
