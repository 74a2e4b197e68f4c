# `make demo` and `make test` install what they need.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
RUN    ?= runs/demo
GPUS   ?= 1
NODES  ?= 1
ARGS   ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo browser test lint package docs bench bench-gpu data-given reproduce-yfcc15m reproduce-cc3m clean

help:
	@echo "make demo    install, download the built-in pairs, train DeCLIP on them, evaluate, write a report"
	@echo "make test    install, run all tests"
	@echo "make lint    ruff and mypy"
	@echo "make package build the wheel, install it alone, and use it"
	@echo "make docs    build the documentation into site/; a broken link is an error"
	@echo "make bench   install open_clip and compare its speed: a training step, and loading"
	@echo "make bench-gpu  speed, memory and exactness on one GPU, in 8 minutes; repeat it for the missing parts"
	@echo "make reproduce-yfcc15m DATA=… GPUS=8  check the data, estimate the cost, train DeCLIP, compare with the paper;"
	@echo "             ROOT=DIR of a table's images; IMAGENET=DIR and SETS=DIR to measure accuracy;"
	@echo "             METHOD=clip|slip|filip|declip|defilip BACKBONE=vitb32|r50 NODES=1; ARGS=--check: no training"
	@echo "make reproduce-cc3m  the same on CC3M with ResNet-50; METHOD=clip has a number that one GPU reaches"
	@echo "make setup   install into $(VENV)"

$(VENV)/.installed: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -e '.[dev]'
	@command -v npm >/dev/null || $(BIN)/python -m pip install -q -e '.[npm]'
	@touch $@

setup: $(VENV)/.installed

demo: setup
	$(BIN)/declip data download builtin:emoji
	$(BIN)/declip train demo-few-declip --out $(RUN) --resume

# The app's tests need a browser; root on Debian gets one, anybody else a line that says what is skipped.
CHROMIUM := apt-get install -y -q --no-install-recommends chromium
browser:
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	    { $(CHROMIUM) || { apt-get update -q && $(CHROMIUM); }; } >/dev/null 2>&1; } || \
	    echo "The app's browser tests will be skipped: no chromium in PATH. As root: apt-get install chromium"

test: setup browser
	$(BIN)/python -m pytest -q -n 3 --dist worksteal

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

package: setup
	scripts/check_package $(BIN)

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

$(VENV)/.benched: $(VENV)/.installed
	$(BIN)/python -m pip install -q -e '.[bench]'
	@touch $@

bench: $(VENV)/.benched
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/loader.py

bench-gpu: $(VENV)/.benched
	$(BIN)/python benchmarks/gpu.py --out runs/gpu

data-given:
	@test -n "$(DATA)" || { echo "DATA is missing: make $(MAKECMDGOALS) DATA='/data/{00000..01538}.tar'"; exit 2; }

reproduce-yfcc15m reproduce-cc3m: data-given setup
	$(BIN)/python scripts/reproduce.py $(@:reproduce-%=%) --data '$(DATA)' --gpus $(GPUS) --nodes $(NODES) \
	    $(if $(ROOT),--root '$(ROOT)') $(METHOD:%=--method %) $(BACKBONE:%=--backbone %) \
	    $(if $(IMAGENET),--test 'imagenet:$(IMAGENET)') $(if $(SETS),--test 'paper11:$(SETS)') $(ARGS)

clean:
	rm -rf runs site .pytest_cache .mypy_cache .ruff_cache
