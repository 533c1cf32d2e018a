"""What the launcher asks of a GPU, and what it makes of the answers."""

from bisect import bisect
from pathlib import Path
from types import SimpleNamespace

import pytest
import sass
import simulator
import torch
from asked import REDUCTIONS
from calls import (
    FULL,
    PAIR,
    WITH_PROBABILITIES,
    Case,
    arguments,
    call,
    cast,
    compare,
    make,
    probabilities,
)
from simulator import Gpu, device
from torch.utils._python_dispatch import TorchDispatchMode

import kdfuse
from kdfuse.kernels import backends, library

pytestmark = pytest.mark.slow(20)
WITHOUT_CODE_FOR_CLUSTERS = {"built_for": 80, "processors": 16}


def run(gpu, name, case, **more):
    settings = {**FULL[name], **(PAIR.get(name, {}) if case.students[0].shape[1] == 2 else {})}
    return gpu.run(name, *arguments(name, case, **settings), **more)


def test_code_for_an_older_gpu_has_no_clusters(library):
    """Built for sm_80 alone, its PTX runs on an H100, where the kernel of clusters is empty."""
    case = cast(make("kd", 3, 8251), torch.bfloat16)
    got = run(Gpu(library, device("H100", **WITHOUT_CODE_FOR_CLUSTERS)), "kd", case)
    assert [x.kernel for x in got.launches] == ["fast_streams-kd-bf16-labelled"]
    gradients = [g.to(torch.bfloat16) for g in got.gradients]
    compare("kd", case, torch.ones(3), got.loss, gradients, **FULL["kd"])


def test_code_for_a_newer_gpu_is_none(library):
    gpu = Gpu(library, device("A100", built_for=90))
    with pytest.raises(RuntimeError, match="no kernel image is available"):
        run(gpu, "kd", cast(make("kd", 3, 9), torch.float32))
    with pytest.raises(RuntimeError, match="no kernel image is available"):
        gpu.scale([torch.ones(3, 9)], torch.tensor(0.5))


def test_clusters_of_16_are_asked_for(library):
    """No kernel has more than 8 blocks of its own accord."""
    gpu = Gpu(library, device("H100", processors=24))  # of which nothing has been asked yet
    found = []
    for c in (8400, 16_500):
        case = cast(make("slkd", 2, c), torch.float32)
        got = run(gpu, "slkd", case)
        compare("slkd", case, torch.ones(2), got.loss, got.gradients, **FULL["slkd"])
        found += [(x.kernel, x.cluster, x.non_portable) for x in got.launches]
    kernel = "fast_clusters-slkd-f32-2"
    assert found == [(kernel, 8, False), (kernel, 16, True)]


@pytest.mark.parametrize(
    "name, sizes", [("kd", range(13_600, 14_200, 40)), ("uskd", range(8_500, 8_800, 20))]
)
def test_a_kernels_own_memory_leaves_less_for_rows(library, name, sizes):
    gpu = Gpu(library, device("H100", runs=0))
    for c in sizes:
        case = cast(make(name, 2, c), torch.float64)
        assert len(run(gpu, name, case).launches) == 1


def longest_to_sort(monkeypatch, memory: int, dtype: torch.dtype) -> int:
    """What the choice of a backend lets through on a GPU with so many bytes a block."""
    facts = SimpleNamespace(shared_memory_per_block_optin=memory)
    monkeypatch.setattr(backends.torch.cuda, "get_device_properties", lambda _: facts)
    too_long = bisect(
        range(65_536), False, key=lambda c: not backends.fits_sort(torch.empty(1, c, dtype=dtype))
    )
    return too_long - 1


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("of", simulator.GPUS)
def test_rows_that_the_choice_of_a_backend_lets_through_are_sorted(library, monkeypatch, of, dtype):
    longest = longest_to_sort(monkeypatch, simulator.GPUS[of]["memory"], dtype)
    gpu = Gpu(library, device(of, runs=0))
    assert len(run(gpu, "uskd", cast(make("uskd", 1, longest), dtype)).launches) == 1
    with pytest.raises(RuntimeError, match="too long for the sort .* use backend='reference'"):
        run(gpu, "uskd", cast(make("uskd", 1, longest + 2000), dtype))


