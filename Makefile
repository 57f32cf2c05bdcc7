# Every target makes its own virtual environment where there is none.
PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?=
PEERS := .venv-peers
CHROMIUM ?= chromium
# The page down to its bars.
PICTURE_HEIGHT := 1530
BENCH_DIR ?= bench
PAIRS ?=
BENCH ?=

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_FLAGS)
PINS := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test check fuzz real titan goldens llamacpp soak slurm-test picture bench clean

help:
	@echo 'make demo    reshard a tiny seeded Llama from 8 Meta files to Nanotron TP=4, on 8 ranks'
	@echo 'make test    run the tests on all cores'
	@echo 'make check   formatting, lint, types and tests, as CI runs them'
	@echo 'make fuzz    forty thousand damaged files past every reader, and the other long searches'
	@echo 'make soak    kills at every step and at random moments, long runs (an hour on 2 cores)'
	@echo 'make real    reshard and load with the real libraries (transformers, gguf)'
	@echo "make titan   TorchTitan's own model and adapter read what we write (an environment of 2 GB)"
	@echo "make goldens configs and prompts by transformers' own converter (an environment of 1 GB)"
	@echo 'make slurm-test  a real Slurm of two nodes runs the files of slurm/ (root, six minutes)'
	@echo 'make llamacpp  llama.cpp reads our GGUF files: same ids, same text (built in 15 minutes)'
	@echo 'make picture   the picture of a plan in docs/, as the README shows it (needs Chromium)'
	@echo 'make bench   seconds beside a copy and beside other tools (an hour on 2 cores, 42 GB of disk);'
	@echo "             BENCH='--list' names its rows, BENCH='--only TEXT --pairs 1' runs some"
	@echo 'make clean   delete the environment, caches, the demo and what bench/ holds beside results'
	@echo 'PYTHON=$(PYTHON) VENV=$(VENV) PIP_FLAGS=$(PIP_FLAGS)'

demo: $(VENV)/.run
	@$(BIN)/python launch/torchrun --nproc 8 -m reshard --src meta8 --dst tp4

test: $(VENV)/.dev
	@$(BIN)/python -m pytest -n auto

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --strict reshard
	$(BIN)/python -m pytest -n auto

fuzz: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto -m fuzz --long

soak: $(VENV)/.dev
	@$(BIN)/python -m pytest -n auto -m 'fault or slow' --long

real: $(VENV)/.real
	@PATH="$(abspath $(BIN)):$$PATH" tests/real/run.sh

titan: $(VENV)/.dev
	@PYTHON=$(abspath $(BIN))/python PIP_FLAGS='$(PIP_FLAGS)' tests/real/titan.sh
	@$(BIN)/python -m pytest tests/test_titan_adapter.py

goldens: $(PEERS)/.made
	@$(PEERS)/bin/python -m tests.real.goldens tests/goldens

llamacpp: $(VENV)/.real
	@PATH="$(abspath $(BIN)):$$PATH" PYTHON=$(PYTHON) PIP_FLAGS='$(PIP_FLAGS)' tests/real/llamacpp.sh

# A page that Chromium draws; it refuses to run as root in its sandbox.
picture: $(VENV)/.run
	@mkdir -p docs
	@$(BIN)/python -m reshard plan --src meta8 --dst tp4 src.model=llama3-70b --world 8 --html docs/plan.html > /dev/null
	@if command -v $(CHROMIUM) > /dev/null; then \
	    $(CHROMIUM) --headless --disable-gpu --hide-scrollbars --blink-settings=preferredColorScheme=1 \
	        $(if $(filter 0,$(shell id -u)),--no-sandbox) --window-size=1400,$(PICTURE_HEIGHT) \
	        --screenshot=docs/plan.png 'file://$(abspath docs/plan.html)' 2> /dev/null \
	    && echo 'docs/plan.html and docs/plan.png are made'; \
	else \
	    echo 'docs/plan.html is made; docs/plan.png needs Chromium, and `$(CHROMIUM)` is not there (CHROMIUM=...)'; \
	fi

# Without the peers' environment their rows say so. BENCH='--list', BENCH='--only meta8-tp4 --pairs 1'
bench: $(VENV)/.dev
	@$(MAKE) --no-print-directory $(PEERS)/.made || echo 'transformers 4.45 is not there to compare with'
	@$(BIN)/python -m tests.benchmarks --dir '$(BENCH_DIR)' --peers $(PEERS)/bin/python \
	    $(if $(PAIRS),--pairs $(PAIRS)) $(BENCH)

slurm-test: $(VENV)/.dev
	@PATH="$(abspath $(BIN)):$$PATH" tests/slurm/run.sh

clean:
	rm -rf $(VENV) .venv-titan .venv-llamacpp $(PEERS) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info reshard-demo \
	    bench/models bench/out
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: $(PINS) | $(BIN)/python
	@echo 'installing reshard into $(VENV)'
	@$(INSTALL) -e .
	@touch $@

$(VENV)/.dev: $(PINS) | $(BIN)/python
	@echo 'installing reshard, its tests and its tools into $(VENV)'
	@$(INSTALL) -e '.[test,dev]'
	@$(INSTALL) --no-deps llama-models
	@touch $@ $(VENV)/.run

$(VENV)/.real: $(PINS) | $(BIN)/python
	@echo 'installing reshard and the real libraries into $(VENV)'
	@$(INSTALL) -e '.[test,real]'
	@touch $@ $(VENV)/.run

# The last transformers whose wheel has the converter; its other packages are older than ours.
$(PEERS)/.made: tests/real/peers.txt
	@echo 'installing transformers 4.45 into $(PEERS)'
	@$(PYTHON) -m venv $(PEERS)
	@$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -r $<
	@touch $@
