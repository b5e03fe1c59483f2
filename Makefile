# Two commands do everything: `make demo` and `make test`. `make help` lists the rest.
PYTHON ?= python3
BIN    := .venv/bin
REPO   := model_repository
ENGINE ?= embedded
# One stamp for each Python: with another PYTHON than the last, the environment is made anew.
STAMP  := .venv/.installed-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
UV     := uv==0.13.9
# Memory of the networks in huge pages, as the units have it: the detector is a tenth faster.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
# Compiled modules are kept whatever the shell says: collecting the tests takes half the time.
export PYTHONDONTWRITEBYTECODE :=

# One test process a processor; each has servers of its own.
WORKERS ?= $(shell n=$$(nproc); echo $$((n < 8 ? n : 8)))
PYTEST := $(BIN)/python -m pytest
# What a machine needs to boot another: then `make check` proves the deployment too.
CAN_BOOT := $(shell [ "$$(id -u)" = 0 ] && command -v systemd-nspawn >/dev/null && command -v debootstrap)

.PHONY: mutants simulate fuzz help install lock sizes models demo demo-edge demo-learn triton test test-slow test-systemd lint check bench clean
.DEFAULT_GOAL := help

help:  ## what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml requirements/install.py $(wildcard requirements/*.txt)
	test -e $@ || $(PYTHON) -m venv --clear .venv
	$(BIN)/python requirements/install.py development
	touch $@

install: $(STAMP)  ## a local virtual environment with everything, as locked; PYTHON=python3.13 takes that Python

lock:  ## the newest versions into requirements/; KEEP=1 changes only what pyproject.toml asks for
	$(PYTHON) -m venv .cache/lock && .cache/lock/bin/python -m pip install --quiet --disable-pip-version-check $(UV)
	.cache/lock/bin/python requirements/lock.py $(if $(KEEP),--keep)

sizes: $(STAMP)  ## how much disk the sets edge, learning and development take, installed
	@$(BIN)/python requirements/sizes.py

models: $(STAMP)  ## fetch and check the backbone, build the model repository (skips what is there)
	$(BIN)/semwatch-train build --repository $(REPO)

demo: models  ## a synthetic lot through the whole line, results on screen; ENGINE=triton runs it on a local Triton
	$(BIN)/semwatch demo --engine $(ENGINE)

demo-edge:  ## the same without torch, where the models are built already: in .cache/edge, with what a workstation gets
	test -e $(REPO)/head/1 || { echo "no models in $(REPO): copy them there, or run make models"; exit 2; }
	test -e .cache/edge || $(PYTHON) -m venv .cache/edge
	.cache/edge/bin/python requirements/install.py edge
	.cache/edge/bin/semwatch demo

demo-learn: models  ## two unseen defect types become classes: a lot, a cycle, names, the next lot
	$(BIN)/semwatch demo --learn

triton: models  ## a local Triton server, set up and running in the background; semwatch triton down ends it
	$(BIN)/semwatch triton setup && $(BIN)/semwatch triton up

test: models  ## the tests, but for those that take minutes; WORKERS=1 runs them one after another
	$(PYTEST) tests --numprocesses $(WORKERS) --dist worksteal -m "not slow"

test-slow: models  ## the tests that take minutes
	$(PYTEST) tests --numprocesses $(WORKERS) --dist worksteal -m slow

test-systemd: models  ## scenarios on a real systemd, booted in systemd-nspawn; root, systemd-container, debootstrap
	$(PYTEST) tests/systemd -s -o python_files='machine_*.py' $(if $(SCENARIOS),-k "$(SCENARIOS)")

lint: $(STAMP)  ## ruff, mypy, import contracts
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint  ## everything: the linters, all tests, and where this machine can boot another, a real systemd
	$(MAKE) test
	$(MAKE) test-slow
	$(if $(CAN_BOOT),$(MAKE) test-systemd,@echo "no systemd-nspawn, debootstrap or root here: the scenarios on a real systemd are left out")

bench: models  ## benchmarks: tables with ratios against a floor or a peer of the same run
	$(PYTEST) tests/benchmarks -s -o python_files='bench_*.py'

mutants: models  ## change the daemon in 150 places, one at a time, and see whether a test falls; an hour and more
	$(BIN)/python tests/mutants.py --out docs/mutants.json

SCHEDULES ?= 20000
simulate: $(STAMP)  ## intake and delivery under SCHEDULES=20000 schedules of faults and deaths, from SEED=1; planted mistakes
	SEMWATCH_SCHEDULES=$(SCHEDULES) SEMWATCH_SEED=$(or $(SEED),1) $(PYTEST) tests/service/test_simulation.py -s -n 0

fuzz: $(STAMP)  ## damaged images, stream entries, settings, model files: each kind for SECONDS=300
	PYTHONPATH=tests/helpers $(BIN)/python tests/helpers/fuzzing.py $(or $(SECONDS),300)

clean:  ## remove what was built here
	rm -rf .venv .cache demo $(REPO).triton $(REPO)/*/[0-9]* $(REPO)/crops
	rm -rf .hypothesis .pytest_cache .mypy_cache .ruff_cache .import_linter_cache report-* semwatch-results
