# Every task of the project. Nothing has to be set up first: a target makes the virtual environment
# that it needs, and makes it again only when pyproject.toml or constraints.txt changes.

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
ARGS ?=
# Processes of the tests, each of one thread; 0 runs them in pytest's own, as a debugger needs it.
JOBS ?= 2
# Of `make gpu`: where, and whether in miniature (tiny).
DEVICE ?= cuda
SIZE ?= full
# The version of torch that `make constraints` pins; all else is the newest that goes with it.
TORCH ?= 2.13.0

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
# Python keeps what it has compiled: each process of the tests would compile torch anew without.
unexport PYTHONDONTWRITEBYTECODE

bin := $(VENV)/bin
# Half of the modules of torch alone are never imported here; imports compile the others.
pip_install = -m pip --disable-pip-version-check install --no-compile
# Today's pip chooses the versions in half the time of the one that Python brings.
venv = $(PYTHON) -m venv --upgrade-deps
sphinx = $(bin)/python -m sphinx -q -j $(JOBS) -d docs/_build/doctrees

.PHONY: help
help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo "Variables: ARGS (of compare, speed, gpu, gallery, papers and test), DEVICE ($(DEVICE)), SIZE ($(SIZE)), JOBS ($(JOBS)), PYTHON ($(PYTHON)), VENV ($(VENV)), TORCH ($(TORCH))"

# One stamp for each extra of pyproject.toml, and for those that it holds.
held_by_test := bench
held_by_clients := bench test
held_by_dev := bench test
$(VENV)/.installed-%: pyproject.toml $(CONSTRAINTS)
	@[ -x $(bin)/pip ] || { echo "making $(VENV)"; $(venv) $(VENV); }
	$(bin)/python $(pip_install) -c $(CONSTRAINTS) -e ".[$*]"
	@touch $@ $(held_by_$*:%=$(VENV)/.installed-%)

.PHONY: compare
compare: $(VENV)/.installed-bench  ## run the main comparison; ARGS="--help" lists its options
	$(bin)/python -m benchmarks.compare $(ARGS)

.PHONY: speed
speed: $(VENV)/.installed-bench  ## ours against the peers, which get an environment of their own
	$(bin)/python -m benchmarks.speed $(ARGS)

.PHONY: gpu
gpu: $(VENV)/.installed-test  ## all that needs a GPU, in 8 minutes; DEVICE=cpu SIZE=tiny tries it
	$(bin)/python -m benchmarks.gpu --device $(DEVICE) --size $(SIZE) $(ARGS)

.PHONY: gallery
gallery: $(VENV)/.installed-bench  ## measure and draw the pictures of the docs, docs/pictures
	$(bin)/python -m benchmarks.gallery $(ARGS)

.PHONY: papers
papers: $(VENV)/.installed-bench  ## reproduce the four papers, hours; it goes on where it was stopped
	$(bin)/python -m benchmarks.papers all $(ARGS)

.PHONY: test
test: $(VENV)/.installed-test  ## run the tests; ARGS="-m 'not slow'" leaves out the slow ones
	$(bin)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

.PHONY: test-clients
test-clients: $(VENV)/.installed-clients  ## run the tests in the loops of others, which it installs
	$(bin)/python -m pytest -n $(JOBS) --dist worksteal -m clients tests/integrations tests/docs $(ARGS)

.PHONY: check
check: lint types architecture docs wheel  ## all that follow, one after the other

.PHONY: lint
lint: $(VENV)/.installed-dev  ## ruff: rules and format
	$(bin)/ruff check
	$(bin)/ruff format --check

.PHONY: types
types: $(VENV)/.installed-dev  ## mypy, strict
	$(bin)/mypy --strict

.PHONY: architecture
architecture: $(VENV)/.installed-dev  ## imports point downward only
	$(bin)/python -m pytest tests/test_architecture.py

.PHONY: docs
docs: $(VENV)/.installed-dev  ## build the site strictly, docs/_build/html; it asks no other site
	$(sphinx) -b html -W --keep-going docs docs/_build/html
	@echo "docs/_build/html/index.html"

.PHONY: docs-serve
docs-serve: docs  ## show it at http://localhost:8000
	$(bin)/python -m http.server --bind localhost --directory docs/_build/html 8000

.PHONY: docs-links
docs-links: $(VENV)/.installed-dev  ## ask the sites that the docs link to
	$(sphinx) -b linkcheck docs docs/_build/links

.PHONY: wheel
wheel: $(VENV)/.installed-dev  ## build the sdist, the wheel from it, and import that in an environment of its own
	@tmp=$$(mktemp -d); trap 'rm -rf "$$tmp"' EXIT; set -x; \
	$(bin)/python -m build --outdir "$$tmp/dist" .; \
	$(venv) "$$tmp/venv"; \
	files=$$(find subspace_optim -name '*.py' -o -name py.typed); \
	mkdir "$$tmp/empty"; \
	"$$tmp/venv/bin/python" $(pip_install) -c $(CONSTRAINTS) "$$tmp"/dist/*.whl; \
	cd "$$tmp/empty"; "$$tmp/venv/bin/python" -I "$(CURDIR)/tests/wheel.py" $$files

.PHONY: format
format: $(VENV)/.installed-dev  ## format the code, and mend what ruff can mend
	$(bin)/ruff check --fix || true
	$(bin)/ruff format

define CONSTRAINTS_HEADER
# Every version that `make` installs, for builds of torch with and without CUDA.
# Written by `make constraints`: do not edit. (torch pins its own CUDA libraries.)
endef
export CONSTRAINTS_HEADER

.PHONY: constraints
constraints:  ## pin the newest versions anew, with the torch that TORCH names
	@tmp=$$(mktemp -d); trap 'rm -rf "$$tmp"' EXIT; set -x; \
	$(venv) "$$tmp/venv"; \
	"$$tmp/venv/bin/python" $(pip_install) "torch==$(TORCH)" -e ".[dev,clients]"; \
	{ set +x; } 2>/dev/null; \
	"$$tmp/venv/bin/python" -m pip freeze --all --exclude-editable --exclude pip > "$$tmp/frozen"; \
	{ echo "$$CONSTRAINTS_HEADER"; \
	  sed -E -e '/^(nvidia-|cuda-|triton==)/d' -e 's/^([^ ]+==[^+ ]+)\+[^ ]*$$/\1/' "$$tmp/frozen"; } > $(CONSTRAINTS)
	@echo "wrote $(CONSTRAINTS): $$(grep -c == $(CONSTRAINTS)) pins"

.PHONY: clean
clean:  ## remove .venv, caches and build results
	rm -rf .venv .venv-peers .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info docs/_build docs/reference
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
