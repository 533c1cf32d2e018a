"""The CUDA kernels on a device, with the CPU ops as the oracle."""

import subprocess
import sys

import pytest
import torch
from calls import FULL, NAMES, PAIR, WITH_PROBABILITIES, Case, call, cast, make, probabilities

from kdfuse.kernels import backends

WHY_NOT = backends.backends()["cuda"] or backends.backends()["cpu"]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)]

INF = float("inf")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CLASSES = (2, 3, 31, 100, 1000, 1001, 1024, 1025, 4096, 21841, 50257)
LONGEST_SORT = {torch.float64: 8192}  # else 16384
RANKS = {torch.bfloat16: 257, torch.float16: 2048}  # that the logits of `make` keep apart


def to_gpu(case: Case) -> Case:
    """On the device, with every row where it was in its storage: strides and offsets are kept."""

    def move(x):
        if x is None or x.is_contiguous():
            return x if x is None else x.cuda()
        whole = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()).cuda()
        return whole.as_strided(x.shape, x.stride(), x.storage_offset())

    return Case(
        [move(x) for x in case.students], [move(x) for x in case.teachers], move(case.target)
    )


def run(name, case, backend, upstream=None, **settings):
    """Loss, terms and gradients, on the CPU."""
    students = [x.detach().requires_grad_() for x in case.students]
    loss, terms = call(
        name,
        Case(students, case.teachers, case.target),
        backend=backend,
        return_terms=True,
        **settings,
    )
    above = torch.ones_like(loss) if upstream is None else upstream.to(loss)
    gradients = torch.autograd.grad(loss, students, above)
    return loss.cpu(), {k: v.cpu() for k, v in terms.items()}, [g.cpu() for g in gradients]


def compare(name, case, upstream=None, **settings):
    settings = {
        **FULL[name],
        **(PAIR.get(name, {}) if case.students[0].shape[1] == 2 else {}),
    } | settings
    true = run(name, case, "cpu", upstream, **settings)
    got = run(name, to_gpu(case), "cuda", upstream, **settings)
    wide = true[0].dtype == torch.float64
    numbers = [x[x.isfinite()].abs().max().item() for x in case.students if x.isfinite().any()]
    largest = max(numbers, default=1.0)
    loose = {"rtol": 1e-11, "atol": 1e-11} if wide else {"rtol": 5e-5, "atol": 1e-5}
    torch.testing.assert_close(got[0], true[0], equal_nan=True, **loose)
    assert got[1].keys() == true[1].keys()
    for key, value in true[1].items():
        torch.testing.assert_close(got[1][key], value, equal_nan=True, msg=key, **loose)
    for a, b in zip(got[2], true[2], strict=True):
        relative = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float64: 1e-10}
        torch.testing.assert_close(
            a,
            b,
            rtol=relative.get(a.dtype, 5e-5),
            atol=1e-12 if wide else 2e-6 + 2e-7 * largest,
            equal_nan=True,
        )
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("c", CLASSES)
@pytest.mark.parametrize("name", NAMES)
def test_shapes(name, c, dtype):
    if name == "uskd" and c > LONGEST_SORT.get(dtype, 16384):
        case = to_gpu(cast(make(name, 2, c), dtype))
        with pytest.raises(RuntimeError, match="backend='reference'"):
            call(name, case, backend="cuda", **FULL[name])
        return
    if name == "uskd" and c > RANKS.get(dtype, c):
        pytest.skip(f"{dtype} does not tell so many ranks apart")
    for n in (1, 7) if c > 4096 else (1, 7, 70, 1030):
        compare(name, cast(make(name, n, c, teachers=2), dtype))


