# Two commands matter to a newcomer: `make demo` and `make test`. Both make .venv first, and both may be repeated.
SHELL := /bin/bash
VENV := .venv
PY := $(VENV)/bin/python
PACKAGES := compiler ir passes codegen runtime
SETUP_INPUTS := pyproject.toml scripts/setup.sh scripts/setup_env.py
# Extra arguments: make demo DEMO="--prompt 'Why is the sky blue?'"; make test TESTS=tests/ir; make bench BENCH=--help
DEMO ?=
TESTS ?=
BENCH ?=

.DEFAULT_GOAL := help
.PHONY: help demo test lint typecheck bench format clean

help:  ## show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 18

$(VENV)/.stamp-%: $(SETUP_INPUTS)
	@scripts/setup.sh $(VENV) $*

demo: $(VENV)/.stamp-demo  ## compile SmolLM2, watch it answer, and see it beside Hugging Face
	@$(PY) -m tilewright.demo $(DEMO)

test: $(VENV)/.stamp-test  ## the whole test suite
	@$(PY) -m pytest -n auto --dist loadfile --no-loadscope-reorder $(TESTS)

lint: $(VENV)/.stamp-dev  ## ruff and mypy
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(MAKE) --no-print-directory typecheck

# mypy cannot see through the folder mapping of an editable install, so it is shown the package as links.
typecheck: $(VENV)/.stamp-dev
	@rm -rf build/typecheck && mkdir -p build/typecheck
	@cp -rs $(CURDIR)/compiler build/typecheck/tilewright
	@for part in $(filter-out compiler,$(PACKAGES)); do cp -rs $(CURDIR)/$$part build/typecheck/tilewright/$$part; done
	@MYPYPATH=build/typecheck $(PY) -m mypy -p tilewright

format: $(VENV)/.stamp-dev  ## rewrite the sources in the project's format
	@$(PY) -m ruff check --fix-only .
	@$(PY) -m ruff format .

bench: $(VENV)/.stamp-demo  ## measure ours beside eager, torch.compile and llama.cpp
	@$(PY) -m benchmarks $(BENCH)

clean:  ## remove .venv and what tools left behind
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
