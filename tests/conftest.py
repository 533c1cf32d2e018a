"""What holds for every test: its place in the order, its seed, and that it leaves nothing behind.

    --shuffle SEED   files, and the tests of each, in a random order
    --level NAME     the SIMD level of the compiled losses, one of kdfuse.kernels._C.levels()

Without --shuffle, files marked `slow` come last, those that take longest first, so that two
workers that share out files (--dist loadfile) end together.
"""

import os
import random
import sys

import numpy as np
import pytest

# Variables that pytest sets for each test; and once, PyTorch where it compiles and scikit-learn.
ELSEWHERE = ("PYTEST_", "TORCHINDUCTOR_", "_TORCHINDUCTOR_", "TRITON_", "KMP_")


def pytest_addoption(parser):
    parser.addoption("--shuffle", type=int, metavar="SEED", help="run in a random order")
    parser.addoption("--level", help="SIMD level of the compiled losses")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    seed = config.getoption("shuffle")
    seconds = {item.path: 0.0 for item in items}
    for item in items:
        for mark in item.iter_markers("slow"):
            seconds[item.path] = max(seconds[item.path], mark.args[0])
    if seed is None:
        items.sort(key=lambda item: (seconds[item.path] > 0, -seconds[item.path]))
    else:
        chance = random.Random(seed)
        place = {path: chance.random() for path in seconds}
        items.sort(key=lambda item: (place[item.path], chance.random()))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """Random numbers without a seed are the same in any order, fixtures of a module included."""
    random.seed(0)
    np.random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def a_cache_of_ones_own(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def level_of_all_calls(request):
    name = request.config.getoption("level")
    if name is not None:
        from kdfuse.kernels import _C

        _C.set_level(name)


@pytest.fixture(scope="module", autouse=True)
def nothing_left_behind():
    """What a file changes in its process it changes back, so that no other file depends on it."""
    before = of_the_process()
    yield
    after = of_the_process()
    changed = {key: after.get(key) for key in before | after if before.get(key) != after.get(key)}
    assert not changed, f"left behind: {changed}"


def of_the_process():
    import torch

    return {key: value for key, value in os.environ.items() if not key.startswith(ELSEWHERE)} | {
        "folder": os.getcwd(),
        "threads": torch.get_num_threads(),
        "type": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "gradients": torch.is_grad_enabled(),
    }
