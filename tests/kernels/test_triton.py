"""The Triton kernels, run by Triton's interpreter on CPU tensors (triton_interpreted.py).

Triton decides for the interpreter when it is imported: hence a process of its own.
"""

import ast
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kdfuse.kernels import backends
from kdfuse.kernels.triton import lang as triton_lang

pytestmark = pytest.mark.slow(80)

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "kernels"
needs_triton = pytest.mark.skipif(bool(triton_lang.MISSING), reason=triton_lang.MISSING)


@needs_triton
def test_interpreted():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-x"]
    done = subprocess.run(
        [*command, str(HERE / "triton_interpreted.py")],
        cwd=HERE.parents[1],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and " skipped" not in done.stdout, done.stdout[-500:]


def test_nothing_on_the_way_of_a_call_waits_for_the_device():
    waits = {"item", "cpu", "tolist", "numpy", "synchronize", "nonzero", "is_nonzero"}
    for path in (KERNELS / "triton").glob("*.py"):
        called = {
            node.func.attr
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        }
        assert not called & waits, f"{path.name}: {called & waits}"


@needs_triton
def test_a_counter_in_memory_that_a_graph_may_recycle_is_not_kept(monkeypatch):
    from kdfuse.kernels.triton import launch

    own = {"address": 512, "total_size": 512, "segment_pool_id": (0, 0)}
    of_graph = {"address": 2048, "total_size": 1024, "segment_pool_id": (0, 7)}
    looks = []
    snapshot = lambda: looks.append(1) or [own, of_graph]  # noqa: E731
    monkeypatch.setattr(torch.cuda, "memory_snapshot", snapshot)
    monkeypatch.setattr(launch, "_PRIVATE", set())
    for address, expected in ((512, False), (1023, False), (2048, True), (9, False)):
        assert launch.in_private_pool(address) is expected
    looks.clear()
    assert launch.in_private_pool(2048) and launch.in_private_pool(3071) and not looks


def test_losses_need_no_triton():
    """Without it the ops import, and backends() says what is missing."""
    code = (
        "import sys; sys.modules['triton'] = None; import kdfuse, torch;"
        "z = torch.randn(4, 9); assert kdfuse.kd_loss(z, z).item() == 0;"
        "print(kdfuse.backends()['triton'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "pip install triton" in done.stdout


class OnGpu:
    """What the choice of a backend asks of logits."""

    device, dtype, is_cuda = torch.device("cuda", 0), torch.float32, True

    def __init__(self, classes):
        self.shape = (4, classes)


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch):
    monkeypatch.setattr(backends, "_WARNED", {"cuda", "triton"})
    backends._runs_on.cache_clear()
    yield
    backends._runs_on.cache_clear()


def gpu_with_everything(monkeypatch, missing=()):
    reasons = {name: "gone" if name in missing else "" for name in backends.REASONS}
    monkeypatch.setattr(backends, "REASONS", {k: lambda v=v: v for k, v in reasons.items()})
    monkeypatch.setattr(backends, "has_code", lambda *_: True)
    monkeypatch.setattr(backends, "compiled_cuda", lambda: (SimpleNamespace(archs=[]), ""))
    found = SimpleNamespace(major=9, minor=0, shared_memory_per_block_optin=227 << 10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)


@pytest.mark.parametrize(
    "op, classes, missing, taken",
    [
        ("kd", 1000, (), "cuda"),
        ("kd", 21841, ("cuda",), "triton"),
        ("slkd", 10**6, ("triton",), "cuda"),
        ("uskd", 4096, ("cuda",), "triton"),
        ("uskd", 21841, (), "cuda"),
    ],
)
def test_choice_on_a_gpu(monkeypatch, op, classes, missing, taken):
    gpu_with_everything(monkeypatch, missing)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.choose(None, OnGpu(classes), op) == taken


def test_kernels_that_no_gpu_has_run_say_so_once(monkeypatch):
    gpu_with_everything(monkeypatch)
    monkeypatch.setattr(backends, "_WARNED", set())
    with pytest.warns(UserWarning, match="not been run on a GPU .* `kdfuse doctor`"):
        assert backends.choose(None, OnGpu(10), "kd") == "cuda"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.choose(None, OnGpu(10), "kd") == "cuda"


@pytest.mark.parametrize(
    "op, classes, why", [("kd", 10, "cuda: gone; triton: gone"), ("uskd", 65537, "does not fit")]
)
def test_the_reference_on_a_gpu_comes_with_a_warning(monkeypatch, op, classes, why):
    monkeypatch.setattr(backends, "REASONS", dict.fromkeys(backends.REASONS, lambda: "gone"))
    with pytest.warns(UserWarning, match=f"plain-PyTorch reference .*{why}.*ends this warning"):
        assert backends.choose(None, OnGpu(classes), op) == "reference"


def test_rows_that_no_block_can_sort_take_the_reference(monkeypatch):
    gpu_with_everything(monkeypatch)
    with pytest.warns(UserWarning, match="cuda: no code or no room for it on this GPU"):
        assert backends.choose(None, OnGpu(40_000), "uskd") == "reference"


@pytest.mark.parametrize(
    "archs, capability, runs",
    [
        (["sm_80", "sm_90", "compute_90"], (9, 0), True),
        (["sm_80"], (8, 6), True),
        (["sm_80"], (9, 0), False),
        (["sm_90", "compute_90"], (10, 0), True),
        (["sm_90", "compute_90"], (8, 9), False),
        (["sm_100"], (10, 3), True),
        ([], (9, 0), False),
    ],
)
def test_code_for_a_device(archs, capability, runs):
    assert backends.has_code(archs, *capability) == runs


def test_rules_are_reasons_in_words():
    assert backends.RULES[-1].op == "" and backends.RULES[-1].longest == backends.ANY
    for line in backends.rules():
        assert line.count("reference") == 1 and "not measured" in line
