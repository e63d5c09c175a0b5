# make demo   a trained prototype segmenter in a few minutes     make test    the tests
# make check  linter, formatter and type checker, no changes     make format  the formatter, with changes
# make docs   the documentation as a site, in site/
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check format docs
demo: .venv/installed
	$(BIN)/python tools/train.py configs/digits_resnet18_k4.yaml --resume auto

test: .venv/installed-dev
	$(BIN)/python -m pytest

check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/installed-dev
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

docs: .venv/installed-docs
	$(BIN)/python -m mkdocs build --strict --quiet

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml | .venv/bin/python
	$(BIN)/pip install --quiet -e .
	touch $@

.venv/installed-dev: pyproject.toml | .venv/bin/python
	$(BIN)/pip install --quiet -e ".[dev]"
	touch $@

.venv/installed-docs: pyproject.toml | .venv/bin/python
	$(BIN)/pip install --quiet -e ".[docs]"
	touch $@
