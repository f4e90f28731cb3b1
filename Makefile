# Every target does its own set-up: a virtual environment in .venv, made once. What a target needs
# is installed in it once, and again when setup.cfg changes.
PYTHON  ?= python3
VENV    ?= .venv
BIN     := $(VENV)/bin
PACKAGE := $(VENV)/.ready-package
READY   := $(VENV)/.ready
DOCS    := $(VENV)/.ready-docs

# Test processes at a time; each runs TensorFlow on one thread.
JOBS ?= 2

.PHONY: help demo test thorough check matrix lint format types fuzz coverage benchmark docs clean

help:
	@echo "make demo       rewrite a real trained model: table, verification, latency"
	@echo "make test       the test suite"
	@echo "make thorough   what it leaves out: larger networks, more combinations"
	@echo "make check      make lint, and the fast part of the test suite"
	@echo "make matrix     that part with the oldest and newest TensorFlow, Python 3.10 and 3.13"
	@echo "make lint       linter, formatter check, type checker, and who may import from whom"
	@echo "make format     format the code"
	@echo "make fuzz       random models until stopped; SECONDS=600 SEED=1 to bound and repeat;"
	@echo "                TARGET=kills ends the command-line tool at random moments"
	@echo "make coverage   BatchNormalization left in well-known networks, as a table"
	@echo "make benchmark  cost of planning and converting, SavedModels, and training layers"
	@echo "make docs       documentation, in build/site; warnings are errors"
	@echo "make clean      remove the environment and all that was fetched or built"

# Installs the package with the extras that are named, if any.
define install
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -e '.$(1)'
	touch $(PACKAGE) $@
endef

$(READY): setup.cfg pyproject.toml
	@echo "installing what developers need in $(VENV): some 3 GB, for some minutes, once"
	$(call install,[dev])

$(PACKAGE): setup.cfg pyproject.toml
	@echo "installing mbn_rewrite and TensorFlow in $(VENV): some 2 GB, for some minutes, once"
	$(call install)

$(DOCS): setup.cfg pyproject.toml
	@echo "installing mbn_rewrite, TensorFlow and MkDocs in $(VENV): some 2 GB, for some minutes, once"
	$(call install,[docs])

demo: $(PACKAGE)
	$(BIN)/python tools/demo.py

test: $(READY)
	$(BIN)/python -m pytest -n $(JOBS) -m "not thorough"

thorough: $(READY)
	$(BIN)/python -m pytest -n $(JOBS) -m thorough

check: lint
	$(BIN)/python -m pytest -n $(JOBS) -m "not slow and not network"

matrix: $(READY)
	$(BIN)/python tools/matrix.py --jobs=$(JOBS)

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

types: $(READY)
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

fuzz: $(READY)
	$(BIN)/python tests/fuzz.py $(if $(SECONDS),--seconds=$(SECONDS)) $(if $(SEED),--seed=$(SEED)) \
	  $(if $(TARGET),--target=$(TARGET))

coverage: $(READY)
	$(BIN)/python benchmarks/coverage.py

benchmark: $(READY)
	$(BIN)/python benchmarks/convert.py
	$(BIN)/python benchmarks/saved_model.py
	$(BIN)/python benchmarks/layer.py

docs: $(DOCS)
	$(BIN)/python tools/pictures.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "built build/site/index.html"

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
