"""The CUDA kernels beside others on a device: launches, streams, graphs, memory, and what is stored
for the backward pass.
"""

import pytest
import torch
from calls import FULL, NAMES, WITH_TOP_K, Case, call, cast, make
from on_gpu import MARKS, kernels_of, run, same_bits, to_gpu

from kdfuse import SparseTeacher

pytestmark = MARKS

CLUSTERS = bool(torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9)
f32, bf16, f16, f64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


def case_of(name: str, n: int, c: int, dtype=f32, seed: int = 0) -> Case:
    """On the device, with students that want a gradient."""
    case = to_gpu(cast(make(name, n, c, seed=seed), dtype))
    case.students = [x.requires_grad_() for x in case.students]
    return case


def loss_of(name: str, case: Case, **settings):
    return call(name, case, backend="cuda", **FULL[name], **settings)


PATHS = [
    ("kd", f32, 1030, 1000, "fast_warps"),
    ("dkd", bf16, 1030, 1000, "fast_warps"),
    ("tf_nkd", f16, 1030, 1000, "fast_warps"),
    ("slkd", bf16, 1030, 500, "fast_warps"),
    ("kd", bf16, 70, 1000, "fast_blocks"),
    ("nkd", f16, 5, 8000, "fast_blocks"),
    ("slkd", f32, 70, 1000, "fast_blocks"),
    ("kd", f32, 3, 21841, "fast_clusters"),
    ("dkd", bf16, 3, 32000, "fast_clusters"),
    ("nkd", bf16, 2, 50257, "fast_clusters"),
    ("kd", f32, 2, 128256, "fast_clusters"),
    ("slkd", bf16, 3, 21841, "fast_clusters"),
    ("kd", bf16, 2, 300000, "fast_streams"),
    ("tf_nkd", bf16, 3, 21841, "fast_streams"),
    ("uskd", f32, 70, 100, "general_warps"),
    ("kd", f64, 70, 100, "general_blocks"),
    ("slkd", f32, 2, 50257, "general_blocks"),
]


@pytest.mark.parametrize("name, dtype, n, c, kind", PATHS, ids=lambda x: str(x))
def test_a_direction_is_one_kernel_of_its_path(name, dtype, n, c, kind):
    if kind == "fast_clusters" and not CLUSTERS:
        pytest.skip("no clusters before compute capability 9.0")
    case = case_of(name, n, c, dtype)
    forward = kernels_of(lambda: loss_of(name, case))
    assert len(forward) == 1 and kind in forward[0], forward
    one = torch.ones((), dtype=f64 if dtype == f64 else f32, device="cuda")
    both = kernels_of(lambda: torch.autograd.grad(loss_of(name, case), case.students, one))
    backward = [x for x in both if kind not in x]
    assert len(both) - len(backward) == 1, both
    assert ["scale_rows" in x for x in backward] == [True], both


@pytest.mark.parametrize("n", (16384, 16385))
def test_a_large_batch_counts_its_rows_in_the_same_kernel(n):
    case = case_of("kd", n, 100, bf16)
    case.target[5::7] = -100
    seen = kernels_of(lambda: loss_of("kd", case))
    assert len(seen) == 1 and "fast_warps" in seen[0], seen
    _, terms = loss_of("kd", case, return_terms=True)
    assert terms["rows"] == (case.target >= 0).sum()


@pytest.mark.filterwarnings("ignore:kdfuse's")
def test_no_backend_named_takes_these():
    case = case_of("kd", 70, 100)
    seen = kernels_of(lambda: call("kd", case, **FULL["kd"]))
    assert len(seen) == 1 and "fast_blocks" in seen[0], seen


