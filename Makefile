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
.PHONY: help install demo extract-trajectories fit fit-further report report-full bench bench-data ablations frontier gpu forecast base base-fashion base-fashion_text test lint format types unit toy docs clean

help: ## Show this list; BASE=… picks a folder of configs (default: fashion)
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-22s %s\n", $$1, $$2}'

install: $(INSTALLED) ## Make the virtual environment .venv and install the project with its development tools

$(INSTALLED): pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --upgrade --quiet pip "setuptools>=77" wheel
	$(VENV)/bin/pip install --progress-bar on -e ".[dev]"
	touch $@

demo: install ## Record, train the shipped shortcut further, report (14 to 16 minutes on two cores, a third more for fashion_text; installation not counted)
	$(MAKE) extract-trajectories fit-further report

extract-trajectories: install ## Record trajectories of BASE
	$(RUN) predict --config configs/$(BASE)/extract.yaml

fit: install ## Train the shortcut of BASE on its trajectories
	$(RUN) fit --config configs/$(BASE)/fit.yaml

fit-further: install ## The same, from the shipped shortcut on
	$(RUN) fit $(addprefix --config ,configs/$(BASE)/fit.yaml $(wildcard configs/$(BASE)/fit_further.yaml))

report: install ## Measure BASE with and without shortcut; WEIGHTS=random: latency only, at published size
	$(RUN) test --config configs/$(BASE)/$(if $(filter random,$(WEIGHTS)),latency,evaluate).yaml

report-full: install ## Report at full length: thousands of images per row, 3 seeds (hours); resumes where it stopped
	$(RUN) test $(addprefix --config ,configs/$(BASE)/evaluate.yaml $(wildcard configs/$(BASE)/full_length.yaml))

bench: BASE := maskgit
bench: install ## Measure where the time of a run goes, part by part (default: maskgit at published size, random weights)
	$(RUN) test --config configs/$(BASE)/bench.yaml

bench-data: install ## Measure the path of the data against what it replaces: loader, recording, encoding, training
	$(VENV)/bin/python -m benchmarks

ablations: install ## Measure what each part of BASE's shortcut is worth (hours), after extract-trajectories
	$(VENV)/bin/python -m benchmarks.ablations --config benchmarks/ablations_$(BASE).yaml

frontier: install ## Sweep every method of BASE on selection seeds and report the best rows of each (a day)
	$(VENV)/bin/python -m benchmarks.frontier --config benchmarks/frontier_$(BASE).yaml

gpu: install ## Measure decoding, recording and training of the published systems on this GPU, random weights (ten minutes)
	$(VENV)/bin/python -m benchmarks.gpu

forecast: install ## Count operations and memory of Lumina-DiMOO at published size, without weights or GPU
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
	$(RUN) fit --config configs/fashion/base_deep.yaml

base-fashion_text: # texts and their tokenizer, base, CLIP
	$(VENV)/bin/python -m lit_shortcut.fashion.captions checkpoints/fashion_text
	$(RUN) fit --config configs/fashion_text/base.yaml
	$(RUN) fit --config configs/fashion_text/base_anneal.yaml
	$(RUN) fit --config configs/fashion_text/base_deep.yaml
	$(RUN) fit --config configs/fashion_text/clip.yaml

test: lint types unit ## Check everything: lint, types, tests

lint: install ## Check form, style and the direction of imports
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/lint-imports --no-cache

types: install ## Check types
	$(VENV)/bin/mypy

unit: install ## Run the tests
	$(VENV)/bin/pytest

format: install ## Put the code in the project's form
	$(VENV)/bin/ruff check --fix --exit-zero .
	$(VENV)/bin/ruff format .

toy: install ## Run all verbs on a random toy base, in a minute
	$(VENV)/bin/pytest tests/test_configs.py

docs: install ## Build the documentation into build/site, warnings as errors
	$(VENV)/bin/pip install --quiet -e ".[docs]"
	$(VENV)/bin/mkdocs build

clean: ## Delete runs, caches and built documentation; keep the virtual environment
	rm -rf runs build .pytest_cache .mypy_cache .ruff_cache
