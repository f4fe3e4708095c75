# Everything that is typed to work on Fluffle; plain `make` lists it.
#   PYTHON=python3.12    the Python that .venv is made of            ARGS="…"      more words for demo, test, bench…, chaos
#   BROKER=amqp://…      use this broker, install no RabbitMQ        PIP_ARGS="…"  more words for pip, such as an index

PYTHON ?= python3
BROKER ?=
ARGS ?=
PIP_ARGS ?=

BIN := .venv/bin
STAMP := .venv/.installed
SERVER := /usr/lib/rabbitmq/bin/rabbitmq-server

.DEFAULT_GOAL := help
.PHONY: help install possible rabbitmq demo test check bench bench-peers chaos audit clean

help: ## list what can be made
	@echo "make TARGET, where TARGET is one of"
	@awk -F ': .*## ' '/^[a-z-]+:.*## / { printf "  %-11s %s\n", $$1, $$2 }' Makefile

install: possible ## make .venv with everything in it, and install RabbitMQ where it is missing
	@$(MAKE) --no-print-directory -s -j2 $(STAMP) rabbitmq

demo: install ## from nothing to a trained model: RabbitMQ, four workers, one coordinator
	@$(BIN)/fluffle demo $(if $(BROKER),--broker '$(BROKER)') $(ARGS)

test: check ## every check and every test but chaos
	@$(BIN)/python -m pytest -m "not chaos" -n 3 --dist worksteal $(ARGS)

check: install ## lint, formatting and types
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

bench: install ## measure rounds, small to large, beside a bare pump: a table, build/bench.json and .png
	@$(BIN)/python tests/benchmarks/round.py $(ARGS)

bench-peers: install ## the same rounds in turn with Flower's, which is installed in .venv-peers for it
	@$(BIN)/python tests/benchmarks/round.py --peers .venv-peers --pip='$(PIP_ARGS)' --rows 4x1M,4x10M \
	  --json build/bench-peers.json $(ARGS)

chaos: install ## the long tests that kill and cut at random
	@$(BIN)/python -m pytest -m chaos -n 2 --dist worksteal $(ARGS)

audit: install ## ask the advisory database about the pinned versions; needs a way to it
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet $(PIP_ARGS) pip-audit
	@$(BIN)/pip-audit --no-deps --disable-pip -r constraints.txt $(ARGS)

clean: ## remove what was made here, .venv too; runs stay
	rm -rf .venv .venv-peers build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find broker coordinator workers tests -name __pycache__ -type d -exec rm -rf {} +

# ---------------------------------------------------------------------------------------------------------------------

# Says early, before minutes of downloading, what is missing and cannot be installed from here.
possible:
	@if [ -z "$(BROKER)" ] && [ ! -x $(SERVER) ] && ! command -v rabbitmq-server >/dev/null; then \
	  $(call may_apt) || { echo "RabbitMQ is missing: sudo apt-get install rabbitmq-server, or brew install rabbitmq," \
	    "or docker compose up and then make BROKER=amqp://… (any broker will do)" >&2; exit 2; }; \
	fi
	@if ! $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	  echo "Fluffle needs Python 3.11 or newer: install one and name it, as in make PYTHON=python3.12" >&2; exit 2; \
	elif [ ! -e $(STAMP) ] && ! $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null; then \
	  $(call may_apt) || { echo "Python's venv is missing: sudo apt-get install python3-venv" >&2; exit 2; }; \
	  echo "Installing python3-venv"; $(call apt,python3-venv); \
	fi

$(STAMP): pyproject.toml constraints.txt
	@echo "Making .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv .venv
	@echo "Installing Fluffle, PyTorch and the tools into .venv (PyTorch is large: a minute or more)"
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt $(PIP_ARGS) -e ".[demo,dp,dev]"
	@touch $@
	@echo "Fluffle is installed: $(BIN)/fluffle"

# The machine's own broker is not wanted, only its program: the service is neither started nor enabled.
rabbitmq:
	@if [ -z "$(BROKER)" ] && [ ! -x $(SERVER) ] && ! command -v rabbitmq-server >/dev/null; then \
	  echo "Installing RabbitMQ"; \
	  $(call as_root) \
	  if [ ! -e /usr/sbin/policy-rc.d ]; then \
	    trap '$$root rm -f /usr/sbin/policy-rc.d' EXIT; trap 'exit 130' INT TERM HUP; \
	    printf '#!/bin/sh\nexit 101\n' | $$root tee /usr/sbin/policy-rc.d >/dev/null; \
	    $$root chmod 755 /usr/sbin/policy-rc.d; \
	  fi; \
	  $(call apt,rabbitmq-server); \
	  $$root update-rc.d rabbitmq-server disable >/dev/null 2>&1 || true; \
	  echo "RabbitMQ is installed"; \
	fi

may_apt = { command -v apt-get >/dev/null && { [ "$$(id -u)" = 0 ] || sudo -n true 2>/dev/null; }; }
as_root = root=; [ "$$(id -u)" = 0 ] || root='sudo -n';
# The lists of packages are renewed only where the package cannot be had without.
apt = $(as_root) get="$$root env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=120"; \
	  said=$$($$get install -y --no-install-recommends $(1) 2>&1) \
	  || said=$$($$get update 2>&1 && $$get install -y --no-install-recommends $(1) 2>&1) \
	  || { printf '%s\n' "$$said" "$(1) could not be installed: see above" >&2; exit 2; }
