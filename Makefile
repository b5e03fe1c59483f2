# Two commands do everything: `make demo` and `make test`. `make help` lists the rest.
PYTHON ?= python3
BIN    := .venv/bin
REPO   := model_repository
ENGINE ?= embedded
STAMP  := .venv/.installed
# Memory of the networks in huge pages, as the units have it: the detector is a tenth faster.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: help install models demo demo-learn triton test test-systemd check bench clean
.DEFAULT_GOAL := help

help:  ## what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

install: $(STAMP)  ## a local virtual environment with everything

models: $(STAMP)  ## fetch and check the backbone, build the model repository (skips what is there)
	$(BIN)/semwatch-train build --repository $(REPO)

demo: models  ## a synthetic lot through the whole line, results on screen; ENGINE=triton runs it on a local Triton
	$(BIN)/semwatch demo --engine $(ENGINE)

demo-learn: models  ## two unseen defect types become classes: a lot, a cycle, names, the next lot
	$(BIN)/semwatch demo --learn

triton: models  ## a local Triton server, set up and running in the background; semwatch triton down ends it
	$(BIN)/semwatch triton setup && $(BIN)/semwatch triton up

test: models  ## all tests
	$(BIN)/python -m pytest tests

test-systemd: models  ## scenarios on a real systemd, booted in systemd-nspawn; root, systemd-container, debootstrap
	$(BIN)/python -m pytest tests/systemd -s -o python_files='machine_*.py' $(if $(SCENARIOS),-k "$(SCENARIOS)")

check: models  ## what CI runs, and the linters: ruff, mypy, import contracts, tests
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest tests

bench: models  ## benchmarks: tables with ratios against a floor or a peer of the same run
	$(BIN)/python -m pytest tests/benchmarks -s -o python_files='bench_*.py'

clean:  ## remove what was built here
	rm -rf .venv .cache demo $(REPO).triton $(REPO)/*/[0-9]*
