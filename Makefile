# make demo: install into .venv and run a real comparison on embedded data.
# make test: install into .venv and run the whole test suite.
# Nothing is written outside this checkout, pip's own cache aside.

PYTHON ?= python3
VENV := .venv
CONSTRAINTS := constraints.txt
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
HERE := $(CURDIR)/$(VENV)
# Whatever a library would put into the home folder goes into .venv; its pip keeps its usual cache.
ENV := env FLWR_HOME="$(HERE)/flwr" MPLCONFIGDIR="$(HERE)/matplotlib" XDG_CACHE_HOME="$(HERE)/cache" \
	TORCH_EXTENSIONS_DIR="$(HERE)/torch-extensions" FLWR_TELEMETRY_ENABLED=0 \
	FLWR_DISABLE_UPDATE_CHECK=1 OMP_NUM_THREADS=1

.PHONY: help install requirements docs demo test test-torch test-deployment fuzz soak lint clean

help:
	@echo "make demo     a real comparison of normalizers on embedded data, with a report"
	@echo "make test     the whole test suite"
	@echo "make test-torch TORCH=2.6.0   the suite with another PyTorch, in an environment of its own"
	@echo "make test-deployment  real processes: TLS, faults, restarts (minutes)"
	@echo "make fuzz     100,000 hostile replies and damaged files, at random (minutes)"
	@echo "make soak     eight devices, a hundred rounds, a kill or restart in every five (most of an hour)"
	@echo "make docs     the parts of docs/ that repeat what the code says"
	@echo "make lint     ruff, clang-format, mypy, import-linter"
	@echo "make requirements  requirements-device.txt and -server.txt, with hashes, from constraints.txt"
	@echo "make install  only what the others need, into $(VENV) (PYTHON=python3.12 for another Python)"
	@echo "make clean    remove $(VENV)"

install: $(INSTALLED)

# The build backend is installed first, so that constraints.txt holds for it too.
$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "fedkn needs Python 3.11 or newer, as in: make PYTHON=python3.12 …" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) hatchling editables
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) --no-build-isolation -e '.[dev]'
	@touch $@

# The versions of constraints.txt with the hashes of all their files, for every platform: what the
# containers of fedkn deploy init install. uv comes with Flower.
requirements: install
	@for pair in device:device server:simulation; do \
		file=requirements-$${pair%:*}.txt; extra=$${pair#*:}; \
		{ echo "# What pip install --require-hashes -r takes for fedkn[$$extra], fedkn itself left out; written by:"; \
		echo "# make requirements"; \
		$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
			--no-header --no-annotate -c constraints.txt --extra $$extra pyproject.toml; } \
			> $$file.part && mv $$file.part $$file || exit 1; \
	done

demo: install
	@$(ENV) $(BIN)/fedkn demo

# One thread for each test process: results do not depend on the machine, small models are fastest.
test: install
	@$(ENV) $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal \
		--basetemp "$(HERE)/tmp"

# Which versions were run, and when, is in docs/performance.md. What another PyTorch asks for in other
# versions is left to it.
OF_TORCH := torch|torchvision|sympy|mpmath|networkx|setuptools|fsspec|filelock
test-torch:
	@test -n "$(TORCH)" || { echo "name a version, as in: make test-torch TORCH=2.6.0" >&2; exit 1; }
	@mkdir -p $(VENV)
	@{ grep -vE '^($(OF_TORCH))==' constraints.txt; echo "torch==$(TORCH)"; } \
		> $(VENV)/torch-$(TORCH).part
	@cmp -s $(VENV)/torch-$(TORCH).part $(VENV)/torch-$(TORCH).txt || \
		mv $(VENV)/torch-$(TORCH).part $(VENV)/torch-$(TORCH).txt
	@$(MAKE) test VENV=$(VENV)/torch-$(TORCH) CONSTRAINTS=$(VENV)/torch-$(TORCH).txt

# tests/test_docs.py, which make test runs, holds these pages equal to what this writes.
docs: install
	@$(ENV) FEDKN_WRITE_DOCS=1 $(BIN)/python -m pytest tests/test_docs.py

# Not part of make test: SuperLinks and SuperNodes as processes, killed and brought back.
test-deployment: install
	@$(ENV) $(BIN)/python -m pytest -o addopts="-q --strict-markers" -x --durations=0 \
		--basetemp "$(HERE)/tmp-deployment" tests/deployment

# Its figures are in docs/threat-model.md.
fuzz: install
	@$(ENV) $(BIN)/python -m tests.fuzz

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
