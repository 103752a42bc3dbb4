# Everything a newcomer needs: `make demo` and `make test` create .venv, install and run.
VENV ?= .venv
PYTHON ?= python3
RUN = $(VENV)/bin/python -m
INSTALL ?= $(VENV)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt
OUT ?= out/gpu-first
OPERATIONS = $(patsubst kernels/%/op.py,smi.kernels.%,$(wildcard kernels/*/op.py))
API = smi smi.importance smi.losses smi.distillation smi.quantization $(OPERATIONS)

.PHONY: help demo test test-fast test-newest test-lowest lint docs package kernels executor bench bench-quick bench-check sanitize tables gpu gpu-pack gpu-first gpu-tune cpu-attention teacher clean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable '.[dev]'
	if command -v nvcc > /dev/null; then $(INSTALL) --no-deps nvidia-cutlass; fi
	touch $@

demo: $(VENV)/installed ## invert the embedded digits teacher with every method, use the images: table and report
	$(RUN) smi demo --output out/demo --force

test: $(VENV)/installed ## all tests (25 minutes on two cores); Triton kernels run in its interpreter where there is no GPU
	OMP_NUM_THREADS=1 $(RUN) pytest --numprocesses 2 --dist worksteal --quiet --durations 10

test-newest: ## all tests with the newest releases of all packages, in .venv-newest
	$(MAKE) test VENV=.venv-newest INSTALL=".venv-newest/bin/pip install --quiet --disable-pip-version-check --upgrade"

test-lowest: ## all tests with the lowest versions that pyproject.toml allows, in .venv-lowest; PYTHON= the lowest Python
	$(PYTHON) -m venv .venv-lowest && .venv-lowest/bin/pip install --quiet --disable-pip-version-check uv
	$(MAKE) test VENV=.venv-lowest INSTALL=".venv-lowest/bin/uv pip install --quiet --python .venv-lowest --resolution lowest-direct"

test-fast: $(VENV)/installed ## the tests worth running at every save (under 90 s on two cores)
	OMP_NUM_THREADS=1 $(RUN) pytest -m "fast and not slow" --numprocesses 2 --dist worksteal --quiet

lint: $(VENV)/installed ## check style and format with ruff, types with mypy
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy

docs: $(VENV)/installed ## the API site from the docstrings, in out/api; fails on a warning
	$(VENV)/bin/python -W error::UserWarning -m pdoc --template-directory docs/api --output-directory out/api $(API)

package: $(VENV)/installed ## source distribution and wheel in dist/, metadata checked
	rm -rf dist
	$(RUN) build --outdir dist
	$(RUN) twine check --strict dist/*

kernels: $(VENV)/installed ## what the compiler makes of every kernel: registers, spills, shared memory, instructions
	$(RUN) bench.gates.compiled

executor: $(VENV)/installed ## execute the compiled kernels on the CPU: every tile for sm_80 and sm_90 (half an hour)
	$(RUN) bench.executor

bench: $(VENV)/installed ## ours beside eager and torch.compile: steps, whole runs, memory, scaling, operations (15 minutes), then tables and plots
	$(RUN) bench.run && $(RUN) bench.paper

bench-quick: $(VENV)/installed ## the key figures (2 minutes)
	$(RUN) bench.run --quick

bench-check: $(VENV)/installed ## fail if something regressed: FLOPs, saved activations, compiled kernels, speed-ups, against the committed baselines
	$(RUN) bench.check

sanitize: $(VENV)/installed ## the C++ under sanitizers: its tests for addresses and undefined behaviour, the recorded pass for threads
	$(RUN) bench.gates.sanitizers

tables: $(VENV)/installed ## render the measured tables of README and docs from the rows in bench/results
	$(RUN) bench.tables

gpu: ## on a CUDA machine, with its own python3: check and time kernels, steps, whole runs and memory (15 minutes at most)
	$(PYTHON) -m bench.gpu; code=$$?; [ $$code = 2 ] || $(PYTHON) -m bench.tables.verified || code=1; exit $$code

gpu-pack: ## before, where there is nvcc: what a machine without network is to be given (PYTHON= one with that machine's Python and Triton)
	$(PYTHON) -m bench.sections.pack

gpu-first: ## on a CUDA machine that is lent for minutes: the most valuable of it, within 570 s, all files in OUT (docs/gpu.md)
	$(PYTHON) -m bench.gpu --first --out $(OUT)

gpu-tune: ## on a CUDA machine, with its own python3: time candidate tiles, write this GPU's tile table (TUNE="--only attention" for some)
	$(PYTHON) -m bench.tune $(TUNE)

cpu-attention: $(VENV)/installed ## attention on the CPU beside PyTorch's own
	$(RUN) bench.experiments.cpu_attention

teacher: $(VENV)/installed ## train the embedded digits teacher again (about ten minutes on two cores)
	$(RUN) smi.teachers.train_digits

clean: ## remove the environment, build products and caches
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .benchmarks
