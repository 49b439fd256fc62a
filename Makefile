# `make demo` and `make test` do all the set-up on a fresh machine.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# 2.13.0 is the release the project is tested with; any torch >= 2.9 that is already in $(VENV) is kept
TORCH ?= torch==2.13.0
CORES := $(shell $(PYTHON) -c "import os; print(len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count())")

.PHONY: demo test slow lint docs bench-check clean
demo: $(VENV)/.installed
	$(BIN)/python recipes/demo.py outputs/demo-model
	HF_HUB_OFFLINE=1 $(BIN)/hf-layerfuse run recipes/demo.yaml --overwrite
	$(BIN)/python -c "from hf_layerfuse import AutoFusedModel; m = AutoFusedModel.from_pretrained('outputs/demo'); print(f'Reloaded: {type(m).__name__} with {m.config.num_hidden_layers} layers')"

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(CORES) -m "not slow"

slow: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(CORES) -m slow -rs

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# built elsewhere first, because the notebooks leave a folder beside the site
docs: $(VENV)/.installed
	rm -rf site build/docs
	$(BIN)/python -m sphinx -W --keep-going -q -E -c docs -d build/docs/doctrees . build/docs/site
	mv build/docs/site site

# LAYERFUSE_DATA has the checkpoints and the data (default ../shared)
bench-check: $(VENV)/.installed
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/check.py --threads $(CORES)

# Where there is no GPU, a torch without CUDA saves gigabytes: from PyTorch's own index, else whatever pip resolves.
$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || command -v nvidia-smi >/dev/null || \
	  $(BIN)/pip install --quiet --retries 0 --timeout 15 --index-url https://download.pytorch.org/whl/cpu $(TORCH) || \
	  $(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet -e ".[dev]"
	touch $@

clean:
	rm -rf outputs site build .pytest_cache .ruff_cache