@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@pytest.mark.parametrize("name", NAMES)
def test_reductions_and_upstream_gradients(name, reduction):
    case = cast(make(name, 70, 100), torch.float32)
    upstream = torch.linspace(-3, 2, 70) if reduction == "none" else torch.tensor(0.3)
    compare(name, case, upstream, reduction=reduction)
    compare(name, case, upstream, reduction=reduction, stored_gradient=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("c", (33, 1001, 4096))
@pytest.mark.parametrize("name", WITH_PROBABILITIES)
def test_class_probabilities(name, c, dtype):
    if name == "uskd" and c > RANKS.get(dtype, c):
        pytest.skip(f"{dtype} does not tell so many ranks apart")
    case = cast(make(name, 9, c), dtype)
    case.target = probabilities(9, c).to(dtype)
    compare(name, case)


@pytest.mark.parametrize(
    "student, teacher",
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.float64),
    ],
    ids=str,
)
@pytest.mark.parametrize("c", (33, 1000, 4099))
@pytest.mark.parametrize("name", ("kd", "dkd", "nkd", "slkd"))
def test_mixed_types(name, c, student, teacher):
    compare(name, cast(make(name, 9, c), student, teacher))


@pytest.mark.parametrize("count", (1, 2, 3, 20))
@pytest.mark.parametrize("c", (33, 1000, 4096))
def test_several_teachers(c, count):
    """Twenty teachers do not fit into the memory of a row's team."""
    case = cast(make("kd", 9, c, teachers=count), torch.float32)
    weights = [0.0 if k == 1 else 1.0 / (k + 1) for k in range(count)]
    compare("kd", case, teacher_weights=weights)


@pytest.mark.parametrize("detach", (True, False))
@pytest.mark.parametrize("count", (1, 3, 9))
@pytest.mark.parametrize("c", (33, 1000, 4096))
def test_several_slts(c, count, detach):
    case = cast(make("slkd", 9, c, slts=count), torch.float32)
    compare("slkd", case, fusion=[1 / count] * count, detach_slts=detach)


def masked(case):
    for x in (*case.students, *case.teachers):
        x[:, 3:20] = -INF


def labels_masked(case):
    for x in case.students:
        x[torch.arange(len(x)), case.target] = -INF


def ties(case):
    for x in (*case.students, *case.teachers):
        x.copy_(x.sign())


def far(case):
    for x in (*case.students, *case.teachers):
        x += 1e4


def ignored(case):
    case.target[::3] = -100
    for x in (*case.students, *case.teachers):
        x[0] = float("nan")


def all_ignored(case):
    case.target[:] = -100


@pytest.mark.parametrize("c", (33, 1001, 4096))
@pytest.mark.parametrize(
    "change", (masked, labels_masked, ties, far, ignored, all_ignored), ids=lambda f: f.__name__
)
@pytest.mark.parametrize("name", NAMES)
def test_hard_rows(name, change, c):
    # In double: float32 rounds the ranks of tied and far keys its own way.
    case = cast(make(name, 9, c), torch.float64 if name == "uskd" else torch.float32)
    change(case)
    compare(name, case)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("offset, width", [(0, 1003), (1, 1008), (3, 1011)])
@pytest.mark.parametrize("name", NAMES)
def test_strides_and_offsets(name, offset, width, dtype):
    c = 250 if name == "uskd" else 1000
    case = cast(make(name, 9, c), dtype)

    def placed(x):
        whole = torch.full((len(x), width), float("nan"), dtype=x.dtype)
        whole[:, offset : offset + c] = x
        return whole[:, offset : offset + c]

    students = [placed(x) if k % 2 == 0 else x for k, x in enumerate(case.students)]
    compare(name, Case(students, case.teachers, case.target))
    compare(name, Case(case.students, [placed(x) for x in case.teachers], case.target))
    compare(name, Case(students, [placed(x) for x in case.teachers], case.target))


@pytest.mark.parametrize("name", NAMES)
def test_no_rows(name):
    compare(name, cast(make(name, 0, 33), torch.float32), reduction="sum")


@pytest.mark.parametrize("name", ("kd", "dkd"))
@pytest.mark.parametrize("c", (100, 1000, 4099))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
def test_equal_logits_give_exactly_zero(name, c, dtype):
    case = cast(make(name, 33, c), dtype)
    case = to_gpu(Case([case.teachers[0].clone()], [case.teachers[0]], case.target))
    loss, _, gradients = run(name, case, "cuda", **{**FULL[name], "ce_weight": 0.0})
    assert loss == 0 and not gradients[0].any()


