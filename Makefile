# `make help` lists what can be made. Everything runs in .venv, which `make setup` fills.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
FAIRSEQ_VENV ?= .venv-fairseq
OLD_TRITON ?= .triton-3.5.1
FAIRSEQ_RUN := $(FAIRSEQ_VENV)/bin/python
PACKAGES := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast test-fairseq test-triton test-sanitized coverage lint types docs benchmark wheels clean

help: ## list these commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-15s%s\n", $$1, $$2}'

setup: $(VENV)/complete ## install everything into .venv, at the versions in constraints.txt

# Python compiles what is imported, not all that is installed.
PIP_INSTALL := $(RUN) -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt

$(VENV)/complete: $(VENV)/trains
	$(PIP_INSTALL) -e '.[train,dev]'
	touch $@

$(VENV)/trains: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) -e '.[train]'
	touch $@

demo: $(VENV)/trains ## train a DeiT with MultiMax on embedded Fashion-MNIST, and draw what it learned
	$(RUN) train.py experiment=deit_multimax logger.wandb=disabled
	$(RUN) -m experiments.modulators

test: setup lint types ## lint, type checks and all tests
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2

test-fast: setup ## the tests that are not slow, in about a minute
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 -m 'not slow'

test-fairseq: $(FAIRSEQ_VENV)/complete ## the fairseq plug-in with fairseq itself (Python 3.11 or 3.12)
	OMP_NUM_THREADS=1 $(FAIRSEQ_RUN) -m pytest -n 2 --dist loadfile tests/fairseq

test-triton: $(OLD_TRITON)/complete ## the Triton kernels compile with the oldest Triton that is supported
	PYTHONPATH=$(OLD_TRITON):. TRITON_CACHE_DIR=$(OLD_TRITON)/cache $(RUN) tests/kernels/compile_kernels.py

$(OLD_TRITON)/complete: $(VENV)/complete
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-compile --no-deps --upgrade \
		--target $(OLD_TRITON) $(OLD_TRITON:.triton-%=triton==%)
	touch $@

# fairseq on top of all that .venv has, and of this folder.
$(FAIRSEQ_VENV)/complete: $(VENV)/complete requirements/fairseq.txt
	$(RUN) -m venv $(FAIRSEQ_VENV)
	$(FAIRSEQ_RUN) -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes \
		-r requirements/fairseq.txt
	printf '%s\n' '$(CURDIR)' "import site; site.addsitedir('$$($(RUN) $(PACKAGES))')" \
		> "$$($(FAIRSEQ_RUN) $(PACKAGES))/multimax-environment.pth"
	touch $@

# A report ends the process, so that it must reach the terminal: no capture of file descriptors.
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=all -g
SANITIZED := -m pytest -n 0 --capture=sys $(addprefix tests/kernels/test_,c_attention.py c_attention_bias.py \
	c_attention_bias_values.py c_attention_dropout.py c_steps.py c_rows.py c_rows_values.py linear_loss.py arguments.py \
	backend.py)

test-sanitized: setup ## tests of the C kernels under gcc's AddressSanitizer and UBSan, some minutes
	CC='gcc $(SANITIZERS)' OMP_NUM_THREADS=1 ASAN_OPTIONS=detect_leaks=0 \
		LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
		$(RUN) $(SANITIZED)

coverage: setup ## all tests, and what they execute: a table, coverage.xml and htmlcov/
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --cov --cov-report=term --cov-report=xml --cov-report=html

lint: setup ## ruff: lint and format
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: setup ## pyright on the package
	$(RUN) -m pyright

docs: setup ## the documentation site, into site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --quiet --strict

benchmark: setup ## speed and memory next to torch, timm, the entmax package and the official code
	$(RUN) -m benchmarks.normalizers
	$(RUN) -m benchmarks.attention
	$(RUN) -m benchmarks.deit_step
	$(RUN) -m benchmarks.output_layer
	$(RUN) -m benchmarks.monitoring

wheels: ## dist/: source, a wheel for all, and one with compiled kernels (Linux on x86-64)
	rm -rf build dist
	$(PYTHON) -m venv build/venv
	build/venv/bin/python -m pip install --quiet --disable-pip-version-check build
	build/venv/bin/python -m build
	MULTIMAX_PREBUILT=1 build/venv/bin/python -m build --wheel

clean: ## remove .venv, wheels and caches; outputs/ stays
	rm -rf $(VENV) $(FAIRSEQ_VENV) build dist .pytest_cache .ruff_cache .hypothesis *.egg-info \
		.coverage .coverage.* coverage.xml htmlcov site
