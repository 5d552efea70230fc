# Everything here sets itself up: `make demo` and `make test` work in a fresh clone.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
DEMO ?= runs/demo
TRAINED ?= runs/emoji
BENCH ?= runs/bench

# Modules are compiled when they are imported, a small part of what is installed; for the tests,
# whose many processes import them, beforehand.
export PIP_NO_COMPILE ?= 1
# Compiled programs are kept between processes, the smallest too: the tests' networks are tiny, and
# a program is read in a quarter of the time that it takes to compile.
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0

.PHONY: help demo demo-train test test-all lint docs notebooks bench format clean

help:
	@echo "make demo        draw with the model that comes with the package: one page of pictures"
	@echo "make demo-train  train every stage small on emoji, in 20 minutes, to a page of pictures"
	@echo "make test        the test suite, with parity against PyTorch"
	@echo "make test-all    the slow tests too"
	@echo "make lint        ruff"
	@echo "make docs        the documentation as a site, in build/site"
	@echo "make bench       speed and memory beside diffusers on PyTorch (long; BENCH_FLAGS: --rows ...)"
	@echo "make notebooks   every cell of the notebooks in colab, on tiny models"

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[emoji]"
	touch $@

$(VENV)/.installed-train: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[train,emoji]"
	touch $@

# Everything at once, whatever of it is there. The CPU build of torch is for the parity tests only;
# set TORCH= to go without.
$(VENV)/.installed-test: pyproject.toml
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(if $(TORCH),$(BIN)/pip install --quiet --disable-pip-version-check --retries 0 \
	    --extra-index-url https://download.pytorch.org/whl/cpu $(TORCH))
	$(BIN)/pip install --quiet --disable-pip-version-check --editable \
	    ".[train,emoji,test,app,notebooks$(if $(TORCH),$(comma)parity)]"
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[plan]" \
	    || echo "no libtpu for this machine: the test that compiles for a TPU is skipped"
	-$(BIN)/python -m compileall -qq -j 0 -x '$(UNUSED)' $(VENV)/lib
	touch $(VENV)/.installed $(VENV)/.installed-train $@
# A third of what is installed, of which next to nothing is imported.
UNUSED := /(tests|torch/testing|transformers/models|diffusers/pipelines|_inductor|_vendor(ed)?|lexers)/
comma := ,

$(VENV)/.installed-docs: $(VENV)/.installed-train
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[docs]"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python demo.py --out $(DEMO)

demo-train: $(VENV)/.installed-train
	$(BIN)/python -m unclip_jax train-all --data emoji --out $(TRAINED) --size small --minutes 20

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

test-all: $(VENV)/.installed-test
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 \
	    $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder -m "slow or not slow"

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

docs: $(VENV)/.installed-docs
	$(BIN)/sphinx-build -W -q docs build/site

notebooks: $(VENV)/.installed-test
	$(BIN)/python colab/run.py --smoke

bench: $(VENV)/.installed-test
	$(BIN)/python -m benchmarks.peers --out $(BENCH) $(BENCH_FLAGS)

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .cache build *.egg-info
