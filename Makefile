# Everything is set up in .venv/ and built in build/; a target runs again only when what it reads has changed.
PYTHON ?= python3
# The venv's flags, e.g. VENV_ARGS=--system-site-packages to use a torch that the machine brings along.
VENV_ARGS ?=
TORCH ?= $(if $(shell command -v nvidia-smi),torch,torch==2.13.0)
DEMO_ARGS ?=
TEST_ARGS ?=
# Most tests keep one core busy. Where there is a GPU, its memory is not to be shared.
WORKERS ?= $(if $(shell command -v nvidia-smi),0,2)
BENCH_ARGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
WHEEL_SOURCES := setup.py pyproject.toml MANIFEST.in LICENSE \
  $(shell find csrc triton_kernels simplex_ops -name '*.py' -o -name '*.h' -o -name '*.cpp')
CPP := $(shell find csrc tests examples -name '*.h' -o -name '*.cpp')
PY := examples tests benchmarks triton_kernels simplex_ops setup.py

.PHONY: demo test lint format typecheck wheel bench report clean help
unexport PYTHONPATH  # the sources or another install must not shadow what is built here
.DELETE_ON_ERROR:

help:
	@echo "make demo       train, plot, export and reload a 2-simplicial language model"
	@echo "make test       run the test suite against the installed wheel"
	@echo "make wheel      build dist/simplex_ops-*.whl"
	@echo "make bench      time the ops"
	@echo "make report     time 2-simplicial attention over length, GQA ratio and windows, and draw it"
	@echo "make lint | format | typecheck | clean"

demo: .venv/installed-demo
	cd .venv && bin/python -m simplex_ops  # from another folder: here Python would import the sources, not the wheel
	$(BIN)/python examples/train_lm.py --out demo_out $(DEMO_ARGS)

test: .venv/installed-test
	$(BIN)/pytest -n $(WORKERS) --dist worksteal $(TEST_ARGS)

wheel: build/wheel.stamp

bench: .venv/installed-test
	$(BIN)/python benchmarks/bench.py $(BENCH_ARGS)

report: .venv/installed-test .venv/installed-demo
	$(BIN)/python benchmarks/bench.py --report $(BENCH_ARGS)

lint: .venv/installed-dev
	$(BIN)/ruff check $(PY)
	$(BIN)/ruff format --check $(PY)
	$(BIN)/clang-format --dry-run -Werror $(CPP)

format: .venv/installed-dev
	$(BIN)/ruff check --fix $(PY)
	$(BIN)/ruff format $(PY)
	$(BIN)/clang-format -i $(CPP)

typecheck: .venv/installed-dev
	$(BIN)/mypy

clean:
	rm -rf .venv build dist demo_out *.egg-info

# torch has a step of its own: all that follows must find it installed instead of choosing another build of it.
.venv/torch:
	$(PYTHON) -m venv $(VENV_ARGS) .venv
	$(PIP) "$(TORCH)"
	touch $@

.venv/build-requires: pyproject.toml .venv/torch
	$(PIP) wheel $$($(BIN)/python -c "import tomllib; print(*(r for r in tomllib.load(open('pyproject.toml', 'rb')) \
	  ['build-system']['requires'] if not r.startswith('torch')))")
	touch $@

build/wheel.stamp: $(WHEEL_SOURCES) .venv/build-requires
	rm -rf dist build/lib build/bdist.*  # what was deleted or renamed must not slip into the wheel
	$(BIN)/python -m pip --disable-pip-version-check wheel . --no-build-isolation --no-deps --wheel-dir dist
	touch $@

.venv/installed: build/wheel.stamp
	$(PIP) --force-reinstall --no-deps dist/*.whl
	touch $@

# The extras `demo` and `test` come on top of the wheel; `dev` needs no wheel, so that lint takes seconds.
.venv/installed-demo .venv/installed-test: .venv/installed-%: .venv/installed
	$(PIP) "$$(echo dist/*.whl)[$*]"
	touch $@

.venv/installed-dev: pyproject.toml .venv/torch
	$(PIP) $$($(BIN)/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb')) \
	  ['project']['optional-dependencies']['dev'])")
	touch $@
