PYTHON ?= python3
BIN := .venv/bin

SHELL := bash -o pipefail

.PHONY: demo test reproduce-small torture benchmark-gpu

# Trains the supervised baseline and MetaSemi on real handwritten digits, 50 of them labeled, on the CPU, and draws Figure 3.
demo: .venv/installed
	$(BIN)/python reproduce.py figure3 --dataset digits

test: .venv/installed
	$(BIN)/ruff check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadgroup

# The ablation on real images at small scale, on the CPU: those of data/cifar10-images if they are there, else CIFAR-10 itself.
reproduce-small: .venv/installed
	$(BIN)/python reproduce.py ablation --scale 0.2 --jobs 2 \
		--dataset $(if $(wildcard data/cifar10-images/train),cifar10-jpeg-small,cifar10-small)

# Injects every fault of tests/injections.py into real runs, some ten minutes long.
torture: .venv/installed
	$(BIN)/python benchmarks/torture.py

# All figures of benchmarks/README.md that need a GPU, into results/benchmark-gpu.
benchmark-gpu: .venv/installed
	mkdir -p results/benchmark-gpu
	for arch in convlarge wideresnet shakeshake; do \
		$(BIN)/python benchmarks/step.py --device cuda --arch $$arch | tee results/benchmark-gpu/$$arch.md || exit 1; done
	$(BIN)/python benchmarks/step.py --device cuda --growth | tee results/benchmark-gpu/growth.md
	$(BIN)/python benchmarks/input.py --device cuda | tee results/benchmark-gpu/input.md
	$(BIN)/python benchmarks/streaming.py --device cuda | tee results/benchmark-gpu/streaming.md

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
	touch $@
