# Every target does its own set-up: a virtual environment inside the project, torch first and pinned.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-quick check format wheel bench clean

# Train nothing, download nothing: search a merge of the shipped checkpoints, publish and report it.
demo: $(INSTALLED)
	$(BIN)/remelt demo --output ./remelt-demo

# Two processes, one of them for all that needs a Ray cluster.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadgroup

test: $(INSTALLED)
	$(PYTEST) tests

test-quick: $(INSTALLED)
	$(PYTEST) tests -m "not slow"

check: $(INSTALLED)
	$(BIN)/ruff format --check pipeline evals jobs tests benchmarks
	$(BIN)/ruff check pipeline evals jobs tests benchmarks
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff format pipeline evals jobs tests benchmarks
	$(BIN)/ruff check --fix pipeline evals jobs tests benchmarks

wheel: $(INSTALLED)
	rm -rf dist
	$(BIN)/python -m build --wheel --no-isolation

bench: $(INSTALLED)
	$(BIN)/python benchmarks/run_all.py

clean:
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache remelt-demo
	find pipeline evals jobs tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt pip setuptools wheel ninja
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt --no-build-isolation deepspeed
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@
