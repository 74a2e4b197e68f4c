# Two commands are all: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
RUN    ?= runs/demo

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint bench clean

help:
	@echo "make demo    install, prepare the built-in pairs, train DeCLIP on them, evaluate, write a report"
	@echo "make test    install, run the whole test suite"
	@echo "make lint    ruff and mypy"
	@echo "make bench   measure: views, tokeniser, step"
	@echo "make setup   only install, into $(VENV)"

$(VENV)/.installed: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -e '.[dev]'
	@command -v npm >/dev/null || $(BIN)/python -m pip install -q -e '.[npm]'
	@touch $@

setup: $(VENV)/.installed

demo: setup
	$(BIN)/declip data prepare builtin:emoji
	$(BIN)/declip train declip-demo --out $(RUN) --resume

test: setup
	$(BIN)/python -m pytest -q -n 2

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python benchmarks/run.py

clean:
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache
