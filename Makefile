# Two commands on a fresh machine: `make demo` runs the main job, `make test` passes the tests. Both set everything up first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DATA := data/minibeir
RUNS := out/runs
# One thread: two on a machine that does anything else are several times slower.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-all check format data model model-direct bundle evaluate evidence clean

demo: $(VENV)/ready
	$(BIN)/traceir demo --out out/demo --serve terminal

# Every behaviour once, in two minutes; `test-all` adds what takes long: kills, browsers, trainings, schemathesis.
test: $(VENV)/dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow"

test-all: test
	OMP_NUM_THREADS=1 $(BIN)/pytest -m slow

check: $(VENV)/dev
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/dev
	$(BIN)/ruff format src tests benchmarks
	$(BIN)/ruff check --fix src tests benchmarks

$(VENV)/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[learn,serve,reasoning]"
	touch $@

# The tests also need mteb and Ray: several hundred megabytes that a user need not have.
$(VENV)/dev: $(VENV)/ready
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[learn,serve,reasoning,dev]"
	touch $@

data: $(DATA)/meta.json

$(DATA)/meta.json: | $(VENV)/ready
	$(BIN)/traceir minibeir build --scale full --seed 0 --out $(DATA)

# The bundled checkpoint from nothing (hours on one core; goes on where it was cut off), its baselines without reasoning for the same
# updates and for the same wall time, and all the results that the docs show.
model: $(VENV)/ready
	TRACEIR=$(BIN)/traceir runs/mini.sh

model-direct: $(VENV)/ready
	TRACEIR=$(BIN)/traceir runs/mini.sh mini-direct
	$(BIN)/traceir --threads 1 train --preset mini-direct-long

bundle: $(VENV)/ready
	$(BIN)/python -m benchmarks.bundle

evaluate: data
	$(BIN)/traceir --threads 1 evaluate --data $(DATA) --route auto,direct,reason --out out/evaluate/mini

evidence: $(VENV)/ready
	$(BIN)/python -m benchmarks.evidence

clean:
	rm -rf $(VENV) out
