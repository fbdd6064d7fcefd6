# What contributors and CI run; CONTRIBUTING.md says when. All of it works from a fresh checkout.
.DEFAULT_GOAL := help
.PHONY: help env demo test test-slow test-devices torture browser lint type check docs notebooks clean

BIN := .venv/bin
READY := .venv/.ready
DOCS_READY := .venv/.docs-ready
# threads of PyTorch that wait must not spin: beside other processes that slows everything down
export OMP_WAIT_POLICY := PASSIVE
# the first Python >= 3.11 that runs and can make environments
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; break; }; done)

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12

# The builds without CUDA of the two pinned versions; torchvision's ordinary build does not load beside PyTorch's CPU build.
define PYTORCH_FOR_CPU
@pair=$$(sed -nE 's/^((torch|torchvision)==[0-9.]+).*/\1+cpu/p' constraints.txt | tr '\n' ' '); \
	$(BIN)/python -m pip install --disable-pip-version-check -q --dry-run --no-deps $$pair >/dev/null 2>&1 || { \
		echo "make: your package index lacks $$pair(PyTorch's CPU builds): docs/install.md; or make env without CPU=1" >&2; \
		exit 3; }; \
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt $$pair
endef

env: $(READY)  ## .venv with everything pinned in constraints.txt, made once; CPU=1: PyTorch without CUDA
	@[ -z "$(CPU)" ] || $(BIN)/python -c "import sys; from importlib.metadata import version; sys.exit('+cpu' not in version('torch'))" || \
		echo "make: .venv was made before, with CUDA; make clean env CPU=1 makes it again without" >&2

# The stamp comes last, so that an interrupted install is done again. The link is for mypy, which does not see editable installs.
$(READY): pyproject.toml constraints.txt
	@[ -n "$(PYTHON)" ] || { echo "make: no Python >= 3.11 with venv and ensurepip was found; install one, or make PYTHON=/path/to/python3" >&2; exit 3; }
	[ -x $(BIN)/python ] || $(PYTHON) -m venv .venv
	$(if $(CPU),@echo "make: PyTorch without CUDA from your package index",@echo "make: about 3.2 GB to download, 6.1 GB on disk, 4 GB of it CUDA; CPU=1 leaves CUDA out")
	$(if $(CPU),$(PYTORCH_FOR_CPU))
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	mkdir -p build/src
	ln -sfn ../.. build/src/edge_compress
	touch $@

demo: env  ## the whole pipeline on the embedded default, into runs/demo
	$(BIN)/edge-compress --target x86 --out runs/demo

test: env  ## the fast tests, minutes
	$(BIN)/python -m pytest -m "not slow and not gpu" -n auto --maxprocesses 4 --durations 100

test-slow: env  ## the tests that take minutes each
	$(BIN)/python -m pytest -m "slow and not gpu"

test-devices: env  ## real peers: sshd, adbd, an Arm user space; what is missing is said
	$(BIN)/python tests/devices/make_roots.py
	$(BIN)/python -m pytest -m devices

# SEED=N repeats a night's; MINUTES is a bound on time, not on what is tried
torture: env  ## an hour of injected faults: kills, bit flips, mutated inputs, failed writes; into benchmarks/results/torture.json
	$(BIN)/python tests/torture --minutes $(or $(MINUTES),60) $(if $(SEED),--seed $(SEED)) --out benchmarks/results/torture.json

browser:  ## what the tests of the HTML pages need beside Chromium and Node, into build/browser
	mkdir -p build/browser
	cp tests/browser/package.json build/browser
	npm install --prefix build/browser --no-package-lock --no-audit --no-fund

# import-linter reads top-level packages only: under build/lint the four folders are parts of a namespace
lint: env  ## ruff: rules and format; import-linter: the order of the rooms
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p build/lint/edge_compress
	for part in pipeline targets calibration devices; do ln -sfn ../../../$$part build/lint/edge_compress/$$part; done
	PYTHONPATH=build/lint $(BIN)/lint-imports

type: env  ## mypy --strict
	$(BIN)/mypy

check: lint type test  ## all that a change must pass

# what mkdocs and notebooks need, beside the rest of .venv
$(DOCS_READY): $(READY)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev,docs]'
	touch $@

docs: $(DOCS_READY)  ## docs/cli.md from the command line itself, and the site into build/site
	$(BIN)/python docs/generate_cli.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

notebooks: $(DOCS_READY)  ## executes the notebooks, minutes; the next `make docs` shows their outputs
	$(BIN)/python docs/execute_notebooks.py

clean:  ## what was made here, except runs
	rm -rf .venv build dist edge_compress.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
