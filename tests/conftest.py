"""What holds for every test: its place in the order, its seed, and that it leaves nothing behind;
and what tests of several folders are given.

    --shuffle SEED   files, and the tests of each, in a random order
    --level NAME     the SIMD level of the compiled losses, one of their levels()
    --sees FACT=X    fail unless this process finds X (see `facts`)
    --long           try each fault of tests/faults many times, run what is marked `long`

Without --shuffle, files marked `slow` come last, those that take longest first, so that
the workers that share out files (--dist loadfile) end together.
"""

import os
import random
import re
import shutil
import subprocess
import sys
from typing import NamedTuple

import numpy as np
import pytest

# By run.speed=fast a run computes in bfloat16 where the processor has instructions for it; those of
# the tests compute the same everywhere. Read when torch first needs it; their processes inherit it.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_VNNI")

# What starts the tests is no part of them: a run goes on by itself where these are set.
for _name in ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"):
    os.environ.pop(_name, None)

# Variables that pytest sets for each test; and once, PyTorch where it compiles and scikit-learn.
ELSEWHERE = ("PYTEST_", "TORCHINDUCTOR_", "_TORCHINDUCTOR_", "TRITON_", "KMP_")


def pytest_addoption(parser):
    parser.addoption("--shuffle", type=int, metavar="SEED", help="run in a random order")
    parser.addoption("--level", help="SIMD level of the compiled losses")
    parser.addoption("--long", action="store_true", help="whole products, many faults")
    parser.addoption("--sees", metavar="FACT=X", help="fail unless this process finds X")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    if not config.getoption("--long"):
        left_out = [item for item in items if item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]
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
def variant(request):
    """What the options ask of the whole session."""
    level, sees = (request.config.getoption(name) for name in ("level", "sees"))
    if level is not None:
        from kdfuse.kernels.backends import compiled

        compiled()[0].set_level(level)
    if sees is not None:
        fact, wanted = sees.split("=")
        assert facts()[fact]() == wanted, f"--sees {sees}, but it is {facts()[fact]()}"


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """A folder of scikit-learn's digits, half of those for validation, which nothing may change."""
    from kdfuse.engine.data.sources.digits import write_digits

    root = tmp_path_factory.mktemp("data") / "digits"
    write_digits(root)
    for name in (root / "val").iterdir():
        for image in sorted(name.iterdir())[18:]:
            image.unlink()
    return root


@pytest.fixture(scope="session")
def few(digits, tmp_path_factory):
    """The first 32 of each digit to train on and 4 to validate with: where accuracy says nothing.
    Nothing may change the folder."""
    root = tmp_path_factory.mktemp("data") / "few"
    for split, images in (("train", 32), ("val", 4)):
        for label in (digits / split).iterdir():
            copy = root / split / label.name
            copy.mkdir(parents=True)
            for image in sorted(label.iterdir())[:images]:
                shutil.copy(image, copy)
    return root


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def kd(monkeypatch, capsys):
    """Runs `kdfuse WORDS...` through the program's entry point."""
    from kdfuse.engine.cli import main as cli

    monkeypatch.delenv("KDFUSE_TRACEBACK", raising=False)

    def call(*words: object) -> Result:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["kdfuse", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else 0
        return Result(code, *capsys.readouterr())

    return call


@pytest.fixture
def apex(tmp_path, monkeypatch):
    """The folder, not made yet, of a package named apex that is found before all others.

    What is imported of it is forgotten, or a later test would find it: find_spec asks sys.modules.
    """

    def forget():
        for name in [n for n in sys.modules if n == "apex" or n.startswith("apex.")]:
            del sys.modules[name]

    forget()
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "apex"
    forget()


def facts():
    """What may vary between machines, each as text."""
    import torch

    from kdfuse.kernels.backends import compiled

    return {
        "capability": torch.backends.cpu.get_cpu_capability,
        "onednn": onednn,
        "level": compiled()[0].level,
        "threads": lambda: str(torch.get_num_threads()),
    }


def onednn():
    """The instructions that oneDNN takes, which it says itself when it is first used."""
    code = "import torch; torch.conv2d(torch.zeros(8, 16, 32, 32), torch.zeros(16, 16, 3, 3))"
    environment = {**os.environ, "ONEDNN_VERBOSE": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found = re.search(r"cpu,isa:(?:Intel )?(.+)", done.stdout)
    return found[1] if found else "none"


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
        "tf32": (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32),
        "gradients": torch.is_grad_enabled(),
    }