@pytest.mark.parametrize("kilobytes, documented", [(227, 37), (163, 26), (99, 15)])
def test_the_longest_rows_are_those_of_the_limits(monkeypatch, kilobytes, documented):
    longest = longest_to_sort(monkeypatch, kilobytes << 10, torch.float32)
    assert longest // 1000 == documented
    assert f"{documented},000" in (simulator.CSRC.parent / "docs/limits.md").read_text()


def test_a_failed_question_is_asked_again(library):
    """By a process of its own: what the launcher has learnt it keeps."""
    case = cast(make("nkd", 3, 33), torch.float16)
    gpu = Gpu(fresh(library), device("H100", failing=1))
    with pytest.raises(RuntimeError, match="out of memory"):
        run(gpu, "nkd", case)
    assert len(run(Gpu(gpu.library), "nkd", case).launches) == 1


def fresh(library):
    """The same kernels, and a launcher that knows nothing yet."""
    copy = library.with_name(f"again-{library.name}")
    copy.write_bytes(library.read_bytes())
    return copy


def test_a_launch_that_fails_is_told(library):
    case = cast(make("kd", 4, 5), torch.float32)
    with pytest.raises(RuntimeError, match="unspecified launch failure"):
        run(Gpu(library, device("H100", refused=1)), "kd", case)


def test_captured_calls_give_their_tickets_back(library):
    case = cast(make("kd", 3, 9), torch.float32)
    inputs = arguments("kd", case, **FULL["kd"])
    gpu = Gpu(library, device("H100", runs=0))
    gpu.capture(inputs, 70_000, destroyed=True)
    for _ in range(2):  # as many as there are fit again, once those before are gone
        with pytest.raises(RuntimeError, match="more than 65536 streams and captured graphs"):
            gpu.capture(inputs, 70_000, destroyed=False)
        gpu.capture(inputs, 65_000, destroyed=False)


def options(name, n, c):
    """Cases of an op: each kind of target, types, teachers and rows that it takes."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        yield cast(make(name, n, c), dtype)
    yield cast(make(name, n, c), torch.bfloat16, torch.float32)
    if name in WITH_PROBABILITIES:
        case = cast(make(name, n, c), torch.bfloat16)
        case.target = probabilities(n, c).float()
        yield case
    if name == "kd":
        yield cast(make("kd", n, c, teachers=3), torch.bfloat16)
        case = cast(make("kd", n, c), torch.bfloat16)
        yield Case(case.students, case.teachers, None)
    if name == "slkd":
        yield cast(make("slkd", n, c, slts=2), torch.bfloat16, torch.float32)


@pytest.mark.parametrize("of", simulator.GPUS)
@pytest.mark.parametrize("name", sass.LOSSES)
def test_one_launch_a_direction(library, name, of):
    gpu = Gpu(library, simulator.whole(of))
    for n, c in ((0, 9), (8, 2), (256, 100), (16_384, 10), (16, 1000), (2, 8200), (20_000, 10)):
        for case in options(name, n, c):
            if case.target is None:
                inputs = arguments("kd", case, temperature=2.0)
                assert len(gpu.run("kd", *inputs).launches) == 1
                continue
            for reduction in REDUCTIONS:
                assert len(run(gpu, name, case, reduction=reduction).launches) == 1
    gradients = [torch.zeros(64, 10) for _ in range(3)]
    assert len(gpu.scale(gradients, torch.tensor(2.0)).launches) == 1


class Recorded(TorchDispatchMode):
    """The operators that reach the dispatcher: on a GPU each but the allocations is a launch."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(str(func).removesuffix(".default"))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def in_place(monkeypatch):
    """On the CPU what a backward pass does on a GPU: the stored gradients are scaled in place."""
    monkeypatch.setattr(backends, "scales_on_gpu", lambda _: True)
    library = torch.library.Library("kdfuse", "IMPL")

    def scale(gradients, factor):
        for g in gradients:
            g.mul_(factor[:, None] if factor.dim() else factor)

    def scale_to_half(gradients, factor):
        return [(g * (factor[:, None] if factor.dim() else factor)).half() for g in gradients]

    library.impl("scale_", scale, "CPU")
    library.impl("scale_to_half", scale_to_half, "CPU")
    yield
    library._destroy()


