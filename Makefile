PYTHON ?= python3
VENV ?= .venv
DATA ?= emoji
BIN = $(VENV)/bin

.PHONY: demo test lint format clean

demo: $(VENV)/train.done  ## train on real image-caption pairs, evaluate, draw, print a table
	$(BIN)/python examples/demo.py --data $(DATA) $(if $(FRESH),--fresh) $(DEMO_FLAGS)

test: $(VENV)/test.done  ## everything that this machine can run
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto $(PYTEST_FLAGS)

lint: $(VENV)/test.done
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

format: $(VENV)/test.done
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/%.done: setup.py $(VENV)/bin/python
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar on -e ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
