# Every target sets itself up; nothing but python >= 3.11 and make is needed.
# Where torch comes from: name a CPU wheel index on Linux to save gigabytes, e.g.
#   make demo TORCH="torch==2.13.0 --index-url <your CPU wheel index>"
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
# A test takes one thread; they run side by side, at most eight (each takes some 1 GB).
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

.PHONY: demo test slow check clean

.venv/package: pyproject.toml Makefile
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q $(TORCH)
	$(BIN)/pip install -q -e .
	touch $@

.venv/ready: .venv/package
	$(BIN)/pip install -q -e '.[test]'
	touch $@

demo: .venv/package
	$(BIN)/llm-mlp demo

test: .venv/ready
	$(PYTEST)

slow: .venv/ready
	$(PYTEST) -m slow

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv
