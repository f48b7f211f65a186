# make demo: install into .venv and run a real comparison on embedded data.
# make test: install into .venv and run the whole test suite.
# Nothing is written outside this checkout, pip's own cache aside.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
HERE := $(CURDIR)/$(VENV)
# Whatever a library would put into the home folder goes into .venv; its pip keeps its usual cache.
ENV := env FLWR_HOME="$(HERE)/flwr" MPLCONFIGDIR="$(HERE)/matplotlib" XDG_CACHE_HOME="$(HERE)/cache" \
	TORCH_EXTENSIONS_DIR="$(HERE)/torch-extensions" FLWR_TELEMETRY_ENABLED=0 \
	FLWR_DISABLE_UPDATE_CHECK=1 OMP_NUM_THREADS=1

.PHONY: help install demo test test-deployment soak lint clean

help:
	@echo "make demo     a real comparison of normalizers on embedded data, with a report"
	@echo "make test     the whole test suite"
	@echo "make test-deployment  real processes: TLS, faults, restarts (minutes)"
	@echo "make soak     eight devices, a hundred rounds, a kill or restart in every five (most of an hour)"
	@echo "make lint     ruff, clang-format, mypy, import-linter"
	@echo "make install  only what the others need, into $(VENV) (PYTHON=python3.12 for another Python)"
	@echo "make clean    remove $(VENV)"

install: $(INSTALLED)

# The build backend is installed first, so that constraints.txt holds for it too.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "fedkn needs Python 3.11 or newer, as in: make PYTHON=python3.12 …" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt hatchling editables
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

demo: install
	@$(ENV) $(BIN)/fedkn demo

# One thread for each test process: results do not depend on the machine, small models are fastest.
test: install
	@$(ENV) $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal \
		--basetemp "$(HERE)/tmp"

# Not part of make test: SuperLinks and SuperNodes as processes, killed and brought back.
test-deployment: install
	@$(ENV) $(BIN)/python -m pytest -o addopts="-q --strict-markers" -x --durations=0 \
		--basetemp "$(HERE)/tmp-deployment" tests/deployment

# Its plot and figures are in docs/deployment.md.
soak: install
	@$(ENV) $(BIN)/python -m tests.deployment.soak "$(HERE)/soak"

lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror fedkn/layers/native/*.h fedkn/layers/native/*.cpp
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV)
