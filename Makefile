# make demo   prune a real model and see the report
# make test   lint, types, documentation, tests: what CI runs
# make lint   the first two of those alone
# make docs   the documentation site, in build/site
# make clean  everything that can be made again

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
DEMO   := $(VENV)/.installed-for-demo

# The suite is many small models: Python, not arithmetic, is the bottleneck. So one process a core and one thread a
# process, which is about twice as fast on two cores as one process with two threads.
JOBS   ?= 2
PYTEST ?= $(BIN)/python -m pytest

# Many tests start processes of their own, which would compile the package again each time.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test lint typed docs format clean
.DELETE_ON_ERROR:

$(STAMP): pyproject.toml
	@echo "installing torch, torchvision, timm and what the tests use into $(VENV): some 7 GB, 2 to 6 minutes"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[test]" torch torchvision timm
	touch $(DEMO) $@

$(DEMO): pyproject.toml
	@echo "installing torch and torchvision into $(VENV): some 6 GB, 2 to 4 minutes"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable . torch torchvision
	touch $@

demo: $(DEMO)
	$(BIN)/python examples/demo.py

test: lint docs
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(PYTEST) --numprocesses $(JOBS) --dist worksteal --durations 10 $(ARGS)

lint: $(STAMP) typed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd build/typed && $(abspath $(BIN))/mypy -p fxprune \
		--config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache
	cd build/typed && $(abspath $(BIN))/mypy $(CURDIR)/tests/test_typing.py \
		--config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache

# mypy and mkdocstrings cannot follow setuptools' package-dir, so the packages are laid out as they are installed.
typed:
	rm -rf build/typed && mkdir -p build/typed
	cp -Rp fxprune build/typed/fxprune
	rm -rf build/typed/fxprune/passes
	cp -Rp passes build/typed/fxprune/passes

docs: typed
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import mkdocs, material, mkdocstrings" 2>/dev/null || $(BIN)/python -m pip install --quiet --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
