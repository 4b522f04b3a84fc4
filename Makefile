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
	$(BIN)/python -m pip install --quiet -e '.[convert,demo,serve,test]'
	touch $@

check: setup  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: setup check notebook  ## everything that CI runs
	$(BIN)/python -m pytest

quickstart: setup  ## the main job offline: convert the built-in model to int4 and ask it about a picture
	$(BIN)/python -m convert demo/shapes/checkpoint build/shapes-int4 --force
	$(BIN)/python -m runtime chat build/shapes-int4 "Which shape is purple?" --image demo/examples/shapes.png

notebook: setup  ## run the tutorial from top to bottom, offline, on the built-in model
	mkdir -p build
	$(BIN)/jupyter execute notebooks/internvl_openvino.ipynb --output=$(CURDIR)/build/internvl_openvino.ipynb

bench: setup  ## conversion and answers at full size beside openvino_genai and optimum-intel (an hour on two cores, 4 GB of disk)
	$(BIN)/python -m tests.bench --json docs/benchmark.json --plot docs/benchmark.svg

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
