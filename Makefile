# make train      set up .venv and train: stage 1 with Lighthouse, stage 2 dense (DATA=path, NAME=run, ARGS="…")
# make check      lint, types and the tests of the mathematics: two minutes
# make test       lint, types and all tests but the slow ones (WORKERS=2 test files at a time)
# make test-all   the slow ones too

NAME ?= demo
VENV ?= .venv
WORKERS ?= 2
RUN := $(VENV)/bin/python
MATHS = $(filter-out $(patsubst %,tests/test_%.py,kernels package patches profiling),$(wildcard tests/test_*.py)) tests/context_parallel tests/parallax tests/wall
# compiled modules are kept, whatever the environment says: the tests start hundreds of processes that import them
PYTEST = PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(RUN) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# the first interpreter of at least 3.12 that can make a virtual environment; PYTHON=path takes another
PYTHON ?= $(shell for p in python3.12 python3.13 python3 $$(ls -d $(HOME)/.pyenv/versions/3.1[2-9]*/bin/python3 2>/dev/null); do \
	"$$p" -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && command -v "$$p" && break; done)

.PHONY: train check test test-all quick lint types clean

train: $(VENV)/.installed
	$(RUN) -m megatron_lighthouse.recipe.two_stage --name $(NAME) $(if $(DATA),--data $(DATA)) $(ARGS)

check: lint types
	$(PYTEST) -m "not slow" -k "not kernels" $(ARGS) $(MATHS)

# mypy beside them, and not before, for it takes one core
test: lint
	$(MAKE) --no-print-directory --jobs=2 types quick

quick: $(VENV)/.installed
	$(PYTEST) -m "not slow" $(ARGS)

test-all: lint types
	$(PYTEST) $(ARGS)

lint: $(VENV)/.installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: $(VENV)/.installed
	$(RUN) -m mypy

# a torch that the interpreter already has, as in NVIDIA's containers, is used rather than installed again
$(VENV)/.installed: setup.py pyproject.toml
	@test -n "$(PYTHON)" || { echo "No Python 3.12 or newer with venv found: install it (Debian: apt install python3.12-venv;" \
		"pyenv install 3.12), or give make PYTHON=path."; exit 1; }
	"$(PYTHON)" -m venv $$("$(PYTHON)" -c 'import torch' 2>/dev/null && echo --system-site-packages) $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -e ".[megatron,test]"
	@touch $@

clean:
	rm -rf $(VENV) runs build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
