# `make train` on a fresh machine with Python installs gpuback into .venv and trains a network on handwritten digits;
# `make test` installs what tests need and runs those of three minutes, `make test-all` runs all of them. Nothing is
# installed outside .venv.
PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= 2
PARALLEL := -n $(WORKERS) --dist worksteal

.PHONY: train test test-all test-peers kernels sanitize check bench bench-report bench-pytest figures site dist clean

# On a machine with an NVIDIA driver, the CuPy for the CUDA version that it speaks of: training runs on the GPU then.
CUDA := $(shell nvidia-smi 2>/dev/null | sed -n 's/.*CUDA Version: *\([0-9]*\).*/\1/p')

train: .venv/.cli $(addprefix .venv/.cuda,$(filter 12 13,$(CUDA)))
	$(BIN)/gpuback train digits

# Every kernel, every public function, every README example; at most 3 minutes on two cores. tests/README.md says more.
test: .venv/.test
	$(BIN)/python -m pytest --quick $(PARALLEL) --durations=5

# All tests: all architectures, planted bugs, schedules, killed runs
test-all: .venv/.test
	$(BIN)/python -m pytest $(PARALLEL) --durations=10

# Against other libraries, in the same environment; PyTorch's CPU build is a large download.
test-peers: .venv/.peers
	$(BIN)/python -m pytest tests/peers

# All CUDA kernels for every architecture, with a table of what they need; fails on spills and missing matrix instructions.
kernels: .venv/.gates
	$(BIN)/python -m gpuback._gates --all

# compute-sanitizer over every kernel, on a machine with a GPU; where the tool is missing or refused, it says so.
sanitize: .venv/.cli $(addprefix .venv/.cuda,$(filter 12 13,$(CUDA)))
	PYTHON=$(BIN)/python tests/gpu/kernels/sanitize.sh

check: .venv/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# gpuback beside other libraries on this CPU; `python -m benchmarks --help` has the options, --device cuda among them.
bench: .venv/.bench
	$(BIN)/python -m benchmarks --json benchmark.json
	$(BIN)/python -m benchmarks report benchmark.json --plots .

# The table of README.md, from the last `make bench`
bench-report: .venv/.bench
	$(BIN)/python -m benchmarks report benchmark.json --readme README.md

# gpuback's own timings, with pytest-benchmark; to compare: BENCH='--benchmark-autosave --benchmark-compare'
bench-pytest: .venv/.bench
	$(BIN)/python -m pytest benchmarks -o addopts= --benchmark-only $(BENCH)

figures: .venv/.cli
	$(BIN)/python docs/make_figures.py

# The documentation, in build/site; a broken link is an error. The variable keeps Material from advertising its successor.
site: .venv/.site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

dist: .venv/.dev
	$(BIN)/python -m build --outdir dist

clean:
	rm -rf .venv dist build

.venv/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "gpuback needs Python 3.11 or later; $(PYTHON) is $$($(PYTHON) --version). Try: make PYTHON=python3.12 …" >&2; \
	  exit 1; }
	$(PYTHON) -m venv .venv
	touch $@

# .venv/.EXTRA says that the extra of that name is installed, as pyproject.toml now has it.
.venv/.%: pyproject.toml | .venv/.made
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	touch $@
