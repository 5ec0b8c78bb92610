# `make quickstart` and `make test` work in a fresh clone: each first makes .venv, once (requirements/install.sh).
SHELL := bash
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help venv quickstart ledger test lint types imports shell unit functional clean

export PATH := $(CURDIR)/.venv/bin:$(PATH)
unexport PYTHONPATH PYTHONHOME
START := $(shell date +%s)
# Tests never go to the network for models or data. One thread a process: two workers share the machine's cores.
TEST_ENV := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1

# $(call step,NAME,COMMAND): run a command between two lines that say what it is and how long it took.
define step
@printf '\n==> %s\n' '$(1)'; { $(2); }; status=$$?; printf '<== %s: %d s\n' '$(1)' $$SECONDS; exit $$status
endef

help: ## this list
	@grep -E '^[a-z]+:.*## ' Makefile | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 14

venv: ## make .venv from requirements/cpu.lock (PYTHON=/path/to/python3.11 to choose the interpreter)
	@requirements/install.sh

quickstart: venv ## self-distil a tiny Qwen3 on the full stack; ends with a table and a picture (ARGS=... for its options)
	@python examples/quickstart/run.py $(ARGS)
	@printf 'make quickstart: %d s\n' $$(($$(date +%s) - $(START)))

ledger: venv ## train what docs/results.md lacks, for hours, and write it (ARGS='--bases C --arms "opsd_*" --seeds 0')
	@python -m examples.ledger run $(ARGS); status=$$?; python -m examples.ledger report && exit $$status

test: venv lint types imports shell unit functional ## everything a change has to pass
	@printf '\nmake test: all passed, %d s\n' $$(($$(date +%s) - $(START)))

lint: venv ## ruff: rules and formatting
	$(call step,ruff,ruff check . && ruff format --check .)

types: venv ## mypy: strict, with allowances where untyped Megatron-Core comes in
	$(call step,mypy,mypy)

imports: venv ## import-linter: the layers of docs/architecture.md
	$(call step,import-linter,lint-imports)

shell: venv ## shellcheck
	$(call step,shellcheck,find . -path ./.venv -prune -o \( -name '*.sh' -o -name '*.sbatch' -o -path './.ci/run' \) -print0 | xargs -0 shellcheck)

unit: venv ## unit tests, two at a time (ARGS=... for pytest)
	$(call step,unit tests,$(TEST_ENV) pytest tests/unit -n 2 --dist loadfile $(ARGS))

functional: venv ## functional tests: whole jobs of several processes, one job at a time (ARGS=... for pytest)
	$(call step,functional tests,$(TEST_ENV) pytest tests/functional $(ARGS))

clean: ## remove .venv, caches and build leftovers; runs and checkpoints stay
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
