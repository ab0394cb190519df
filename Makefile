# Every target sets up .venv by itself. ACCELERATOR=cuda13 adds the GPU packages.
PYTHON ?= python3.12
ACCELERATOR ?=
VENV := .venv
BIN := $(VENV)/bin
comma := ,
extras := dev$(if $(ACCELERATOR),$(comma)$(ACCELERATOR))
stamp := $(VENV)/.installed-$(or $(ACCELERATOR),cpu)

.PHONY: venv demo test test-slow lint bench clean

venv: $(stamp)

$(stamp): pyproject.toml constraints.txt examples/demo/requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12) and "PYTHON is Python %d.%d; it should be 3.12 or newer" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$(extras)]'
	$(BIN)/python -m pip install --quiet --no-deps --requirement examples/demo/requirements.txt
	touch $@

demo: venv
	$(BIN)/python examples/demo/demo.py

test: venv
	$(BIN)/python -m pytest -n 2 -m 'not slow'

test-slow: venv
	$(BIN)/python -m pytest -n 2

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: venv
	$(BIN)/python -m bench.offline_throughput

clean:
	rm -rf $(VENV) build *.egg-info
