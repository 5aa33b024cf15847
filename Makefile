# The environment is .venv. `make test` and `make demo` make it when it is not there.
CONSTRAINTS ?= constraints.txt
# The first of these that runs and is new enough; the pins were tested with the first.
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: install demo test test-cluster check bench clean
.DELETE_ON_ERROR:

install: $(STAMP)

$(STAMP): pyproject.toml $(CONSTRAINTS)
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or newer is needed; name one with PYTHON=/path/to/python"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv; the first time takes minutes"
	$(BIN)/python -m pip install -c $(CONSTRAINTS) -e '.[dev]'
	@touch $@

# A small GPT on the standard library: corpus, tokenizer, training, a sample and a picture. Minutes on two cores.
demo: install
	$(BIN)/python -m pretrain.demo

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Two workers of one thread each: torch's tests are too small to gain from more threads. In the order of the tree, as a
# file of one long test would else come last and leave a worker idle.
test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m 'not cluster'

# On a real SLURM of three nodes on this machine; needs root, and the packages that .ci/run installs. Else skipped.
test-cluster: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m cluster

# The peers it measures beside need a package more.
bench: install
	$(BIN)/python -m pip install -q -c $(CONSTRAINTS) -e '.[dev,bench]'
	$(BIN)/python -m benchmarks

# The environment, caches and builds; never data/ or runs/.
clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache build *.egg-info
