# Everything starts from `make quickstart`, `make test` or `make lint`; each sets itself up. The first set-up takes minutes,
# every later one nothing, as long as pyproject.toml and constraints.txt stay as they are.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

# A test's threads are its own affair: with a pool per process, two replicas would fight over the same cores.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
# What DeepSpeed builds is bound to its environment; in a common place, two environments would build it in turn.
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/.venv/torch_extensions
export HF_HUB_OFFLINE ?= 1
export RAY_USAGE_STATS_ENABLED ?= 0

TESTS := tests/integration tests/unit tests/simulation

.PHONY: help .venv quickstart test test-ray test-alone test-beside cluster rehearsal nvme soak gpu lint format bench docs clean

help: ## this list
	@awk -F ':.*## ' '/^[.a-z]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

.venv: .venv/.stamp ## the environment: .venv/, under constraints.txt

.venv/.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev,lora,zero3,plot,minilm,tensorboard]"
	@touch $@

quickstart: .venv/.stamp ## fine-tune a real model on real text, about three minutes on two cores
	$(BIN)/python -m launch.quickstart

test: .venv/.stamp ## integration, unit and simulation tests: those that start Ray, and beside them those that do not
	$(MAKE) --no-print-directory --jobs 3 --output-sync=target test-ray test-alone test-beside

test-ray: .venv/.stamp
	$(BIN)/python -m pytest -m "not gpu" -o cache_dir=.pytest_cache/ray tests/integration

# Ray's workers are nice, and would starve beside one that is not. Two, since Ray's tests wait half of the time.
test-alone: .venv/.stamp
	nice -n 19 $(BIN)/python -m pytest -m "not gpu" -o cache_dir=.pytest_cache/alone tests/unit/test_[a-m]*.py

test-beside: .venv/.stamp
	nice -n 19 $(BIN)/python -m pytest -m "not gpu" -o cache_dir=.pytest_cache/beside tests/unit/test_[n-z]*.py tests/simulation

cluster: .venv/.stamp ## several raylets, killed and drained; wants a machine that does nothing else meanwhile
	$(BIN)/python -m pytest tests/cluster

rehearsal: .venv/.stamp ## a rendered RayJob as Kubernetes would run it, pods scaled, drained and killed: four minutes, no cluster
	@$(BIN)/python -m tests.cluster.rehearsal

nvme: .venv/.stamp ## build what the tests of ZeRO-3's weights in files need (libaio-dev, a C++ compiler, minutes)
	DS_ACCELERATOR=cpu $(BIN)/python -c "from deepspeed.ops.op_builder import AsyncIOBuilder as A; A().load()"

soak: .venv/.stamp ## what takes longer: 20,000 simulated schedules, then half an hour of kills on a real Ray
	ZORAY_SCHEDULES=20000 $(BIN)/python -m pytest --timeout 3600 tests/simulation
	$(BIN)/python -m benchmarks.soak

gpu: .venv/.stamp ## the tests that need an accelerator
	$(BIN)/python -m pytest -m gpu --timeout 3600 $(TESTS)

lint: .venv/.stamp ## ruff (rules and format) and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.stamp ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/.stamp ## measure what benchmarks/RESULTS.md quotes
	$(BIN)/python -m benchmarks

docs: .venv/.stamp ## write docs/configuration.md anew from the configuration's own descriptions
	$(BIN)/python -m zoray.config.docs > docs/.configuration.md
	mv docs/.configuration.md docs/configuration.md

clean: ## remove what was built; runs/ is yours and stays
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis configs/quickstart/data
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
