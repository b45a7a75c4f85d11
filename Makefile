# Needs Python >= 3.11, pip and make; everything else is installed into .venv from requirements.lock.
PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
export PATH := $(BIN):$(PATH)

.PHONY: demo test test-fast test-clusters pages check soak slurm-lab lock clean

demo: $(VENV)/.installed        ## the whole pipeline on the demo data, then the report
	dvc repro
	@unifork score band
	@echo "Report: $(CURDIR)/reports/$$(python -c 'import yaml; print(yaml.safe_load(open("params.yaml"))["name"])')/index.html"

test: $(VENV)/.installed        ## all tests but those below; two processes, the slow ones first, file by file
	python -m pytest -m "not soak and not pages and not nodes" -n 2 --dist loadgroup --no-loadscope-reorder --durations=15 -rs

test-fast: $(VENV)/.installed   ## no Ray, no whole programs: for daily work
	python -m pytest -m "not soak and not slow" -n 2 --dist worksteal --durations=15

test-clusters: $(VENV)/.installed ## real clusters: a job server, several nodes, several machines
	python -m pytest -m "nodes and not soak" -n 2 --dist loadgroup --durations=5 -rs

pages: $(VENV)/.installed        ## all commands of docs/howto.md and docs/own-data.md, as people type them
	python -m pytest -m pages -n 2 --dist loadfile --durations=5

check: $(VENV)/.installed       ## style and types
	ruff check .
	ruff format --check .
	mypy
	python tests/size.py

soak: $(VENV)/.installed        ## long random kill tests
	python -m pytest -m soak --durations=15 -rs -o faulthandler_timeout=7200

slurm-lab: $(VENV)/.installed    ## clusters/slurm.sbatch under a real Slurm; installs Debian's where there is none; needs root
	python -m pytest tests/slurm_lab.py -s -rs -o faulthandler_timeout=7200

$(VENV)/.installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

# What pip resolves for the extras of demo and tests in an empty environment; pins that still fit stay (delete
# requirements.lock to take everything anew). pandas < 3 is for img2dataset (extra `web`), standard-imghdr for Python
# 3.13; local versions and CUDA packages are left out, so that the lock installs on any Linux machine: torch brings the
# CUDA packages it needs.
lock:
	rm -rf .venv-lock
	$(PYTHON) -m venv .venv-lock
	touch requirements.lock
	.venv-lock/bin/python -m pip install --quiet --constraint requirements.lock "pandas<3" "torch==2.13.0" \
	    "standard-imghdr" ".[demo,dev,web]"
	.venv-lock/bin/python -m pip freeze --exclude unifork \
	| sed -E 's/\+[a-z0-9.]+$$//' | grep -viE '^(nvidia|cuda|triton)' > requirements.new
	mv requirements.new requirements.lock
	rm -rf .venv-lock build unifork.egg-info

clean:                          ## everything that dvc repro makes; the cache stays
	rm -rf data tokenizers models runs answers scores reports
