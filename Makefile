# The commands of this project; CI runs the same ones.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Errors alone: notices of build tools say nothing to a user. Python compiles a module when it imports it.
QUIETLY := --quiet --quiet --disable-pip-version-check --no-compile
# Three processes, each of which takes one test file after the other and up to 3 GB: two cores wait for the rest less then.
SPLIT := --numprocesses=3 --dist=loadfile
# The script that sets up a GPU emulated on the CPU, if it is present.
IGPU := ../shared/igpu/setup
# Its compiler fails on AVX-512; a crash in spite of this (exit code 128 and more) is no failure of this project.
STANDS_IN := CL_CONFIG_CPU_TARGET_ARCH=core-avx2 build/igpu/run

.PHONY: setup check test test-fast test-igpu test-igpu-quick ray clients quickstart docs notebook bench soak clean

setup: $(VENV)/.installed  ## make the virtual environment and install the project in it

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("error: Python 3.11 or later is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	@echo 'Installing torch, openvino and others into $(VENV), which takes some minutes the first time.'
	@$(BIN)/python -m pip install $(QUIETLY) --upgrade pip
	@$(BIN)/python -m pip install $(QUIETLY) -e '.[convert,demo,serve,docs,test]'
	touch $@

check: setup  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: setup  ## everything that CI runs; what takes one core is done two at a time
	@$(MAKE) --no-print-directory --jobs=2 check notebook test-igpu-quick
	$(BIN)/python -m pytest $(SPLIT)

test-fast: setup check  ## the tests of answering, without those that convert first; for the daily loop
	$(BIN)/python -m pytest $(SPLIT) tests/runtime tests/test_layers.py -m "not converts and not clients and not ray"

test-igpu-quick: setup
	@if test -x $(IGPU) && $(IGPU) build/igpu > /dev/null 2>&1; then $(STANDS_IN) $(BIN)/python -m pytest tests/igpu -m quick || test $$? -gt 127; \
	else echo 'nothing stands in for a GPU here: tests/igpu is left out'; fi

test-igpu: setup  ## the GPU tests on a GPU that OpenVINO sees; without one they say how to set one up
	$(BIN)/python -m pytest tests/igpu -rs

ray: setup  ## a job on a Ray cluster of two local nodes, one of which is killed; installs Ray
	$(BIN)/python -m pip install --quiet -e '.[ray]'
	$(BIN)/python -m pytest -m ray tests/runtime/job

clients: setup  ## clients of others against the server; the one for node is skipped without npm
	$(BIN)/python -m pip install --quiet -e '.[clients]'
	mkdir -p build/clients
	! command -v npm || npm install --silent --no-fund --no-audit --prefix build/clients 'openai@^6.49'
	$(PYTHON) -m venv build/clients/lmms-eval
	build/clients/lmms-eval/bin/python -m pip install --quiet 'lmms-eval>=0.7.3,<0.8' 'filelock<3.25'  # it uses internals of filelock
	$(BIN)/python -m pytest -m clients tests/clients

quickstart: setup  ## the main job offline: convert the built-in model to int4 and ask it about a picture
	$(BIN)/python -m convert demo/shapes/checkpoint build/shapes-int4 --force
	$(BIN)/python -m runtime chat build/shapes-int4 "Which shape is purple?" --image demo/examples/shapes.png
	@echo
	@echo 'Next, after . $(VENV)/bin/activate:  python -m demo                               (this model in a browser)'
	@echo '                                 python -m convert OpenGVLab/InternVL2-1B     (a real model)'

docs: setup  ## the book in docs/ as a site in build/docs, offline
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

notebook: setup  ## run the tutorial from top to bottom, offline, on the built-in model
	mkdir -p build
	$(BIN)/jupyter execute notebooks/internvl_openvino.ipynb --output=$(CURDIR)/build/internvl_openvino.ipynb

bench: setup  ## conversion and answers at full size, compared with openvino_genai and optimum-intel (an hour on two cores, 4 GB of disk)
	$(BIN)/python -m tests.bench --json docs/benchmark.json --plot docs/benchmark.svg

soak: setup  ## an hour of eight clients, and what the server still holds after it
	$(BIN)/python -m convert demo/shapes/checkpoint build/shapes-int4 --force
	$(BIN)/python -m tests.soak --minutes 60

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
