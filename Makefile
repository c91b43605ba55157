# Every target sets up what it needs: tools/install.py makes .venv, reuses it while it is up to date, repairs it otherwise.
#   make demo [SIZE=smoke|full] [OUT=folder]     make test     make test-pages     make test-all     make lint     PYTHON=... says which Python

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
	if $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1; then echo $$p; exit; fi; done; \
	echo python3)
SIZE ?= full
OUT ?= demo-output
BIN := .venv/bin
JOBS ?= 2
PYTEST_ARGS ?= -n $(JOBS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help install demo test test-pages test-all lint clean

help: ## say what there is to make
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: ## make, update or repair .venv
	@$(PYTHON) tools/install.py

demo: install ## the whole chain on generated images, ending in demo-output/report.html
	@$(BIN)/python tools/demo.py --size $(SIZE) --out $(OUT)

test: install ## the tests, within 12 minutes on two cores
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

test-pages: install ## every command of every README, at its smallest size
	@$(BIN)/python -m pytest -m slow -k every_command $(PYTEST_ARGS)

test-all: install ## the slow tests too
	@$(BIN)/python -m pytest -m "slow or not slow" $(PYTEST_ARGS)

lint: install ## formatting, lint and types
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

clean: ## remove caches and the demo's output; .venv stays
	rm -rf demo-output .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
