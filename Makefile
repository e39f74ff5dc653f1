# make install   environment in .venv           make demo    EVOLVE on the embedded world
# make test      all that a change must pass    make bench   measure speed and memory

# Idle threads spin for some microseconds and then sleep, so that neighbours on the machine keep their cores.
export GOMP_SPINCOUNT ?= 30000
export PIP_DISABLE_PIP_VERSION_CHECK := 1

VENV := .venv
BIN := $(VENV)/bin
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for name in python3 python3.14 python3.13 python3.12 python3.11; do \
	if $$name -c '$(NEW_ENOUGH)' 2>/dev/null; then echo $$name; break; fi; done)
GPU ?= gpu
# What pip is asked for first; everything else is built around it. Any other: make install TORCH=torch
TORCH ?= $(shell grep '^torch==' constraints.txt)

.PHONY: help install demo test bench bench-gpu clean

help:
	@echo 'make install   build the environment in .venv (Python 3.11 or newer)'
	@echo 'make demo      run EVOLVE on the embedded world and show its turn table'
	@echo 'make test      lint, types and tests: all that a change must pass'
	@echo 'make bench     measure speed and memory, rewrite the table of docs/performance.md (BENCH=--quick: a check)'
	@echo 'make bench-gpu the same for the rows of a CUDA device'
	@echo 'make clean     remove .venv and caches; runs/ stays'
	@echo
	@echo 'PYTHON=python3.12   another interpreter      TORCH=torch   another build of torch'
	@echo 'GPU=h200                another name for the results of make bench-gpu'
	@echo 'VLLM=, LLAMA=       interpreters that have vllm and llama_cpp, for make bench'

install: $(VENV)/.installed

# Made anew only when the dependencies changed.
$(VENV)/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo 'upturn needs Python 3.11 or newer: make install PYTHON=/path/to/python' >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet '$(TORCH)'
	@grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt
	@$(BIN)/python -m pip freeze | sed -n 's/^\(torch==[^ ]*\).*/\1/p' >> $(VENV)/constraints.txt
	$(BIN)/python -m pip install --quiet -c $(VENV)/constraints.txt -e '.[dev]'
	@touch $@

demo: install
	$(BIN)/upturn run demo

test: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check --quiet
	$(BIN)/pyright
	$(BIN)/python -m pytest

bench: install
	$(BIN)/python benchmarks/startup.py $(BENCH)
	$(BIN)/python benchmarks/roofline.py $(BENCH)
	$(BIN)/python benchmarks/tree_step.py $(BENCH)
	$(BIN)/python benchmarks/chain.py $(BENCH) $(if $(VLLM),--vllm-python $(VLLM)) $(if $(LLAMA),--llama-cpp-python $(LLAMA))
	$(BIN)/python benchmarks/speculation.py $(BENCH)
	$(BIN)/python benchmarks/scale.py $(BENCH)
	$(BIN)/python benchmarks/stages.py $(BENCH)
	$(BIN)/python benchmarks/table.py

# In the order in which they are worth most, should the time run out. GPU names the files of the results.
bench-gpu: install
	$(BIN)/python benchmarks/tree_step.py --device cuda --out benchmarks/results/tree_step-$(GPU).json $(BENCH)
	$(BIN)/python benchmarks/chain.py --device cuda --out benchmarks/results/chain-$(GPU).json $(BENCH)
	$(BIN)/python benchmarks/roofline.py --device cuda --out benchmarks/results/roofline-$(GPU).json $(BENCH)
	$(BIN)/python benchmarks/speculation.py --device cuda --out benchmarks/results/speculation-$(GPU).json \
		--chains 1 2 4 8 --slots 64 256 --repeats 3 $(BENCH)
	$(BIN)/python benchmarks/scale.py --device cuda --out benchmarks/results/scale-$(GPU).json \
		--curve benchmarks/results/scale-$(GPU).svg $(BENCH)
	$(BIN)/python benchmarks/table.py

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
	find src tests benchmarks scripts -name __pycache__ -type d -exec rm -rf {} +