@pytest.mark.parametrize("name", NAMES)
def test_same_bits_every_time(name):
    case = to_gpu(cast(make(name, 1030, 100), torch.float32))
    first, second = (run(name, case, "cuda", **FULL[name]) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[2], second[2], strict=True))


@pytest.mark.parametrize("denominator", (None, 7.5, "tensor"))
@pytest.mark.parametrize("name", NAMES)
def test_nothing_waits_for_the_device(name, denominator):
    case = to_gpu(cast(make(name, 70, 100), torch.float32))
    students = [x.requires_grad_() for x in case.students]
    if denominator == "tensor":
        denominator = torch.tensor(7.5, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, _ = call(
            name, case, backend="cuda", denominator=denominator, return_terms=True, **FULL[name]
        )
        torch.autograd.grad(loss, students)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", NAMES)
def test_graph_replays_on_new_logits(name):
    case = to_gpu(cast(make(name, 70, 1000), torch.float32))
    other = to_gpu(cast(make(name, 70, 1000, seed=1), torch.float32))
    students = [x.requires_grad_() for x in case.students]

    def step():
        loss = call(name, case, backend="cuda", **FULL[name])
        return loss, torch.autograd.grad(loss, students)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, gradients = step()
    with torch.no_grad():
        new = (*other.students, *other.teachers)
        for x, y in zip((*students, *case.teachers), new, strict=True):
            x.copy_(y)
        case.target.copy_(other.target)
    graph.replay()
    true = run(name, other, "cuda", **FULL[name])
    assert torch.equal(loss.cpu(), true[0])
    assert all(torch.equal(a.cpu(), b) for a, b in zip(gradients, true[2], strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_another_stream(name):
    case = cast(make(name, 1030, 1000), torch.float32)
    true = run(name, to_gpu(case), "cuda", **FULL[name])
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # what follows on another stream would read too early
        got = run(name, to_gpu(case), "cuda", **FULL[name])
    assert torch.equal(got[0], true[0])
    assert all(torch.equal(a, b) for a, b in zip(got[2], true[2], strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, monkeypatch):
    from host_rows import arguments

    case = cast(make(name, 6, 9), torch.float32)
    students, teachers, target, params = arguments(monkeypatch, name, case, **FULL[name])
    on_gpu = to_gpu(Case(students, teachers, target))
    op = getattr(torch.ops.kdfuse, name).default
    for grad in (False, True):
        students = [x.detach().requires_grad_(grad) for x in on_gpu.students]
        inputs = (
            students,
            on_gpu.teachers,
            [],
            [],
            on_gpu.target,
            None,
            None,
            params,
            1,
            -100,
            False,
        )
        torch.library.opcheck(op, inputs)


@pytest.mark.parametrize("name", NAMES)
def test_compile_is_one_graph(name):
    case = to_gpu(cast(make(name, 33, 100), torch.float32))
    true = run(name, case, "cuda", **FULL[name])
    students = [x.detach().requires_grad_() for x in case.students]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(students, teachers, target):
        return call(name, Case(students, teachers, target), backend="cuda", **FULL[name])

    loss = step(students, case.teachers, case.target)
    gradients = torch.autograd.grad(loss, students)
    assert torch.equal(loss.detach().cpu(), true[0])
    for a, b in zip(gradients, true[2], strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-6, atol=1e-9)


def test_none_takes_the_cuda_kernels():
    case = to_gpu(cast(make("kd", 9, 33), torch.float32))
    assert backends.choose(None, case.students[0], "kd") == "cuda"


def test_label_outside_the_classes_stops_the_device():
    code = (
        "import torch, kdfuse; z = torch.randn(4, 10, device='cuda');"
        "y = torch.tensor([0, 1, 10, 2], device='cuda');"
        "kdfuse.kd_loss(z, z, y, backend='cuda'); torch.cuda.synchronize()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0 and "target outside the classes" in done.stdout + done.stderr
