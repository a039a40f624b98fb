# make demo   environment, a real model, the whole job on it
# make test   environment, all checks and tests
# make check  formatting, lint, types (part of make test)

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
OUT    ?= demo-out
READY  := $(VENV)/.ready

.PHONY: demo test check format benchmarks clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, found " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(READY)
	model=$$($(BIN)/python scripts/demo_model.py qwen) && $(BIN)/abliterate run "$$model" --out $(OUT) --overwrite

test: check
	scripts/chromium.sh
	$(BIN)/python scripts/demo_model.py qwen
	$(BIN)/python -m pytest

check: $(READY)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

benchmarks: $(READY)
	$(BIN)/python benchmarks/activations.py
	$(BIN)/python benchmarks/surgery.py

clean:
	rm -rf $(VENV) $(OUT)
