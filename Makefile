# Everything from a fresh machine that has Python 3.11 and make.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help install quickstart test test-long test-fast test-bounds lint docs dist bench clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

$(STAMP): pyproject.toml constraints.txt
	@command -v "$(PYTHON)" >/dev/null || { echo "Python 3.11 or later is needed, and there is no '$(PYTHON)'; run make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else f"Python 3.11 or later is needed, $(PYTHON) is {sys.version.split()[0]}; run make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[ray,search,trackio,tensorboard,dev]' -c constraints.txt
	@touch $(STAMP)

install: $(STAMP)  ## make the environment in .venv and install into it

quickstart: $(STAMP)  ## fine-tune a tiny model on the built-in corpus (two CPU cores, three minutes)
	HF_HUB_OFFLINE=1 $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		recipes/sft.py --config quickstart

test: $(STAMP)  ## run the tests but for the long ones, in two processes (eleven minutes on two cores)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not long"

test-long: $(STAMP)  ## run the long tests: Ray, real models, many processes, the benchmark for a GPU
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -m long

test-fast: $(STAMP)  ## tests for daily work: none that is slow, needs a real model or starts processes
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not long and not slow and not distributed and not real_model"

BOUNDS ?= oldest
test-bounds:  ## quick tests with the oldest or newest allowed releases (BOUNDS=oldest|newest) in .venv-bounds
	$(PYTHON) -m venv .venv-$(BOUNDS)
	.venv-$(BOUNDS)/bin/python -m pip install --quiet $(if $(filter oldest,$(BOUNDS)),'torch==2.13.0',torch)
	.venv-$(BOUNDS)/bin/python -m pip install --quiet -e '.[tensorboard,trackio,dev]' $(if $(filter oldest,$(BOUNDS)),\
		'transformers==5.23.0' 'trl==1.16.0' 'datasets==5.0.1' 'accelerate==1.14.0',--upgrade transformers trl datasets accelerate)
	HF_HUB_OFFLINE=1 .venv-$(BOUNDS)/bin/python -m pytest -q -n 2 --dist loadfile \
		-m "not long and not slow and not distributed and not real_model" tests/labels tests/losses tests/trainers tests/recipes tests/cli

docs: $(STAMP)  ## build the site into build/site; a warning is an error
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]' -c constraints.txt
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir build/site

dist: $(STAMP)  ## build the wheel and the source distribution, and check them
	$(BIN)/python -m pip install --quiet --disable-pip-version-check build twine
	$(BIN)/python -m build --outdir build/dist
	$(BIN)/python -m twine check --strict build/dist/*

lint: $(STAMP)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)  ## measure against the peers; MODEL=folder of a chat model, ROWS=file of Alpaca rows, TEXTS=files of texts
	$(BIN)/python benchmarks/chat_preparation.py --rows $(ROWS) --tokenizer $(MODEL)
	$(BIN)/python benchmarks/packing.py
	$(BIN)/python benchmarks/corpus_preparation.py --texts $(TEXTS) --tokenizer $(MODEL)
	$(BIN)/python benchmarks/streaming.py --texts $(TEXTS) --tokenizer $(MODEL)
	$(BIN)/python benchmarks/mixture.py
	$(BIN)/python benchmarks/training_step.py --model $(MODEL)
	$(BIN)/python benchmarks/linear_cross_entropy.py --model $(MODEL)
	$(BIN)/python benchmarks/dpo_step.py --model $(MODEL) --answer 50
	$(BIN)/python benchmarks/reward_step.py --model $(MODEL) --answer 50
	$(BIN)/python benchmarks/evaluation.py --model $(MODEL) --rows $(ROWS)
	$(BIN)/python benchmarks/evaluation.py --model $(MODEL) --dpo
	$(BIN)/python benchmarks/faulty_runs.py --out runs/faulty --seed 1
	$(BIN)/python benchmarks/diagnosis.py --half both --seed 12 --runs runs/faulty
	$(BIN)/python benchmarks/diagnosis.py --sizes
	$(BIN)/python benchmarks/diagnosis.py --million
	$(BIN)/python benchmarks/bad_batches.py

clean:  ## remove the environment and runs
	rm -rf $(VENV) runs build *.egg-info
