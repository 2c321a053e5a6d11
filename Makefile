# `make train` on a fresh machine with Python installs gpuback into .venv and trains a network on handwritten digits;
# `make test` installs what the tests need and runs them. Nothing is installed outside .venv.
PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= 2

.PHONY: train test test-peers check bench bench-pytest figures dist clean

train: .venv/.cli
	$(BIN)/gpuback train digits

test: .venv/.test
	$(BIN)/python -m pytest -n $(WORKERS) --durations=5

# Against other libraries, in the same environment; PyTorch's CPU build is a large download.
test-peers: .venv/.peers
	$(BIN)/python -m pytest tests/peers

check: .venv/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: .venv/.bench
	$(BIN)/python -m benchmarks.training_step

# gpuback's own timings, for regressions
bench-pytest: .venv/.bench
	$(BIN)/python -m pytest benchmarks -o addopts= --benchmark-only

figures: .venv/.cli
	$(BIN)/python docs/make_figures.py

dist: .venv/.dev
	$(BIN)/python -m build --outdir dist

clean:
	rm -rf .venv dist

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
