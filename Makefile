# make demo   train, sample, score and show handwritten digits on real data
# make test   lint, types and the test suite
# make bars   every measured promise against its bar
# make lint   ruff and mypy alone
# make clean  remove build products and caches; runs, data and .venv stay
#
# Each of them makes .venv and installs into it when that is needed. Variables:
#   PYTHON=python3.12      the interpreter .venv is made from (3.11 or later)
#   TORCH_INDEX=<address>  take torch and torchaudio from there, e.g. PyTorch's CPU-only builds
#   VENV=DIR  RUN=DIR      other places for the environment and for the demo's run

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
RUN ?= runs/image-digits

BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.PHONY: help demo test lint bars clean
help:
	@sed -n 's/^# \(make [a-z]* .*\)/\1/p' Makefile

# A local version such as 2.12.1+cpu sorts above 2.12.1, so builds of an extra index win over the usual ones.
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("polydiff needs Python 3.11 or later: make PYTHON=python3.12 ...")'
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --progress-bar off $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -e '.[dev]'
	@touch $@

demo: $(INSTALLED)
	$(BIN)/polydiff train experiment=image-digits run=$(RUN)
	$(BIN)/polydiff sample run=$(RUN) n=100 'cond.label=[0,1,2,3,4,5,6,7,8,9]'
	$(BIN)/polydiff evaluate run=$(RUN)
	$(BIN)/polydiff report run=$(RUN)
	@echo; echo "Open $(abspath $(RUN))/index.html in a browser."

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest

bars: $(INSTALLED)
	@missed= without=; for bar in $(filter-out tests/bars/_%, $(wildcard tests/bars/*.py)); do \
		echo "== $$bar"; $(BIN)/python $$bar; \
		case $$? in 0) ;; 2) without="$$without $$bar" ;; *) missed="$$missed $$bar" ;; esac; \
	done; \
	test -z "$$without" || echo "not measured, something is not installed:$$without"; \
	test -z "$$missed" || { echo "missed:$$missed"; exit 1; }

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find core modalities configs data src tests examples -type d -name __pycache__ -prune -exec rm -rf {} +
