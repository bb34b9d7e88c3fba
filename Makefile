# Every target sets up what it needs: uv and a virtual environment, both inside .venv, from the locked versions.
.DEFAULT_GOAL := help
.PHONY: help demo test pytest lint format docs bench faults lock audit sbom clean setup

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(abspath $(BIN)):$(PATH)

help:
	@echo "make demo    the whole job on the bundled stickers, then demo/report.html"
	@echo "make test    lint, type checks and all tests"
	@echo "make docs    the generated pages, and the documentation site in infra/site"
	@echo "make faults  N=1000 seeded faults, and half as many interleavings of two commands, of SEED=1"
	@echo "make audit   known vulnerabilities of the locked packages; make sbom   the packages as CycloneDX"
	@echo "make lint | format | bench | lock | clean"

setup: $(VENV)/.ready

$(VENV)/.ready: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { echo "rebeca-ray needs Python 3.11, 3.12 or 3.13; set PYTHON=…"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@echo "installing the locked packages into $(VENV): some 8 GB, a few minutes"
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --no-deps --require-hashes -r requirements.lock
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --no-deps --no-build-isolation -e .
	touch $@

demo: setup
	$(BIN)/rebeca demo

# Two files of tests at a time, each with a Ray of its own; three gain little on two cores, and tests time out. One thread each, for threads of
# processes that wait for each other by spinning take longer than one. Ray's workers are not nice (by default 15): beside busy tests
# they would get next to nothing of two cores, and their own tests time out. A test process that dies ends the run: with another in
# its place, the run would wait for ever. Lint runs beside the tests: mypy alone would leave a core idle for a minute.
test: setup
	$(MAKE) --no-print-directory --jobs 2 lint pytest

pytest: setup
	OMP_NUM_THREADS=1 RAY_worker_niceness=0 $(BIN)/python -m pytest --numprocesses 2 --max-worker-restart 0 --dist loadfile --no-loadscope-reorder

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup
	$(BIN)/python -m rebeca_ray.config.reference > infra/docs/configuration.md
	$(BIN)/python -m rebeca_ray.studies.metrics > infra/docs/metrics.schema.json
	$(BIN)/python -m rebeca_ray.telemetry.summary > infra/docs/summary.schema.json
	sed 's|](infra/docs/|](|g' CONTRIBUTING.md > infra/docs/contributing.md
	$(BIN)/zensical build --strict --config-file infra/mkdocs.yml

bench: setup
	for script in tests/bench/*.py; do PYTHONPATH=. $(BIN)/python $$script || exit 1; done

N ?= 1000
SEED ?= 1
faults: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.campaign --faults $(N) --seed $(SEED)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.interleaving --number $$(($(N) / 2)) --seed $(SEED)

# Versions and hashes only; no index address is written. nvidia-pytriton asks for an older numpy, but of it only the server is
# used, in a process of its own: so numpy is overridden here, and what is locked is installed with --no-deps.
lock: $(VENV)/.ready
	echo "numpy>=2.2" | $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate \
		--no-header --override - --all-extras --group dev pyproject.toml -o requirements.lock

# Asks a service of the network about every package, and fails where one has no answer.
audit: setup
	$(BIN)/uv tool run pip-audit==2.10.1 --strict --disable-pip --require-hashes --requirement requirements.lock

sbom: setup
	$(BIN)/uv tool run --from cyclonedx-bom==7.5.0 cyclonedx-py requirements requirements.lock --output-reproducible --output-file rebeca-ray.cdx.json

clean:
	rm -rf $(VENV) demo runs rebeca-ray.cdx.json infra/site infra/.cache infra/docs/contributing.md .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
