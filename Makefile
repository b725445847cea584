# Every target sets up what it needs: a fresh machine wants only make and Python 3.11 or newer with its venv module.
# PYTHON=python3.12 make test   another Python for a new environment
# VENV=/path make test          another place for the environment

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-for

NEEDS := sparseift needs Python 3.11 or newer; name another with PYTHON=python3.12 make $(MAKECMDGOALS)
# Only ever an environment: a folder without pyvenv.cfg is somebody's own.
REMOVE_VENV := if test -e $(VENV)/pyvenv.cfg; then rm -rf $(VENV); fi

.DEFAULT_GOAL := help
.PHONY: help setup demo test check bench flops-gate docs results tables clean FORCE

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP) ## Make the environment and install sparseift into it, once

demo: $(STAMP) ## See what Sparse-IFT does to ResNet-18, and what that costs
	@for args in \
	    "flops resnet18 --sparsity 0.9" \
	    "flops resnet18 --sparsity 0.5,0.75,0.9 --summary" \
	    "inspect resnet18"; do \
	  printf '\n$$ sparseift %s\n' "$$args"; $(BIN)/sparseift $$args </dev/null || exit; \
	done

test: $(STAMP) ## Run every test
	$(BIN)/python -m pytest -n auto --maxprocesses=8 --dist worksteal

check: $(STAMP) ## Lint, formatting and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python --warnings

bench: $(STAMP) ## Measure speed and memory against the promises
	$(BIN)/python -m tests.benchmarks.run
	$(BIN)/python -m tests.benchmarks.transform
	$(BIN)/python -m tests.benchmarks.training_step
	$(BIN)/python -m tests.benchmarks.report

flops-gate: $(STAMP) ## Hold a model to its FLOP budget, as a CI job would
	$(BIN)/sparseift flops resnet18 --sparsity 0.9 --match model --max-flops-ratio 1.0 --max-layer-ratio 1.0 \
	  $(if $(GITHUB_ACTIONS),--format github,--summary)

docs: $(STAMP) ## Write the output of every command shown in README.md anew
	$(BIN)/python -m tests.tools.docs --write

results: $(STAMP) ## Write the page of every folder of kept results anew
	$(BIN)/python -m tests.tools.results --write

tables: $(STAMP) ## Trace every model of the zoo and write its layer table anew
	$(BIN)/python -m sparseift_cli.models.zoo.generate_tables

clean: ## Remove the environment, caches and build output (runs/ stays)
	@$(REMOVE_VENV)
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis
	find sparseift_cli tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp holds the folder that the environment was made for. A checkout that was moved, or an environment whose
# Python is gone, is set up again; so is one older than pyproject.toml or the constraints.
ifneq ($(shell $(BIN)/python -c 'import typer; print(open("$(STAMP)").read().strip())' 2>/dev/null),$(CURDIR))
$(STAMP): FORCE
endif

$(STAMP): pyproject.toml .ci/constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not installed: $(NEEDS)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { $(PYTHON) --version; echo "$(NEEDS)"; exit 1; } >&2
	@test ! -e $@ || test "$$(cat $@)" = "$(CURDIR)" || $(REMOVE_VENV)
	@$(BIN)/python -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || $(REMOVE_VENV)
	@test -e $(VENV)/pyvenv.cfg || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c .ci/constraints.txt -e '.[dev]'
	@printf '%s\n' '$(CURDIR)' > $@
