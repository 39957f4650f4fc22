PYTHON ?= python3
BIN := .venv/bin

SHELL := bash -o pipefail

.PHONY: demo test torture benchmark-gpu

# Trains the supervised baseline and MetaSemi on real handwritten digits, 50 of them labeled, on the CPU, and draws Figure 3.
demo: .venv/installed
	$(BIN)/python benchmarks/ablation.py digits --rows neither both --save-path results/demo
	$(BIN)/python plot_features.py --checkpoint-path results/demo/neither-1/checkpoint.pth results/demo/both-1/checkpoint.pth \
		--row-label Baseline MetaSemi --mark-errors --save-path results/demo

test: .venv/installed
	$(BIN)/ruff check
	$(BIN)/python -m pytest

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

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
	touch $@
