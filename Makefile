# `make` lists the targets. Every target makes the environment first, once.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help new serve test site outputs mutants decoder bench reference checkers lock clean

TORCH ?= torch==2.13.0
# The first that runs, is new enough and can make an environment.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do $$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11, 5))' 2>/dev/null && echo $$p && break; done)
export NO_MKDOCS_2_WARNING := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Two torch processes with two threads each on two cores are thirty times slower.
export OMP_NUM_THREADS := 1

python := .venv/bin/python
# The blocks of a page run in order, so that a file stays with one process.
parallel := -n auto --maxprocesses 4 --dist loadfile
# PAGE=attention/multi-head: this page and the tests of its snippet.
snippet = $(subst -,_,$(or $(shell sed -n 's/^snippet: //p' docs/$(PAGE).md),$(PAGE)))
pages = $(if $(PAGE),docs/$(PAGE).md $(wildcard tests/$(dir $(snippet))test_$(notdir $(snippet)).py))

help: ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

new: .venv/installed ## begin a concept: page, snippet and test (PAGE=chapter/name)
	$(python) -m tools.new $(PAGE)

serve: .venv/installed ## serve the site on localhost, reloading on every change
	$(python) -m mkdocs serve --livereload

test: .venv/installed ## run every test and every block (PAGE=attention/multi-head for one page)
	$(python) -m pytest $(or $(pages),$(parallel))

site: test ## the tests, the labs, then the strict build and the gate on its HTML
	LABS=true $(python) -m mkdocs build --strict --clean
	$(python) -m tools.gate site
	$(python) -m pytest -q tests/site --every-page $(parallel) --dist load

outputs: .venv/installed ## rewrite the outputs and figures that the pages show (PAGE=…)
	$(if $(filter labs/%,$(PAGE)),,$(python) -m pytest -q --write-outputs $(if $(PAGE),docs/$(PAGE).md,docs))
	$(if $(or $(filter labs/%,$(PAGE)),$(if $(PAGE),,all)),LABS=true OUTPUTS=write $(python) -m mkdocs build --quiet --site-dir .cache/outputs)

mutants: .venv/installed ## break every snippet, see the tests turn red (PAGE=attention for one chapter)
	$(python) -m tools.mutants $(PAGE)

decoder: .venv/installed ## train the pages' small language model anew (half a minute)
	$(python) -m decoder.train

bench: reference ## time the build and the snippets, weigh the pages
	$(python) -m tools.bench
	$(python) -m bench.speed

reference: .venv/installed ## install the heavy reference libraries that the tests compare with
	.venv/bin/pip install --quiet --no-deps --require-hashes -r requirements-reference.txt

checkers: ## install the HTML checker and Lighthouse (needs npm; Java runs the first)
	npm install --silent --no-fund --no-audit --prefix .cache/checkers vnu-jar@26.9.27 lighthouse@12.8.2

lock: .venv/installed ## solve the dependency groups of pyproject.toml anew
	.venv/bin/pip install --quiet uv
	lock() { .venv/bin/uv pip compile --quiet --universal --python-version 3.11.5 --generate-hashes --custom-compile-command "make lock" "$$@"; }; \
	lock --group site --group test --group torch-needs -o requirements.txt; \
	lock --group reference --no-emit-package torch -c requirements.txt -o requirements-reference.txt

clean: ## remove the environment and everything made
	rm -rf .venv .cache site mutants .coverage .pytest_cache .ruff_cache

# PyTorch's CPU build: from a local wheel folder where pip has one, from PyPI on a Mac,
# else from PyTorch's own index. PyPI's Linux build brings gigabytes of CUDA.
cpu_index := $(if $(or $(PIP_FIND_LINKS),$(filter Darwin,$(shell uname))),,--extra-index-url https://download.pytorch.org/whl/cpu)

.venv/installed: requirements.txt Makefile
	@test -n "$(PYTHON)" || \
	  { echo "Python 3.11.5 or newer with venv is needed (PYTHON=/path/to/python3 to name one)"; exit 1; }
	@test -x .venv/bin/python || $(PYTHON) -m venv .venv
	@echo "Installing into .venv: about a minute, once."
	@.venv/bin/pip install --quiet --require-hashes -r requirements.txt
	@.venv/bin/pip install --quiet $(cpu_index) "$(TORCH)"
	@touch $@
