# `make serve` and `make test` are all a newcomer needs; everything lives in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL ?= smollm2-135m
SERVE_FLAGS ?= --devices cpu:2 --device-memory 730MiB

.PHONY: install serve test lint unit paper bench-overload clean

install: $(VENV)/.installed
test-install: $(VENV)/.installed-test

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

serve: $(VENV)/.installed
	$(BIN)/python -m kunserve.server --model $(MODEL) $(SERVE_FLAGS) $(if $(ADMIN_KEY),--admin-key $(ADMIN_KEY))

lint: $(VENV)/.installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

unit: $(VENV)/.installed-test
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --max-worker-restart 0

test: lint unit

paper: $(VENV)/.installed-test
	$(BIN)/python scripts/figures/paper.py

bench-overload: $(VENV)/.installed-test
	$(BIN)/python scripts/bench/compare_policies.py

clean:
	rm -rf $(VENV) build *.egg-info
