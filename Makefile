# Everything runs in .venv, made from constraints.txt; nothing else is needed but Python 3.11+, pip, make and a C++20 compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BUILT := $(VENV)/.built
NATIVE := CMakeLists.txt $(wildcard native/* native/kernels/*)
TEST_REPORT := build/tests.xml

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint types format clean

help:  ## Show the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-8s %s\n", $$1, $$2}'

$(BUILT): pyproject.toml constraints.txt $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	# torch first and pinned: an open range may bring gigabytes of GPU libraries
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,recipes]'
	touch $(BUILT)

setup: $(BUILT)  ## Make .venv and build the native extension

demo: $(BUILT)  ## Convert the demo model and generate from it with half of its FFN in memory
	$(BIN)/python recipes/demo_lm/demo.py

test: $(BUILT)  ## Run all tests, and fail when none ran
	@mkdir -p build && rm -f $(TEST_REPORT)
	env -u PYTEST_ADDOPTS -u PYTEST_PLUGINS $(BIN)/python -m pytest --junitxml=$(TEST_REPORT)
	$(BIN)/python tests/check_ran.py $(TEST_REPORT)

lint: $(BUILT)  ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(BUILT)  ## mypy, strict, on src
	$(BIN)/mypy

format: $(BUILT)  ## Mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove what was built
	rm -rf $(VENV) build
