# Each target makes .venv and installs what it needs; a second call changes nothing.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.kdfuse-installed
SOURCES := $(wildcard csrc/* csrc/losses/*)
PACKAGES := kernels engine kdfuse tests setup.py

.PHONY: demo test lint format bench gpu clean install

install: $(INSTALLED)

$(INSTALLED): pyproject.toml setup.py $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q "setuptools>=77" wheel pybind11 "torch>=2.11" torchvision
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[dev,dali,tensorboard]"
	touch $(INSTALLED)

demo: install
	$(BIN)/kdfuse demo demo

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: install
	$(BIN)/ruff check $(PACKAGES)
	$(BIN)/ruff format --check $(PACKAGES)
	$(BIN)/mypy -p kdfuse
	$(BIN)/clang-format --dry-run -Werror $(wildcard csrc/*.h csrc/*.cpp csrc/*.cu csrc/losses/*.h tests/*.cpp)

format: install
	$(BIN)/ruff check --fix $(PACKAGES)
	$(BIN)/ruff format $(PACKAGES)
	$(BIN)/clang-format -i $(wildcard csrc/*.h csrc/*.cpp csrc/*.cu csrc/losses/*.h tests/*.cpp)

# Appends to docs/results/cpu/losses.jsonl; begins no case after BUDGET seconds.
BUDGET ?= 1800
bench: install
	mkdir -p docs/results/cpu
	$(BIN)/kdfuse bench losses --peers eager compiled --budget $(BUDGET) \
	    --out docs/results/cpu/losses.jsonl --plot docs/results/cpu/losses.svg

# On a machine with a GPU, with its own Python and PyTorch: build, test, measure, in one call.
GPU_RESULTS ?= docs/results/gpu
gpu:
	KDFUSE_CUDA=1 KDFUSE_CUDA_ARCHS=native KDFUSE_REQUIRE_BUILD=1 $(PYTHON) setup.py build_ext --inplace
	$(PYTHON) -m pytest -m gpu tests/test_gpu.py tests/test_triton_gpu.py
	mkdir -p $(GPU_RESULTS)
	$(PYTHON) -m kdfuse.kernels.bench --device cuda --dtypes float32 bfloat16 --seconds 1 \
	    --cases kd+ce dkd+ce nkd+ce slkd2 --sizes 256x1000 4096x1000 1024x21841 8192x32000 \
	    --out $(GPU_RESULTS)/losses.jsonl

clean:
	rm -rf build dist *.egg-info kernels/_C*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path "./.venv/*" -prune -exec rm -rf {} +
