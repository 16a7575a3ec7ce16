# make demo   upstream and optimized side by side; results in out/demo
# make test   the CPU suite but the tests marked exhaustive (every combination, every place of a fault, kills; all families
#             but one where a test is there for several):
# make test-exhaustive    those
# make matrix chosen tests in environments with other versions, and docs/versions.md (an hour or more; about 25 GB on
#             disk for uv's cache; MATRIX="--only TEXT" and so on; python3.10 to python3.13 on PATH or in PYTHONS)
# All set up .venv first. UV=path overrides the uv that is installed into it; PYTHON the interpreter.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV ?= $(BIN)/uv

.PHONY: demo test test-exhaustive matrix lint constraints clean

demo: $(VENV)/ready
	$(BIN)/chatterbox-turbo demo --out out/demo

test: $(VENV)/ready
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not exhaustive"

test-exhaustive: $(VENV)/ready
	$(BIN)/python -m pytest -n 2 --dist worksteal -m exhaustive

matrix: $(VENV)/ready
	UV=$(UV) PYTHONPATH=tests $(BIN)/python -m matrix $(MATRIX)

lint: $(VENV)/ready
	$(BIN)/ruff check chatterbox_turbo tests examples
	$(BIN)/ruff format --check chatterbox_turbo tests examples

# uv resolves and installs the 6 GB that torch brings in seconds, where pip takes minutes; compiled once, as every process
# that the tests start would compile torch's and transformers' sources where PYTHONDONTWRITEBYTECODE is set (25 s, not 7)
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check uv
	VIRTUAL_ENV=$(VENV) $(UV) pip install --quiet --compile-bytecode --constraint constraints.txt --editable '.[dev]'
	touch $@

# exact versions of what the ranges in pyproject.toml resolve to; names and versions only
constraints:
	$(UV) pip compile --quiet --upgrade --python-version 3.11 --extra dev --no-header --no-annotate --no-emit-index-url \
		--output-file constraints.txt pyproject.toml

clean:
	rm -rf $(VENV) out
