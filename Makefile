# make demo: train the built-in model on images/ and look at what it made.   make test: run the tests.
# make mini: rebuild the built-in models from nothing (recipes/mini/README.md); it can be stopped and started again.
# make mini MODELS=mini-sd ARGS='--device cuda --install'
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

MODELS :=
ARGS   :=

.PHONY: demo mini test test-interop lint types check clean

$(STAMP): pyproject.toml constraints.txt requirements-english.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --require-hashes --no-deps --requirement requirements-english.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/python -m recipes.demo

mini: $(STAMP)
	$(BIN)/python -m recipes.mini $(MODELS) $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4

# Optional: stable-diffusion.cpp reads what `convert` writes. Builds it once from its source package: 4 minutes, cmake
# and a C++ compiler. The tests take 3 to 6 minutes, 8 GB of memory and 8 GB of disk.
INTEROP := .venv-interop
SDCPP   := stable-diffusion-cpp-python==0.4.7

$(INTEROP)/$(SDCPP):
	test -x $(INTEROP)/bin/python || $(PYTHON) -m venv $(INTEROP)
	CMAKE_BUILD_PARALLEL_LEVEL=1 CMAKE_ARGS="-DSD_WEBP=OFF -DSD_WEBM=OFF" $(INTEROP)/bin/python -m pip install \
		--quiet --no-binary stable-diffusion-cpp-python $(SDCPP)
	touch $@

test-interop: $(STAMP) $(INTEROP)/$(SDCPP)
	SDLAB_INTEROP_PYTHON=$(CURDIR)/$(INTEROP)/bin/python $(BIN)/python -m pytest --numprocesses 0 -s tests/interop

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

check: lint types test

clean:
	rm -rf $(VENV) $(INTEROP)
