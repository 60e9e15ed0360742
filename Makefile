# The verbs people type. Each sets up what it needs; a second call costs nothing.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test lint bench notebook clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[train,dev]"
# The metrics of this package are compared with ours. Without its dependencies: they bring torchvision and open_clip.
	$(BIN)/python -m pip install --quiet --no-deps clip-benchmark==1.6.2
	touch $@

demo: setup
	$(BIN)/clipmatch demo

test: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python benchmarks/cached_features.py

notebook: setup
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[train,dev,notebook]"
	$(BIN)/jupyter lab build_model.ipynb

clean:
	rm -rf $(VENV)
