# make help
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
PYTHON ?= python3
VENV ?= .venv
BASE ?= fashion
WEIGHTS ?= trained
RUN := $(VENV)/bin/lit-shortcut
INSTALLED := $(VENV)/.installed
.DEFAULT_GOAL := help

# glibc hands large buffers back to the kernel after each operation; keeping them made the fashion base 1.3 times faster.
export MALLOC_MMAP_THRESHOLD_ ?= 4294967296
export MALLOC_TRIM_THRESHOLD_ ?= 8589934592

.NOTPARALLEL:
.PHONY: help install demo extract-trajectories fit report table report-full bench bench-data gpu forecast base base-fashion base-fashion_text test lint format types unit toy clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-22s %s\n", $$1, $$2}'

install: $(INSTALLED) ## Make the virtual environment .venv and install the project with its development tools

$(INSTALLED): pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --upgrade --quiet pip "setuptools>=77" wheel
	$(VENV)/bin/pip install --progress-bar on -e ".[dev]"
	touch $@

demo: install ## The main job on the embedded default: record, train, measure, report (about 12 minutes on two cores)
	$(MAKE) extract-trajectories fit report

extract-trajectories: install ## Record trajectories of BASE (default: fashion)
	$(RUN) predict --config configs/$(BASE)/extract.yaml

fit: install ## Train the shortcut of BASE on its trajectories
	$(RUN) fit --config configs/$(BASE)/fit.yaml

report: table ## Measure vanilla and accelerated generation of BASE: few images, one seed; finished rows are kept

table: install ## The table of BASE, as report; WEIGHTS=random: latency alone, at published size (BASE=maskgit)
	$(RUN) test --config configs/$(BASE)/$(if $(filter random,$(WEIGHTS)),latency,evaluate).yaml

report-full: install ## The same at full length (the defaults': thousands of images a row, 3 seeds); goes on where it stopped
	$(RUN) test $(addprefix --config ,configs/$(BASE)/evaluate.yaml $(wildcard configs/$(BASE)/full_length.yaml))

bench: BASE := maskgit
bench: install ## Where the time of one run goes, part by part (default: MaskGIT at published size, random weights)
	$(RUN) test --config configs/$(BASE)/bench.yaml

bench-data: install ## The path of the data against what it replaces: loader, recording, encoding, training
	$(VENV)/bin/python -m benchmarks

gpu: install ## Decoding, recording and training of the published systems on this machine's GPU, random weights, in ten minutes
	$(VENV)/bin/python -m benchmarks.gpu

forecast: install ## Operations and memory of Lumina-DiMOO at published size, counted without weights or GPU
	$(VENV)/bin/python -m benchmarks.forecast --config benchmarks/forecast.yaml

base: install ## Retrain the embedded default BASE (fashion, fashion_text) from images (hours)
	$(MAKE) base-$(BASE)

base-fashion: # tokenizer, classifier, reference statistics, base
	$(RUN) fit --config configs/fashion/tokenizer.yaml
	$(RUN) fit --config configs/fashion/classifier.yaml
	$(RUN) predict --config configs/fashion/reference.yaml
	$(RUN) test --config configs/fashion/reconstructions.yaml
	$(RUN) fit --config configs/fashion/base.yaml
	$(RUN) fit --config configs/fashion/base_sharpen.yaml

base-fashion_text: # texts and their tokenizer, base, CLIP
	$(VENV)/bin/python -m lit_shortcut.fashion.captions checkpoints/fashion_text
	$(RUN) fit --config configs/fashion_text/base.yaml
	$(RUN) fit --config configs/fashion_text/base_anneal.yaml
	$(RUN) fit --config configs/fashion_text/clip.yaml

test: lint types unit ## Lint, types, tests

lint: install
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/lint-imports --no-cache

types: install
	$(VENV)/bin/mypy

unit: install
	$(VENV)/bin/pytest

format: install ## Put the code in the project's form
	$(VENV)/bin/ruff check --fix --exit-zero .
	$(VENV)/bin/ruff format .

toy: install ## All four verbs on a random toy base, in a minute
	$(VENV)/bin/pytest tests/test_configs.py

clean: ## Delete runs and caches; keep the virtual environment
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache
