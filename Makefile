PYTHON ?= python3
VENV ?= .venv
DATA ?= emoji
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --disable-pip-version-check --progress-bar on
CONSTRAINTS = constraints.txt
# A CUDA build of torch is gigabytes, so its version changes by hand, not with `make constraints`.
TORCH = 2.13.0

.PHONY: demo demo-deepspeed test test-all test-latest test-oldest lint format docs constraints clean

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

test-latest:  ## `make test` beside the newest versions that setup.py admits
	rm -f $(VENV)-latest/test.done
	PIP_UPGRADE=1 PIP_UPGRADE_STRATEGY=eager $(MAKE) test VENV=$(VENV)-latest CONSTRAINTS=

test-oldest: $(VENV)-oldest.txt  ## `make test` beside the oldest; also on the oldest Python with PYTHON=python3.10
	$(MAKE) test VENV=$(VENV)-oldest CONSTRAINTS=$<

$(VENV)-oldest.txt: setup.py
	grep -oE '[A-Za-z][A-Za-z0-9_-]*>=[0-9.]+' $< | sed 's/>=/==/' | sort -u > $@

lint: $(VENV)/test.done
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

format: $(VENV)/test.done
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

docs: $(VENV)/docs.done  ## the documentation as a site in site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

constraints: $(VENV)/bin/python  ## the newest versions for every Python and platform, into constraints.txt
	$(PIP) uv
	echo torch==$(TORCH) | $(BIN)/uv pip compile setup.py --extra test --extra docs --constraints - \
	  --universal --python-version 3.10 --upgrade --no-annotate \
	  --custom-compile-command "make constraints" --output-file constraints.txt

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/%.done: setup.py $(CONSTRAINTS) $(VENV)/bin/python
	$(PIP) $(addprefix --constraint ,$(CONSTRAINTS)) -e ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-* build dist *.egg-info