@pytest.mark.parametrize("denominator", (None, 7.5, torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("name", sass.LOSSES)
def test_nothing_runs_beside_the_two_launches(in_place, name, denominator):
    """No zeros, fills or casts, whatever the denominator is."""
    by = torch.ones((), dtype=denominator) if isinstance(denominator, torch.dtype) else denominator
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        case = cast(make(name, 4, 9), dtype)
        students = [x.requires_grad_() for x in case.students]
        loss = call(name, case, **FULL[name], denominator=by)
        with Recorded() as seen:
            call(name, case, **FULL[name], denominator=by)
        looked_at = "aten._local_scalar_dense"  # a denominator on the CPU: is it positive?
        assert [op for op in seen.ops if op != looked_at] == [f"kdfuse.{name}"]
        upstream = torch.tensor(0.5)
        with Recorded() as seen:
            torch.autograd.grad(loss, students, upstream)
        to_half = "to_half" if dtype == torch.float16 else ""
        assert seen.ops == [f"kdfuse.scale_{to_half}"]


@pytest.mark.parametrize("name", sass.LOSSES)
def test_a_second_backward_is_right(in_place, name):
    case = cast(make(name, 4, 9), torch.float32)
    students = [x.requires_grad_() for x in case.students]
    loss = call(name, case, **FULL[name])
    once = torch.autograd.grad(loss, students, retain_graph=True)
    for factor in (0.0, 3.0, 1.0):  # the last one may scale in place
        again = torch.autograd.grad(
            loss, students, torch.tensor(factor), retain_graph=factor != 1.0
        )
        for a, b in zip(again, once, strict=True):
            assert torch.equal(a, b * factor)


def test_a_denominator_on_the_host_is_a_number(monkeypatch):
    from kdfuse.kernels import op

    at = torch.device("meta")
    assert op.denominator_of(torch.tensor(7), at) == (None, 7)
    assert op.denominator_of(7.5, at) == (None, 7.5)
    assert op.denominator_of(None, at) == (None, None)
    kept = torch.ones((), device="meta")
    assert op.denominator_of(kept, at)[0] is kept


def test_the_choice_of_a_backend_can_be_traced(monkeypatch):
    """torch.compile passes it on the way of every call on a GPU."""
    there = SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: True))
    monkeypatch.setattr(backends, "torch", there)  # of this module alone: dynamo asks for GPUs too
    made = library.Cuda(Path("libkdfuse_cuda.so"), ["sm_90"], runtime=13000, driver=12000)
    monkeypatch.setattr(backends, "_CUDA", (made, ""))

    def said(x):
        return x + len(backends._cuda())

    torch._dynamo.reset()
    traced = torch.compile(said, fullgraph=True, backend="eager")
    assert traced(torch.zeros(())) == said(torch.zeros(())) > 0


def test_reasons_of_an_old_driver():
    assert backends.too_old(13000, 13000) == backends.too_old(13020, 13000) == ""
    assert backends.too_old(12080, 12090) == ""
    assert "supports CUDA 12.4 at most" in backends.too_old(12040, 13000)
    assert kdfuse.backends().keys() == backends.REASONS.keys()
