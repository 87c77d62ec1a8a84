# `make demo` and `make test` need Python >= 3.10 and nothing else: the rest goes into .venv.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
# The oldest versions that setup.cfg allows; they need a Python of their time, 3.10 to 3.12.
OLDEST := .venv-oldest

# Two processes of up to 7 GB each; a file's tests share what they prepare.
PARALLEL := --numprocesses auto --maxprocesses 2 --dist loadfile

# Without a bytecode cache every process of nnU-Net compiles torch again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-oldest bench lint dist clean
demo: $(READY)
	$(VENV)/bin/meddinov3 demo

test: $(READY)
	$(VENV)/bin/python -m pytest $(PARALLEL)

test-oldest: $(OLDEST)/.ready # old releases warn of what newer ones have settled
	$(OLDEST)/bin/python -m pytest $(PARALLEL) -W default

# What docs/benchmarks.md has, in short; nothing else should run meanwhile.
bench: export OMP_WAIT_POLICY := passive
bench: $(READY)
	$(VENV)/bin/meddinov3 bench --backbone vit_small
	$(VENV)/bin/python benchmarks/decoder_speed.py --grid 14 --width 1536 --repetitions 3
	$(VENV)/bin/python benchmarks/prediction_speed.py --repetitions 1
	$(VENV)/bin/python benchmarks/augmentation_speed.py --patches 40
	$(VENV)/bin/python benchmarks/data_reading.py
	$(VENV)/bin/python benchmarks/pretraining_step.py --images 4 --steps 3
	$(VENV)/bin/python benchmarks/student_pass.py --rounds 3
	$(VENV)/bin/python benchmarks/views_speed.py
	$(VENV)/bin/python benchmarks/slice_store.py
	$(VENV)/bin/python benchmarks/growth.py

lint: $(READY)
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

dist: $(READY) # the wheel is made from the sdist
	rm -rf dist
	$(VENV)/bin/python -m build --no-isolation
	$(VENV)/bin/python -m twine check --strict dist/*
	$(VENV)/bin/python build_backend/check_dist.py dist

clean:
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache

$(READY): setup.cfg pyproject.toml $(wildcard build_backend/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo 'Python 3.10 or later is needed: call make with PYTHON=python3.12 or so.' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	  { echo 'Python lacks its venv module: install it (on Debian and Ubuntu: apt install python3-venv).' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --editable '.[dev]'
	touch $@

$(OLDEST)/.ready: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet uv
	$(OLDEST)/bin/uv pip install --quiet --python $(OLDEST)/bin/python \
	  --resolution lowest-direct --editable '.[dev]'
	touch $@
