# `make demo` and `make test` need python3 (3.11 or newer, with venv) and nothing else.
.PHONY: help demo run test chaos bench lint types check lock clean
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Run the tool; if it is missing, print a message instead, which in CI is a failure.
with = command -v $(1) >/dev/null || { echo "$(1) is not installed, so its check is skipped"; [ -z "$$CI" ]; exit; }; $(1)

help:
	@echo "make demo   the main job end to end on this machine: no account, no Redis, no root"
	@echo "make run    the scheduler and one worker with your own token, from .env"
	@echo "make test   every test except the longest, in about three minutes; tests that need a missing part are skipped, with a message"
	@echo "            with LONG=1 all of them, and random tests as long as in CI"
	@echo "make chaos  kill -9 and faults at random, twice, about ten minutes each; CHAOS_SEED, CHAOS_JOBS and CHAOS_AGENT=v3 change it"
	@echo "make bench  measure speed, beside other servers, in some twenty minutes; needs Go and redis-server"
	@echo "make check  lint, types and tests: what CI runs"
	@echo "make lock   the newest version of each package that a venv gets, into systemd/requirements.lock"
	@echo "make clean  remove what these commands made (not ./state, nor what the bench has measured)"

$(VENV)/run: systemd/requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes --upgrade -r $<
	@touch $@

$(VENV)/dev: requirements-dev.txt $(VENV)/run
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

# graphql-core: the demo's fake Buildkite answers GraphQL with it.
demo: $(VENV)/run
	@$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep ^graphql-core requirements-dev.txt)"
	@$(BIN)/python tests/demo.py

run: $(VENV)/run
	@$(BIN)/python tests/run_pair.py

# More processes than cores, because most tests wait for other processes. Each imports all tests, so these are
# compiled first: otherwise each process would compile them.
test: $(VENV)/dev
	@ls tests/__pycache__/test_store.*.pyc >/dev/null 2>&1 || PYTHONDONTWRITEBYTECODE= $(BIN)/pytest -q --collect-only >/dev/null
	$(BIN)/pytest -n 6

chaos: $(VENV)/dev
	LONG=1 CHAOS_JOBS=$${CHAOS_JOBS:-4000} $(BIN)/pytest -q tests/test_chaos.py

bench: $(VENV)/run
	@$(BIN)/python bench/bench.py

lint: $(VENV)/dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	@$(call with,systemd-analyze) verify --recursive-errors=no systemd/*.service systemd/*.socket systemd/*.target
	@$(call with,shellcheck) systemd/install systemd/stackctl systemd/check-board

types: $(VENV)/dev
	$(BIN)/mypy

check: lint types test

lock: $(VENV)/dev
	$(BIN)/pip install --quiet --disable-pip-version-check uv
	@sed '/^[^#]/,$$d' systemd/requirements.lock >$(VENV)/lock
	$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes --no-header \
		requirements.txt >>$(VENV)/lock
	mv $(VENV)/lock systemd/requirements.lock

clean:
	rm -rf $(VENV) .bench-* .pytest_cache .mypy_cache .ruff_cache .hypothesis __pycache__ bench/__pycache__ \
		tests/__pycache__ tests/systemd/__pycache__
