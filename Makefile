# Two commands: `make run` trains, generates and measures on the bundled model; `make test` runs the tests.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# Modules are compiled when they are first imported, and not by pip: few are. Kept, or every process would compile them again.
export PYTHONDONTWRITEBYTECODE =
PYTEST = $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

.PHONY: run test test-slow pretrain clean

run: $(VENV)/installed
	$(BIN)/python run.py

test: $(VENV)/installed
	$(PYTEST) -m "not slow"

test-slow: $(VENV)/installed
	$(PYTEST) -m slow

pretrain: $(VENV)/installed
	$(BIN)/python -m trainer.shapes.pretrain

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; name one: make PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[test]'
	@touch $@

clean:
	rm -rf $(VENV)
