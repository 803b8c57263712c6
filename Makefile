PYTHON ?= python3
VENV ?= .venv
DATA ?= emoji
BIN = $(VENV)/bin

.PHONY: demo demo-deepspeed test test-all lint format docs clean

demo: $(VENV)/train.done  ## train on real image-caption pairs, evaluate, draw, print a table
	$(BIN)/python examples/demo.py --data $(DATA) $(if $(FRESH),--fresh) $(DEMO_FLAGS)

SHARDED = runs/demo-deepspeed
demo-deepspeed: $(VENV)/train.done $(VENV)/deepspeed.done  ## the same training on two processes of the CPU, ZeRO-2
	$(if $(FRESH),rm -rf $(SHARDED))
	$(BIN)/python examples/data/$(DATA).py data/$(DATA)
	$(BIN)/gradcache-clip launch --strategy deepspeed --zero 2 --nproc 2 train examples/demo.yaml \
	  data.train=data/$(DATA)/train data.validation=data/$(DATA)/validation train.device=cpu \
	  train.output=$(SHARDED) $$(test -d $(SHARDED)/checkpoints && echo train.resume=true) $(DEMO_FLAGS)
	$(BIN)/gradcache-clip evaluate $(SHARDED) --device cpu

test: $(VENV)/test.done  ## what this machine can run in ten minutes: all but what is marked slow
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal -m "not slow" $(PYTEST_FLAGS)

test-all: $(VENV)/test.done  ## everything that this machine can run
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal $(PYTEST_FLAGS)

lint: $(VENV)/test.done
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

format: $(VENV)/test.done
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

docs: $(VENV)/docs.done  ## the documentation as a site in site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/%.done: setup.py $(VENV)/bin/python
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar on -e ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
