# vswap: `make demo` runs it, `make test` checks it. Both set up everything themselves.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test sim chaos ci mutants swap-test upgrade-test guest-test nbd-conformance lint types proto bench bench-nbd up load down clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "vswap needs Python >= 3.11; $(PYTHON) is older (set PYTHON=...)"; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { echo "no venv module: apt-get install python3-venv"; exit 2; }
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: $(STAMP) ## run a whole cluster on this machine (ARGS="--seconds 10 --json out.json")
	$(BIN)/vswap demo $(ARGS)

test: lint types ## lint, types and every test that needs nothing but pip (ARGS="-k name")
	$(BIN)/pytest -m "not live" $(ARGS)

sim: $(STAMP) ## simulate SEEDS=1000 fault schedules on a virtual clock; SEED=n replays one (ARGS="--mutant NAME")
	PYTHONPATH=tests $(BIN)/python -m sim $(if $(SEED),--seed $(SEED),--seeds $(or $(SEEDS),1000)) $(ARGS)

chaos: $(STAMP) ## ROUNDS=20 of killing a VICTIM=node|coordinator|redis under load, a kernel swapping (SEED=n, ARGS="--swap no")
	PYTHONPATH=tests $(BIN)/python -m chaos --rounds $(or $(ROUNDS),20) --victim $(or $(VICTIM),node) --seed $(or $(SEED),0) $(ARGS)

mutants: $(STAMP) ## take the handling of every failure out, and see that its test notices (ARGS="NAME ...")
	PYTHONPATH=tests $(BIN)/python -m mutants $(ARGS)

ci: test ## `make test` plus what needs root or Debian packages
	deploy/ci.sh

swap-test: $(STAMP) ## a real kernel swaps on vswap (root, Debian)
	deploy/live.sh tests/live/test_swap.py

upgrade-test: $(STAMP) ## a newer build takes over a node that a kernel swaps on (root, Debian)
	deploy/live.sh tests/live/test_swap.py::test_a_newer_build_takes_over -s

guest-test: $(STAMP) ## guest kernels under QEMU swap on vswap, by a disk and by the nbd driver (root, Debian)
	deploy/live.sh tests/live/test_guest.py tests/live/test_guest_driver.py

nbd-conformance: $(STAMP) ## fio, nbdcopy, qemu-io and a file system on a space (root, Debian)
	deploy/live.sh tests/live/test_nbd_conformance.py

bench-nbd: $(STAMP) ## block devices against nbdkit and qemu-nbd, interleaved (needs fio)
	$(BIN)/python -m benchmarks.nbd $(ARGS)

lint: $(STAMP) ## ruff: lint and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) ## mypy --strict
	$(BIN)/mypy

proto: $(STAMP) ## regenerate the protobuf modules
	$(BIN)/python -m grpc_tools.protoc -I proto --python_out=proto --pyi_out=proto --grpc_python_out=proto proto/vswap/v1/*.proto

bench: $(STAMP) ## speed and memory, alternatives interleaved, each with floor and aim
	$(BIN)/python -m benchmarks $(ARGS)

up: ## start the compose cluster (docker compose v2 or docker-compose v1)
	@deploy/compose.sh up

load: ## put load on it and check every page (VSWAP_LOAD_PAGES, VSWAP_LOAD_SECONDS)
	@deploy/compose.sh load

down: ## stop the compose cluster and remove its volumes
	@deploy/compose.sh down

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
