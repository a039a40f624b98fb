# make demo   environment, a real model, the whole job on it
# make test   environment, all checks and tests
# make check  formatting, lint, types (part of make test)
# make docs   the documentation site, into site/
# make oldest tests on the oldest transformers that is allowed (part of make test)
# make notebooks run the notebooks' sources (notebooks/*.py) and keep them with their outputs (*.ipynb)
# make newest tests on the newest releases of everything that the ranges of pyproject.toml allow

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
OUT    ?= demo-out
READY  := $(VENV)/.ready
# Versions and hashes of what is installed; empty: the newest that the ranges allow.
LOCK   ?= requirements/dev.txt
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check
OLDEST := $(VENV)/oldest
# One process per core, with one torch thread each; tests of one file share what they make, and a port. Long files
# come first (tests/conftest.py), so that no process is left alone with one at the end.
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

# Python is started often: its bytecode is kept, whatever the shell says.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test tests docs oldest newest check format notebooks benchmarks fuzz clean

$(READY): pyproject.toml constraints.txt $(LOCK)
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, found " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
ifdef LOCK
	$(PIP) --require-hashes --no-deps --requirement $(LOCK)
	$(PIP) --constraint constraints.txt torch
	$(PIP) --no-deps --no-build-isolation --editable .
else
	$(PIP) --upgrade --upgrade-strategy eager --editable '.[dev]'
endif
	touch $@

demo: $(READY)
	model=$$($(BIN)/python scripts/demo_model.py qwen) && $(BIN)/abliterate run "$$model" --out $(OUT) --overwrite

test: check tests
	$(MAKE) oldest

tests: $(READY)
	scripts/chromium.sh
	$(BIN)/python scripts/demo_model.py qwen
	$(PYTEST) --durations 25

docs: $(READY)
	$(BIN)/python scripts/commands.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

newest:
	$(MAKE) tests VENV=$(VENV)-newest LOCK=

oldest: $(OLDEST)/.ready
	PYTHONPATH=$(OLDEST) $(PYTEST) -m contract tests/model tests/edit/test_realisations.py \
		tests/edit/test_lora.py

$(OLDEST)/.ready: $(READY)
	$(PIP) --no-deps --upgrade --target $(OLDEST) \
		"$$($(BIN)/python scripts/oldest.py transformers)"
	touch $@

check: $(READY)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

notebooks: $(READY)
	$(BIN)/python scripts/demo_model.py qwen
	$(BIN)/python scripts/notebooks.py

benchmarks: $(READY)
	$(BIN)/python benchmarks/activations.py
	$(BIN)/python benchmarks/surgery.py

# Twenty thousand damaged files for every reader.
fuzz: $(READY)
	PYTHONPATH=src:tests $(BIN)/python tests/fuzzing.py --cases 20000

clean:
	rm -rf $(VENV) $(OUT)
