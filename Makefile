# etcdlite: everything a newcomer or CI types. Each target makes what it needs in $(VENV).
#
#   make run         a durable server on 127.0.0.1:2379, data in ./default.etcdlite
#   make cluster     three members on loopback, data in ./cluster; Ctrl-C stops them
#   make test        lint, types and tests (minutes, on up to 4 cores);  make test-long  the long tests
#   make stubs       write the messages' types, etcdlite/messages.pyi, after a change of the schema
#   make sim         simulate clusters under faults, a fresh seed each, until stopped
#   make bench       measure beside etcd 3.5; rewrite the tables of docs/performance.md, and docs/plots/
#   make bench PYTHON=/usr/bin/python3 VENV=.venv-system  the same, with the interpreter of the package
#   make bench-quick the same, smaller, to standard output only
#   make bench-quick BASE=REV  what has changed since revision REV, in instructions and for real clients
#   make deb         the Debian package, dist/etcdlite.deb
#   make wheel       for pip and pipx, dist/etcdlite-VERSION-py3-none-any.whl
#   make pyz         one file that runs on any Python 3.10 or later, dist/etcdlite.pyz
#   make release     all three of a clean checkout, with dist/SHA256SUMS
#
# PYTHON picks the interpreter (3.10 or later), VENV the folder of the environment.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
LINTED := etcdlite tests bench packaging
# What npm leaves behind when it has installed npm's etcd client for the tests.
NPM_CLIENT := tests/clients/node_modules/.package-lock.json

.PHONY: run cluster test stubs test-long bench bench-quick lint format clean scripts deb wheel pyz
.PHONY: release
.DELETE_ON_ERROR:

tell_path = command -v etcdlite-ctl >/dev/null || \
  echo "make: in the other terminal, . $(BIN)/activate makes etcdlite-ctl known"

run: $(VENV)/run.stamp
	@$(tell_path)
	@exec $(BIN)/etcdlite

cluster: $(VENV)/run.stamp
	@$(tell_path)
	@exec $(BIN)/python -m etcdlite.cli.local_cluster

# Three processes keep two cores busy: many tests wait for those that they started.
test: lint scripts $(NPM_CLIENT)
	$(BIN)/pytest -q -n 3 --dist loadfile --no-loadscope-reorder

# Kubernetes' and etcd's own tests are among them: tests/api_server/build.sh build/api-server-tests and
# tests/etcd_suite/build.sh build/etcd-tests make their programs (root, mmdebstrap), which are skipped
# until then.
test-long: $(VENV)/test.stamp $(NPM_CLIENT)
	$(BIN)/pytest -q -m long

stubs: $(VENV)/test.stamp
	REWRITE=1 $(BIN)/pytest -q tests/test_proto.py -k types_of_the_messages

sim: $(VENV)/test.stamp
	@$(BIN)/python -m tests.sim

lint: $(VENV)/test.stamp
	$(BIN)/ruff check $(LINTED)
	$(BIN)/ruff format --check $(LINTED)
	$(BIN)/mypy

format: $(VENV)/test.stamp
	$(BIN)/ruff check --fix $(LINTED)
	$(BIN)/ruff format $(LINTED)

# The installed commands start.
scripts: $(VENV)/test.stamp
	$(BIN)/etcdlite --version
	$(BIN)/etcdlite-ctl version

bench: $(VENV)/bench.stamp
	$(BIN)/python -m bench.run --write docs/performance.md
	$(BIN)/python -m bench.real_clients --plot docs/plots --write docs/performance.md
	$(BIN)/python -m bench.over_time --keys 100000 --plot docs/plots --write docs/performance.md

bench-quick: $(VENV)/bench.stamp
ifdef BASE
	$(BIN)/python -m bench.instructions --base $(BASE)
	$(BIN)/python -m bench.real_clients --base $(BASE) --no-etcd --rounds 7 --share 0.25
else
	$(BIN)/python -m bench.run --quick
endif

deb:
	@packaging/build-deb

wheel: $(BIN)/python
	$(BIN)/python -m pip wheel -q --disable-pip-version-check --no-deps -w dist .

pyz: $(BIN)/python
	@$(BIN)/python packaging/build_pyz.py

# Of what is committed, and nothing else. The version is in etcdlite/__init__.py only; the changelogs
# name it (tests/test_packaging.py compares).
release:
	@test -z "$$(git status --porcelain)" || { echo "make: commit or remove first:" >&2; \
		git status --short >&2; exit 1; }
	rm -rf dist build
	RELEASE=1 $(MAKE) deb wheel pyz
	cd dist && sha256sum * > SHA256SUMS && sha256sum --check SHA256SUMS

clean:
	rm -rf $(VENV) build dist etcdlite.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -rf tests/clients/node_modules
	find etcdlite tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

# Installs the Debian package $(1) when the test $(2) fails: as root at once, else through sudo,
# else by saying what to type.
define need
	@if ! ( $(2) ) >/dev/null 2>&1; then \
	  if ! command -v apt-get >/dev/null; then \
	    echo "make: $(1) is missing: install it with the system's package manager" >&2; exit 1; \
	  elif [ "$$(id -u)" = 0 ]; then packaging/apt-get-install $(1); \
	  elif command -v sudo >/dev/null; then \
	    echo "make: $(1) is missing; installing it with sudo apt-get install" >&2; \
	    sudo packaging/apt-get-install $(1); \
	  else echo "make: $(1) is missing: as root, run: apt-get install $(1)" >&2; exit 1; fi; \
	fi
endef

# Debian's python3 comes without ensurepip, which python3-venv brings.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "make: Python 3.10 or later is needed, $(PYTHON) is not; try make PYTHON=python3.11" >&2; exit 1; }
	$(call need,python3-venv,$(PYTHON) -c 'import ensurepip; import venv')
	$(PYTHON) -m venv $(VENV)

$(VENV)/run.stamp: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q --disable-pip-version-check -e .
	@touch $@

$(VENV)/test.stamp: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[test]'
	@touch $@ $(VENV)/run.stamp

$(VENV)/bench.stamp: pyproject.toml | $(BIN)/python
	$(call need,nghttp2-client,command -v h2load)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[bench]'
	@touch $@ $(VENV)/run.stamp

# The tests do without npm: what needs it is skipped then.
$(NPM_CLIENT): tests/clients/package.json tests/clients/package-lock.json
	-$(call need,npm,command -v npm)
	@if command -v npm >/dev/null; then \
	  cd tests/clients && npm ci --ignore-scripts --no-audit --no-fund; \
	else echo "make: no npm, so the tests of npm's etcd client will be skipped" >&2; fi
