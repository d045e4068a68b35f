# Needs a Debian 12 (or the like) with make, git and Python 3.11; every target installs what is missing.
#
#   make demo    what lazyfarm does, on real parts, in one table
#   make test    every test but the long ones, which are a part of make faults

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-print-directory
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# The interpreter that .venv is made from.
PYTHON ?= python3
# `make demo IMAGE=debian:12` shows the same against an image of yours.
IMAGE ?=
# What `make simulate` simulates.
NODES ?= 2000
SEED ?= 1
# Options for pytest, e.g. PYTEST="-k flight -x".
PYTEST ?=

bin := .venv/bin
export PYTHON
# Debian keeps servers where an ordinary user's PATH doesn't look.
export PATH := $(PATH):/usr/local/sbin:/usr/sbin:/sbin
# Ray must neither report usage nor look for uv's project when a driver is started by it.
export RAY_USAGE_STATS_ENABLED := 0
export RAY_ENABLE_UV_RUN_RUNTIME_ENV := 0

.PHONY: help
help: ## Show the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/\1\t\2/p' Makefile | while IFS=$$'\t' read -r name what; do printf '  make %-8s %s\n' "$$name" "$$what"; done

.PHONY: setup
setup: packages packages-test environment ## Install what is missing: system packages, .venv, the embedded S3 server

.PHONY: lint
lint: environment ## Lint, types, layering
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy
	$(bin)/lint-imports

.PHONY: check
check: lint ## Lint, types, layering, unit and property tests
	$(bin)/python -m pytest -q tests/unit tests/property $(PYTEST)

.PHONY: test
test: packages packages-test environment ## Every test but the long ones, with the slowest ones named
	$(bin)/python -m pytest -q --durations=25 -m "not long" $(PYTEST)

.PHONY: faults
faults: packages packages-test environment ## Break every part of a farm in every way, the long ones too; writes docs/faults.md
	$(bin)/python -m pytest -q --durations=25 tests/faults --faults-report=docs/faults.md $(PYTEST)

.PHONY: soak
soak: packages environment ## Break a farm at random for MINUTES=… by SEED=…, checking it all along
	$(bin)/python -m tests.soak $(if $(MINUTES),--minutes $(MINUTES)) $(if $(SEED),--seed $(SEED))

.PHONY: demo
demo: packages environment ## Show what lazyfarm does and check every number; IMAGE=… for an image of yours
	$(bin)/python -m tests.demo $(if $(IMAGE),--image $(IMAGE))

.PHONY: pictures
pictures: packages packages-test environment ## Take the README's pictures of the page anew, of a real farm
	LAZYFARM_PICTURES=docs $(bin)/python -m pytest -q tests/cluster/test_page.py -k pictured

.PHONY: docs
docs: environment ## Make the documentation a site in build/docs; a link that leads nowhere is an error
	$(bin)/sphinx-build -q -W --keep-going -b html docs build/docs

.PHONY: bench
bench: packages environment ## Measure lazyfarm against its peers
	$(bin)/python -m tests.bench

.PHONY: simulate
simulate: environment ## Simulate a pull of 50 layers with faults, in virtual time; NODES=2000 SEED=1
	$(bin)/python -m tests.simulation --nodes $(NODES) --seed $(SEED)

.PHONY: packages packages-test
packages:
	@.ci/packages run
packages-test:
	@.ci/packages test

.PHONY: environment
environment: .venv/.is-current
	@$(bin)/python -c 'from storage.services.swift_environment import ensure_environment; ensure_environment()'

.venv/.is-current: requirements.lock pyproject.toml .ci/environment | packages
	@.ci/environment
	@touch $@
