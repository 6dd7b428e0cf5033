# The two commands of a new user: make demo, make test. Both make or reuse .venv.
PYTHON ?= python3
VENV := .venv

.PHONY: demo test lint slow

demo: $(VENV)/installed
	$(VENV)/bin/python jobs/digits.py

test: lint
	$(VENV)/bin/python -m pytest -q

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

slow: $(VENV)/installed
	$(VENV)/bin/python -m pytest -q -m slow

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[demo,export,rivals,test]'
	touch $@
