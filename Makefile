# Everything works from a fresh clone with Python (3.11 or newer) and make: each target first makes
# the virtual environment that it needs.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo book test lint clean

# The stamp is newer than what it depends on as long as the environment is up to date.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]' --constraint constraints.txt
	touch $@

demo: $(VENV)/installed
	$(BIN)/pretrain-mpnet --preset demo --overwrite

book: $(VENV)/installed
	$(BIN)/python book/make_book.py

test: $(VENV)/installed
	$(BIN)/python -m pytest --numprocesses 2

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
