# make quickstart   install into .venv, then train crossformer_nano on the digits that come with the library
# make test         install into .venv, then lint, type-check and run the tests (under 12 minutes on two cores)
# make test-all     also the slow tests
# make fuzz         read 20,000 damaged files (some minutes)
# make docs         build the documentation into site/
#
# TORCH_INDEX=https://download.pytorch.org/whl/cpu takes torch for CPUs alone, a tenth of the size
PYTHON ?= python3
TORCH_INDEX ?=
BIN := .venv/bin

.PHONY: setup quickstart test test-all fuzz docs clean

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	@echo "installing into .venv: some minutes, with CUDA 6 GB (README says how to do without it)"
	$(if $(TORCH_INDEX),$(BIN)/pip install --disable-pip-version-check -c constraints.txt --index-url $(TORCH_INDEX) torch torchvision)
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

quickstart: setup
	$(BIN)/crossformer train

test: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2

test-all: test
	$(BIN)/pytest -n 2 -m slow

fuzz: setup
	$(BIN)/python tests/data/fuzz.py

docs: setup
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt -e '.[docs]'
	$(BIN)/zensical build --strict

clean:
	rm -rf .venv site
