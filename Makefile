# Every target is complete on a fresh machine: it makes the environment it needs, and reuses it.
#   make demo    trains five small networks and writes runs/demo/report.html
#   make test    the whole test suite
#   make zoo     every model of benchmarks/zoo/models.txt against its dense self: an hour or two
#   make lint    ruff, mypy, clang-format
#   make docs    the documentation's site in build/docs
#   make dist    the source distribution and, built from it, the wheel: both in dist/, checked
# VENV=path uses (or makes) a virtual environment elsewhere; PYTHON=path chooses the interpreter.
# NEQ_BUILD_CUDA=1 builds the CUDA kernels too, which takes nvcc and minutes; auto does where there is
# an nvcc. Asked for later, they are built then.

SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
BUILD_INPUTS := constraints.txt pyproject.toml setup.py MANIFEST.in $(shell find csrc -type f 2>/dev/null)
export NEQ_BUILD_CUDA ?= 0
export PATH := $(abspath $(VENV))/bin:$(PATH)
STAMP := $(VENV)/.neq_kernels_installed.cuda_$(NEQ_BUILD_CUDA)
JOBS ?= 2
DOCS_EXTRA := import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])

.PHONY: demo demo-quick test zoo lint docs dist install clean

demo: install
	$(PY) -m benchmarks.training.demo

demo-quick: install
	$(PY) -m benchmarks.training.demo --quick --out runs/demo-quick

test: install
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) $(PYTEST_ARGS)

zoo: install
	OMP_NUM_THREADS=1 $(PY) -m benchmarks.zoo --jobs $(JOBS) $(ZOO_ARGS)

lint: install
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	find csrc tests benchmarks -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(VENV)/bin/clang-format --dry-run -Werror

# Reads the sources only: PyTorch and the extension are not needed.
docs: $(PY)
	$(PY) -m pip install --quiet -c constraints.txt $$($(PY) -c '$(DOCS_EXTRA)')
	$(PY) -m properdocs build --strict --config-file mkdocs.yml

dist: install
	rm -rf dist
	$(PY) -m build --no-isolation
	$(PY) -m twine check --strict dist/*

install: $(STAMP)

$(STAMP): $(BUILD_INPUTS) | $(PY)
	$(PY) -m pip install --quiet -c constraints.txt setuptools wheel ninja torch torchvision
	$(PY) -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[bench,test,lint,energy,release]'
	# Executes Triton kernels without a GPU. It asks for newer versions than it needs.
	$(PY) -m pip install --quiet -c constraints.txt --no-deps --ignore-requires-python ttsem
	# NVIDIA's headers say what the emulated instructions of CUDA do; its tools are not needed.
	$(PY) -m pip install --quiet -c constraints.txt --no-deps nvidia-cutlass nvidia-cuda-crt nvidia-cuda-cccl
	rm -f $(VENV)/.neq_kernels_installed*
	touch $@

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is missing or older than 3.11; name another: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' || \
	  { echo "error: $(PYTHON) has no venv; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf build dist *.egg-info neq_kernels/*.so
