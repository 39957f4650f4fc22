PYTHON ?= python3
BIN := .venv/bin

SHELL := bash -o pipefail

.PHONY: demo test reproduce-small torture gpu-check

# Trains the supervised baseline and MetaSemi on real handwritten digits, 50 of them labeled, on the CPU, and draws Figure 3.
demo: .venv/installed
	$(BIN)/python reproduce.py figure3 --dataset digits

test: .venv/installed
	$(BIN)/ruff check
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadgroup

# The ablation on real images at small scale, on the CPU: those of data/cifar10-images if they are there, else CIFAR-10 itself.
reproduce-small: .venv/installed
	$(BIN)/python reproduce.py ablation --scale 0.2 --jobs 2 \
		--dataset $(if $(wildcard data/cifar10-images/train),cifar10-jpeg-small,cifar10-small)

# Injects every fault of tests/injections.py into real runs, some ten minutes long.
torture: .venv/installed
	$(BIN)/python benchmarks/torture.py

# What a first GPU is to answer, in ten minutes, into results/gpu-check.md.
gpu-check: .venv/installed
	@mkdir -p results
	$(BIN)/python benchmarks/gpu_check.py | tee results/gpu-check.md

.venv/installed: requirements.txt requirements-dev.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt -r requirements-dev.txt \
		-c constraints.txt
	touch $@
