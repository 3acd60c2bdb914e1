# `make demo` and `make test` set up a fresh machine by themselves: a virtual environment in .venv
# with the pinned packages (some minutes, about 8 GB), once. Afterwards they only run.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV ?= .venv
# Python 3.11 is what the pins are tested with; any newer one may do.
PYTHON ?= $(firstword $(foreach name,python3.11 python3,$(shell $(name) --version >/dev/null 2>&1 && echo $(name))) python3)
PYTEST_ARGS ?=

RUN := $(VENV)/bin/python -m
READY := $(VENV)/.ready

.PHONY: help demo docs space space-build test test-long lint browser clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(READY)  ## the main job on synthetic images: no network and no data needed
	@$(VENV)/bin/glovlm demo

space: $(READY)  ## the page of spaces/glomeruli, on this machine alone, with mini
	@GLOVLM_ALLOW_FOLDERS=1 $(VENV)/bin/python spaces/glomeruli/app.py

SPACE_FOLDER ?= build/space
space-build:  ## that page with the package in a folder of its own, to push to the Hub
	@$(PYTHON) spaces/build.py "$(SPACE_FOLDER)"

test: lint browser  ## the lint, then every test
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(RUN) pytest -q -n 2 --dist worksteal --durations=10 $(PYTEST_ARGS)

test-long: $(READY)  ## races, kills and hostile input: up to an hour
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(RUN) pytest -q -m long --durations=10 $(PYTEST_ARGS)

lint: $(READY)  ## style and types
	@$(RUN) ruff check
	@$(RUN) ruff format --check
	@$(RUN) mypy

docs: $(READY)  ## docs/settings.md from the code, then the site, with its notebooks, in build/docs
	@$(RUN) hf_glovlm.cli.reference docs/settings.md
	@$(RUN) sphinx -q -W --keep-going -d build/doctrees docs build/docs
	@echo "Open build/docs/index.html."

# The page is tested in a real browser. Without one those tests say so and are skipped.
browser:
	@if ! command -v chromium >/dev/null; then \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
			apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends chromium; \
		else \
			echo "No chromium here: the tests of the page in a browser are skipped. Install the system package chromium to run them." >&2; \
		fi; \
	fi

clean:  ## remove the environment and every cache
	@[ ! -f "$(VENV)/pyvenv.cfg" ] || rm -rf "$(VENV)"
	@rm -rf build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "hf-glovlm needs Python 3.11 or newer and '$(PYTHON)' is older or missing: install one, or name it with 'make PYTHON=/path/to/python'." >&2; exit 2; \
	}
# Debian and Ubuntu keep half of venv in a package of its own.
	@if ! $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null; then \
		package="$$($(PYTHON) -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"; \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
			apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q "$$package"; \
		else \
			echo "'$(PYTHON)' cannot make virtual environments: install the system package $$package." >&2; exit 2; \
		fi; \
	fi
	@echo "Setting up $(VENV): some minutes and about 8 GB, this once."
	@$(PYTHON) -m venv "$(VENV)"
	@$(RUN) pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
