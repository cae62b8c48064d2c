# Two commands do everything: `make demo` and `make test`. PYTHON may name another interpreter (3.11 to 3.14).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test hosts install lint audit clean

demo: install
	$(BIN)/ptxdist demo

test: install .venv-s3/.installed
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/pytest -q --numprocesses 3 --dist loadfile --no-loadscope-reorder --durations 10

hosts: install .venv-s3/.installed  # faults on several hosts; needs root and the program `ip`
	PTXDIST_HOSTS=1 PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/pytest -q -ra --durations 20 tests/integration/test_lost_hosts.py tests/integration/test_lost_nodes.py::test_a_node_that_joins_is_taken_in

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

audit:  # known vulnerabilities of the pinned versions; needs the network
	$(PYTHON) -m venv .venv-audit && .venv-audit/bin/pip install --quiet pip-audit && .venv-audit/bin/pip-audit --no-deps --disable-pip -r constraints.txt

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info[:2] <= (3, 14) else "ptxdist needs Python 3.11 to 3.14; this is %d.%d: make PYTHON=python3.12 …" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# The S3 server of the tests, in an environment of its own: it wants an older python-dateutil than constraints.txt has.
.venv-s3/.installed: Makefile
	$(PYTHON) -m venv .venv-s3
	.venv-s3/bin/pip install --quiet 'moto[server]==5.2.1'
	touch $@

clean:
	rm -rf $(VENV) .venv-s3 .venv-audit build dist demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