@pytest.mark.parametrize("denominator", (None, 7.5, "tensor"))
@pytest.mark.parametrize("name", NAMES)
def test_nothing_waits_for_the_device(name, denominator):
    case = case_of(name, 70, 100)
    if denominator == "tensor":
        denominator = torch.tensor(7.5, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for stored in (True, False):
            loss, _ = loss_of(
                name, case, denominator=denominator, return_terms=True, stored_gradient=stored
            )
            torch.autograd.grad(loss, case.students)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", WITH_TOP_K)
def test_top_k_teachers_wait_for_nothing(name):
    from test_sparse import lists

    case = cast(make(name, 70, 100), f32)
    case.teachers = [lists(case, 5, "spread")]
    case = to_gpu(case)
    case.students = [x.requires_grad_() for x in case.students]
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(loss_of(name, case), case.students)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_draws_wait_for_nothing_and_are_those_of_a_cpu():
    t, keys = torch.randn(70, 1000, generator=torch.Generator().manual_seed(0)), torch.arange(70)

    def drawn(t, keys):
        return SparseTeacher.sample(t, 40, temperature=2.0, keep=8, seed=keys, target=keys)

    want, t, keys = drawn(t, keys), t.cuda(), keys.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = drawn(t, keys)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.use_deterministic_algorithms(True)  # which refuses sums of floats along a row
    try:
        again = drawn(t, keys)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(again.indices, got.indices)
    assert torch.equal(got.indices.cpu(), want.indices)
    torch.testing.assert_close(got.values.cpu(), want.values, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", (f32, bf16, f64), ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_an_upstream_gradient_of_1_leaves_the_bits(name, dtype):
    case = case_of(name, 70, 100, dtype)
    stored = torch.autograd.grad(loss_of(name, case), case.students)
    made = torch.autograd.grad(loss_of(name, case, stored_gradient=False), case.students)
    assert all(torch.equal(a, b) for a, b in zip(stored, made, strict=True))


@pytest.mark.parametrize("factor", (1.0, -2.5, 0.0, "rows"))
@pytest.mark.parametrize("dtype", (f32, bf16, f64), ids=str)
@pytest.mark.parametrize("n, c, count", [(1, 3, 1), (5, 9, 3), (64, 1001, 2), (7, 40, 17)])
def test_scale(n, c, count, dtype, factor):
    torch.manual_seed(0)
    gradients = [torch.randn(n, c, device="cuda").to(dtype) for _ in range(count)]
    real = f64 if dtype == f64 else f32
    by = torch.randn(n, dtype=real) if factor == "rows" else torch.tensor(factor, dtype=real)
    want = [g.double() * (by.cuda()[:, None] if by.dim() else by.cuda()) for g in gradients]
    before = [g.clone() for g in gradients]
    torch.ops.kdfuse.scale_(gradients, by.cuda())
    if factor == 1:
        assert all(torch.equal(a, b) for a, b in zip(gradients, before, strict=True))
    relative = {bf16: 2.0**-8, f32: 2.0**-23, f64: 2.0**-52}[dtype]
    for g, w in zip(gradients, want, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=relative, atol=0.0)


@pytest.mark.parametrize("factor", (1.0, -2.5, 1e6, "rows"))
@pytest.mark.parametrize("n, c, count", [(1, 3, 1), (5, 9, 3), (64, 1001, 2), (7, 40, 17)])
def test_scale_to_half(n, c, count, factor):
    torch.manual_seed(0)
    gradients = [torch.randn(n, c, device="cuda") for _ in range(count)]
    by = torch.randn(n).cuda() if factor == "rows" else torch.tensor(factor).cuda()
    halves = torch.ops.kdfuse.scale_to_half(gradients, by)
    for g, half in zip(gradients, halves, strict=True):
        assert torch.equal(half, (g * (by[:, None] if by.dim() else by)).half())


def test_scale_leaves_out_what_it_must_not_touch():
    """The numbers before and behind the gradient, whose length no chunk divides."""
    whole = torch.full((4 + 5 * 9 + 3,), 3.0, device="cuda")
    gradient = whole[4:-3].view(5, 9)
    torch.ops.kdfuse.scale_([gradient], torch.tensor(2.0, device="cuda"))
    assert (gradient == 6).all() and (whole[:4] == 3).all() and (whole[-3:] == 3).all()


def test_a_second_backward_is_refused_once_the_gradients_are_scaled():
    case = case_of("kd", 9, 33)
    loss = loss_of("kd", case)
    torch.autograd.grad(loss, case.students, retain_graph=True)
    with pytest.raises(RuntimeError, match="stored_gradient=False"):
        torch.autograd.grad(loss, case.students)
    loss = loss_of("kd", case, stored_gradient=False)
    first = torch.autograd.grad(loss, case.students, retain_graph=True)
    assert torch.equal(first[0], torch.autograd.grad(loss, case.students)[0])


@pytest.mark.parametrize("stored", (True, False))
@pytest.mark.parametrize("name", NAMES)
def test_a_second_derivative_is_refused(name, stored):
    case = case_of(name, 9, 33)
    loss = loss_of(name, case, stored_gradient=stored)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, case.students, create_graph=True)


@pytest.mark.parametrize("stored", (True, False))
@pytest.mark.parametrize("name, n, c", [("kd", 4096, 1000), ("slkd", 4096, 1000), ("kd", 9, 99991)])
def test_memory_is_that_of_the_gradients(name, n, c, stored):
    case = case_of(name, n, c, bf16)
    torch.autograd.grad(loss_of(name, case, stored_gradient=stored), case.students)  # warm
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    made = torch.autograd.grad(loss_of(name, case, stored_gradient=stored), case.students)
    gradients = sum(g.numel() * g.element_size() for g in made)
    # The blocks' sums are 4096 doubles for each term.
    assert torch.cuda.max_memory_allocated() - before <= gradients + 2**20


FAR = 2**31 + 2**20


def needs(gigabytes: float) -> None:
    free = torch.cuda.mem_get_info()[0] / 1e9
    if free < gigabytes:
        pytest.skip(f"{free:.0f} GB of the device's memory are free, {gigabytes:.0f} are needed")


@pytest.mark.parametrize("c, teachers", [(1000, 1), (21848, 1), (1000, 2)])
def test_rows_may_lie_beyond_2_to_31_elements(c, teachers):
    needs(8 + 5 * teachers)
    case = to_gpu(cast(make("kd", 3, c, teachers=teachers), bf16))

    def apart(x):  # rows 0, 1 and 2 of which the last two stand far from the first
        whole = torch.empty(2 * (FAR // 2) + c, dtype=bf16, device="cuda")
        return whole.as_strided(x.shape, (FAR // 2, 1)).copy_(x)

    far = Case([apart(x) for x in case.students], [apart(x) for x in case.teachers], case.target)
    same_bits(run("kd", far, "cuda", **FULL["kd"]), run("kd", case, "cuda", **FULL["kd"]))


@pytest.mark.parametrize("teachers", (1, 2))
def test_gradients_may_have_more_than_2_to_31_elements(teachers):
    needs(12)
    few, rows, c = 16, 2**21 + 5, 1024
    case = to_gpu(cast(make("kd", 1, c, teachers=teachers), bf16))
    settings = {**FULL["kd"], "reduction": "sum", "backend": "cuda"}

    def gradient(n):
        student = case.students[0].expand(n, c).detach().requires_grad_()
        given = [x.expand(n, c) for x in case.teachers]
        loss = call("kd", Case([student], given, case.target.expand(n)), **settings)
        return loss.item() / n, torch.autograd.grad(loss, student)[0]

    loss, want = gradient(few)
    mean, made = gradient(rows)
    assert mean == pytest.approx(loss, rel=1e-6)
    for first in range(0, rows, 2**18):
        assert (made[first : first + 2**18] == want[0]).all()
