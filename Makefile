# One line each; CI runs the same. Without an active virtual environment, one is made in .venv.
EXTRAS ?= dev
VENV := $(or $(VIRTUAL_ENV),.venv)
PYTHON := $(VENV)/bin/python

# Without a GPU only what needs them compiles the CUDA kernels, which takes minutes: test-all and the packages.
demo test: export EEKD_CUDA ?= $(if $(wildcard /dev/nvidia0),,0)

.PHONY: demo test test-all lint docs bench check-gpu sdist wheel check-packages install
demo: install
	$(PYTHON) -m eekd.train

test: install  # one thread each: where there are more threads than cores, all wait for all
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n auto --maxprocesses 4 --dist worksteal

# What `make test` runs, and every test marked "full"; TESTS='-m "full and not slow"' for these alone.
TESTS ?= -m "not slow"
test-all:
	$(MAKE) install EXTRAS=dev,timm,data,export,hf,trl,lightning
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n auto --maxprocesses 4 --dist worksteal $(TESTS)

# Formatting and types. It mends what ruff and clang-format can mend, and fails where it did.
lint:
	$(MAKE) install EXTRAS=dev,lint
	PATH="$(abspath $(VENV))/bin:$$PATH" $(PYTHON) -m pre_commit run --all-files --show-diff-on-failure

# The site, in build/site. Its notebook is run.
docs:
	$(MAKE) install EXTRAS=docs
	$(PYTHON) -m mkdocs build --quiet

bench: install
	$(PYTHON) -m eekd.kernels.bench --json results/bench.json

check-gpu: install
	$(PYTHON) tools/check_gpu.py

sdist wheel check-packages: install  # dist/; a wheel with CPU kernels only, and where nvcc is, one with CUDA kernels
	PYTHON=$(abspath $(PYTHON)) tools/packages $@

# Editable, against the environment's own torch, so that one torch serves build and run.
install: $(VENV)/eekd-$(EXTRAS)
$(VENV)/eekd-$(EXTRAS): setup.py pyproject.toml CMakeLists.txt $(shell find csrc -type f) | $(PYTHON)
	$(PYTHON) -m pip install --quiet "torch>=2.11" "setuptools>=77" wheel "pybind11>=2.13" "cmake>=3.24" ninja
	PATH="$(abspath $(VENV))/bin:$$PATH" $(PYTHON) -m pip install --quiet --no-build-isolation --editable ".[$(EXTRAS)]"
	touch $@
$(PYTHON):
	python3 -m venv $(VENV)
