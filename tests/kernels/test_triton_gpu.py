"""The Triton kernels on a device, with the CPU ops as the oracle."""

import pytest
import torch
from calls import FULL, NAMES, WITH_PROBABILITIES, WITH_TOP_K, Case, call, cast, make, probabilities
from test_gpu import RANKS, run, to_gpu

from kdfuse import SparseTeacher
from kdfuse.kernels import backends
from kdfuse.kernels.triton import lang as triton_lang
from kdfuse.kernels.triton.uskd import LONGEST

WHY_NOT = backends.backends()["triton"] or backends.backends()["cpu"]
if triton_lang.INTERPRETED:
    WHY_NOT = "Triton was imported to interpret"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def compare(name, case, upstream=None, **settings):
    settings = {**FULL[name]} | settings
    true = run(name, case, "cpu", upstream, **settings)
    got = run(name, to_gpu(case), "triton", upstream, **settings)
    wide = true[0].dtype == torch.float64
    loose = {"rtol": 1e-11, "atol": 1e-11} if wide else {"rtol": 5e-5, "atol": 1e-5}
    torch.testing.assert_close(got[0], true[0], equal_nan=True, **loose)
    for key, value in true[1].items():
        torch.testing.assert_close(got[1][key], value, equal_nan=True, msg=key, **loose)
    relative = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float64: 1e-10}
    for a, b in zip(got[2], true[2], strict=True):
        near = {"rtol": relative.get(a.dtype, 5e-5), "atol": 1e-12 if wide else 4e-6}
        torch.testing.assert_close(a, b, equal_nan=True, **near)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("c", (3, 31, 100, 1000, 1001, 1024, 4096, 4097, 21841, 32000))
@pytest.mark.parametrize("name", NAMES)
def test_shapes(name, c, dtype):
    if name == "uskd" and c > min(LONGEST, RANKS.get(dtype, c)):
        pytest.skip("longer than Triton ranks, or than the type tells apart")
    for n in (1, 7) if c > 4096 else (1, 7, 300, 2100):  # above 2048 labels are counted before
        compare(name, cast(make(name, n, c, teachers=2), dtype))


@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@pytest.mark.parametrize("name", NAMES)
def test_reductions_and_upstream_gradients(name, reduction):
    case = cast(make(name, 70, 100), torch.float32)
    case.target[::3] = -100
    upstream = torch.linspace(-3, 2, 70) if reduction == "none" else torch.tensor(0.3)
    compare(name, case, upstream, reduction=reduction)
    compare(name, case, upstream, reduction=reduction, stored_gradient=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("c", (33, 1000, 21841))
@pytest.mark.parametrize("name", WITH_PROBABILITIES)
def test_class_probabilities(name, c, dtype):
    if name == "uskd" and c > min(LONGEST, RANKS.get(dtype, c)):
        pytest.skip("longer than Triton ranks, or than the type tells apart")
    case = cast(make(name, 9, c), dtype)
    case.target = probabilities(9, c).to(dtype)
    compare(name, case)


@pytest.mark.parametrize("name", WITH_TOP_K)
def test_listed_teachers(name):
    case = cast(make(name, 70, 1000), torch.bfloat16)
    for rest in ("spread", "drop"):
        few = SparseTeacher.top_k(
            case.teachers[0], 20, temperature=FULL[name]["temperature"], rest=rest
        )
        true = run(name, Case(case.students, [few], case.target), "cpu", **FULL[name])
        moved = to_gpu(case)
        mass = few.mass if few.mass is None else few.mass.cuda()
        on_gpu = SparseTeacher(few.values.cuda(), few.indices.cuda(), mass)
        got = run(name, Case(moved.students, [on_gpu], moved.target), "triton", **FULL[name])
        torch.testing.assert_close(got[0], true[0], rtol=5e-5, atol=1e-5)
        torch.testing.assert_close(got[2], true[2], rtol=1e-2, atol=4e-6)


@pytest.mark.parametrize("name", ("kd", "dkd"))
@pytest.mark.parametrize("c", (100, 1000, 4099))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
def test_equal_logits_give_exactly_zero(name, c, dtype):
    case = cast(make(name, 33, c), dtype)
    case = to_gpu(Case([case.teachers[0].clone()], [case.teachers[0]], case.target))
    loss, _, gradients = run(name, case, "triton", **{**FULL[name], "ce_weight": 0.0})
    assert loss == 0 and not gradients[0].any()


@pytest.mark.parametrize("name", NAMES)
def test_same_bits_every_time_on_every_stream(name):
    case = to_gpu(cast(make(name, 1030, 100), torch.float32))
    first = run(name, case, "triton", **FULL[name])
    streams = [torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    got = []
    for stream in streams * 3:  # beside each other: every stream has a counter of its own
        with torch.cuda.stream(stream), torch.no_grad():
            got.append(call(name, case, backend="triton", **FULL[name]))
    torch.cuda.synchronize()
    assert all(torch.equal(loss.cpu(), first[0]) for loss in got)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_waits_for_the_device(name):
    case = to_gpu(cast(make(name, 70, 100), torch.float32))
    students = [x.requires_grad_() for x in case.students]
    call(name, case, backend="triton", **FULL[name])  # compiles
    denominator = torch.tensor(7.5, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = call(name, case, backend="triton", denominator=denominator, **FULL[name])
        torch.autograd.grad(loss, students)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", NAMES)
def test_graph_replays_on_new_logits_beside_eager_calls(name):
    case = to_gpu(cast(make(name, 70, 1000), torch.float32))
    other = to_gpu(cast(make(name, 70, 1000, seed=1), torch.float32))
    students = [x.requires_grad_() for x in case.students]

    def step():
        loss = call(name, case, backend="triton", **FULL[name])
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
    true = run(name, other, "triton", **FULL[name])
    for _ in range(3):
        graph.replay()
        with torch.no_grad(), torch.cuda.stream(side):
            call(name, other, backend="triton", **FULL[name])
    torch.cuda.synchronize()
    assert torch.equal(loss.cpu(), true[0])
    assert all(torch.equal(a.cpu(), b) for a, b in zip(gradients, true[2], strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_compile_is_one_graph(name):
    case = to_gpu(cast(make(name, 33, 100), torch.float32))
    true = run(name, case, "triton", **FULL[name])
    students = [x.detach().requires_grad_() for x in case.students]

    @torch.compile(fullgraph=True)
    def step(students, teachers, target):
        return call(name, Case(students, teachers, target), backend="triton", **FULL[name])

    loss = step(students, case.teachers, case.target)
    gradients = torch.autograd.grad(loss, students)
    assert torch.equal(loss.detach().cpu(), true[0])
    for a, b in zip(gradients, true[2], strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-6, atol=1e-9)
