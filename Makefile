# `make demo` and `make test` need python3 (3.11 or newer) and a package index; everything is put into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: help setup demo test lint format notebooks clean distclean

help:
	@echo "make demo       base score, fine-tune, tuned score, pictures; minutes on a CPU"
	@echo "make test       the whole test suite"
	@echo "make lint       ruff, mypy, import-linter, codespell"
	@echo "make format     let ruff rewrite the code"
	@echo "make notebooks  make the .ipynb files anew from their scripts"
	@echo "make setup      make $(VENV) with everything in it"
	@echo "make clean      delete caches and builds; 'make distclean' deletes $(VENV) too; runs/ stays"

setup: $(STAMP)

# torch first and exact: its pair is what the suite runs on, and the editable install must not pull another.
# dashscope without its dependencies: tests read one vocabulary file that it ships, and import nothing of it.
# A folder that a failed attempt left without a working pip is made anew.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "vlmdet needs Python 3.11 or newer; try: make setup PYTHON=python3.12" >&2; exit 2; }
	@echo "setting up $(VENV) (some gigabytes and minutes the first time)"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(PIP) torch==2.14.1 torchvision==0.29.1
	@$(PIP) --editable '.[test,dev]'
	@$(PIP) --no-deps dashscope==2.0.2
	@touch $@

demo: $(STAMP)
	@$(BIN)/vlmdet demo

test: $(STAMP)
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

lint: $(STAMP)
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --check --quiet || { echo "not formatted: run 'make format'" >&2; exit 1; }
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/lint-imports --no-logo >$(VENV)/lint-imports.txt 2>&1 || { cat $(VENV)/lint-imports.txt; exit 1; }
	@$(BIN)/codespell
	@echo "lint: ruff, mypy, import-linter and codespell found nothing"

format: $(STAMP)
	@$(BIN)/ruff check --fix --quiet
	@$(BIN)/ruff format --quiet

notebooks: $(STAMP)
	@$(BIN)/jupytext --quiet --to ipynb notebooks/*.py
	@$(BIN)/jupyter execute --inplace notebooks/*.ipynb

clean:
	rm -rf dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find src tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
