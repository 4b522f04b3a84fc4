# The commands of this project; CI runs the same ones.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup check test quickstart notebook bench clean

setup: $(VENV)/.installed  ## make the virtual environment and install the project in it

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("error: Python 3.11 or later is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[convert,demo,test]'
	touch $@

check: setup  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: setup check notebook  ## everything that CI runs
	$(BIN)/python -m pytest

quickstart: setup  ## the main job offline, in seconds, on a tiny checkpoint with random weights
	$(BIN)/python -m tests.checkpoints tiny-qwen2 build/tiny-qwen2
	$(BIN)/python -m convert build/tiny-qwen2 build/tiny-qwen2-int4 --group-size 64 --force
	$(BIN)/python -m runtime info build/tiny-qwen2-int4

notebook: setup  ## run the tutorial from top to bottom, offline, on a tiny checkpoint with random weights
	$(BIN)/python -m tests.checkpoints tiny-qwen2 build/tiny-qwen2
	INTERNVL_SOURCE=$(CURDIR)/build/tiny-qwen2 INTERNVL_GROUP_SIZE=64 $(BIN)/jupyter execute notebooks/internvl_openvino.ipynb --output=$(CURDIR)/build/internvl_openvino.ipynb

bench: setup  ## conversion time and memory at full size (minutes, 4 GB of disk)
	$(BIN)/python -m tests.bench

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
