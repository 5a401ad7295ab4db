# Needs python3 (>= 3.11), make and a C++ compiler; everything else goes into $(VENV).
#
#   make demo      convert a real file (generated data where there is none), iterate shuffled batches, print cells/s
#   make test      lint, types and every test that is neither exhaustive nor needs a GPU
#   make test-all  the same with the exhaustive tests
#   make check     lint, types and the house rules only
#   make docs      the documentation site into site/, warnings being errors; its tools go into $(DOCS_VENV)
#   make gpu-check what only a GPU can prove, in under eight minutes: needs torch with CUDA, CuPy, Numba, SciPy, pandas, pyarrow, xxhash and tqdm in GPU_PYTHON; installs nothing
#   make bench     our loader, bionemo-scdl, and annbatch where it is built, on 20,000 Tahoe-like cells: in under ten minutes
#   make bench-all every peer, in environments that are made first, CSR and dense, three hours at most beside making these; BENCH_ARGS="--cells 1000000" and other options
#
# JOBS=2 (processes of tests), PYTHON=python3.12, VENV=/elsewhere, PYTEST_ARGS="-k header", SCDL_TEST_DATA=/folder/of/h5ad

PYTHON ?= python3
VENV ?= .venv
DOCS_VENV ?= .venv-docs
PYTEST_ARGS ?=
JOBS ?= 2
BENCH_ARGS ?=
GPU_PYTHON ?= python3

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Numba compiles a function anew when its own file changes, not when one changes whose functions it has taken in.
export NUMBA_CACHE_DIR := $(abspath $(VENV))/numba-cache-$(shell cat kernels/*.py | cksum | cut -d ' ' -f 1)

.PHONY: demo test test-all check docs bench bench-all gpu-check lint env clean

demo: $(STAMP)
	$(BIN)/python examples/demo.py

test: lint
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile -m "not gpu and not exhaustive" $(PYTEST_ARGS)

test-all: lint
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile -m "not gpu" $(PYTEST_ARGS)

check: lint
	$(BIN)/python -m pytest -q tests/house $(PYTEST_ARGS)

# An environment of its own: the site is built from the sources as text, so it needs neither torch nor this package.
docs: $(DOCS_VENV)/.installed
	PATH="$(abspath $(DOCS_VENV))/bin:$$PATH" NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/python -m mkdocs build --strict --quiet

$(DOCS_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(DOCS_VENV)
	$(PYTHON) -c 'import tomllib; print("\n".join(tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"]))' > $(DOCS_VENV)/docs.txt
	$(DOCS_VENV)/bin/python -m pip install -q -r $(DOCS_VENV)/docs.txt
	@touch $@

gpu-check: export NUMBA_CACHE_DIR := $(abspath gpu-check)/numba-cache
gpu-check:
	$(GPU_PYTHON) benchmarks/gpu_check.py

bench: $(VENV)/.bench
	$(BIN)/python benchmarks/tahoe100m.py --peers bionemo-scdl,annbatch --max-time 1.5 --warmup-time 0.5 --turn-limit 20 --loader-limit 70 $(BENCH_ARGS)

bench-all: $(VENV)/.bench
	$(BIN)/python benchmarks/tahoe100m.py --peers all --build-peers --output csr,dense $(BENCH_ARGS)

$(VENV)/.bench: $(STAMP)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,dask,bench]'
	$(BIN)/python -m pip install -q --no-deps --force-reinstall -e .
	@touch $@

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy --strict

env: $(STAMP)

# kvikio alone, 24 MB without the CUDA libraries it depends on, for the test of its host path; that test is skipped where there is no wheel.
KVIKIO := kvikio-cu13==26.10.0 libkvikio-cu13==26.10.0 rapids-logger==0.3.0 nvidia-cufile==1.20.0.107 cuda-pathfinder==1.9.1

# torch goes first: its pinned build decides what the rest, bionemo-scdl among it, is resolved against.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is too old: Python 3.11 or newer is needed; try make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV) || { echo "no venv module: install it (Debian, Ubuntu: apt-get install python3-venv), or name another Python: make PYTHON=..."; exit 1; }
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,dask]'
	$(BIN)/python -m pip install -q --no-deps --force-reinstall -e .  # last: bionemo-scdl has a script of the same name
	-$(BIN)/python -m pip install -q --no-deps $(KVIKIO)
	@touch $@

clean:
	rm -rf $(VENV) $(DOCS_VENV) site build dist .mypy_cache .ruff_cache .hypothesis demo-data bench-data
