"""The CUDA kernels on a device: their numbers, on every path that rows take."""

import pytest
import torch
from calls import (
    FULL,
    NAMES,
    WITH_PROBABILITIES,
    WITH_TEACHER,
    WITH_TOP_K,
    Case,
    call,
    cast,
    make,
    probabilities,
)
from on_gpu import MARKS, RANKS, compare, run, same_bits, sorts, to_gpu

pytestmark = MARKS

INF = float("inf")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# A warp takes a row of up to 1024 classes in a large batch, a block up to 8192,
# a cluster up to some hundred thousand; longer ones are read twice, those of float16 are general.
CLASSES = (2, 3, 31, 100, 1000, 1001, 1024, 1025, 4096, 8000, 21841, 32000, 50257, 128256, 300000)


def rows_of(c: int) -> tuple[int, ...]:
    """From 1030 rows on a warp takes each, where it can."""
    return (1, 7, 70, 1030) if c <= 1025 else (1, 7) if c <= 32000 else (2,)


def unfit(name: str, c: int, dtype: torch.dtype) -> bool:
    """Whether the logits of `make` have ranks that this type does not tell apart."""
    return name == "uskd" and c > RANKS.get(dtype, c)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("c", CLASSES)
@pytest.mark.parametrize("name", NAMES)
def test_shapes(name, c, dtype):
    if name == "uskd" and not sorts(c, dtype):
        case = to_gpu(cast(make(name, 2, c), dtype))
        with pytest.raises(RuntimeError, match="backend='reference'"):
            call(name, case, backend="cuda", **FULL[name])
        return
    if unfit(name, c, dtype):
        pytest.skip(f"{dtype} does not tell so many ranks apart")
    for n in rows_of(c):
        compare(name, cast(make(name, n, c), dtype))
    if name == "kd":
        compare(name, cast(make(name, rows_of(c)[-1], c, teachers=2), dtype))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_many_rows(name, dtype):
    """More rows than all teams at a time, and than every block counts for itself."""
    case = cast(make(name, 20000, 100), dtype)
    case.target[::7] = -100
    same_bits(compare(name, case), run(name, to_gpu(case), "cuda", **FULL[name]))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("n, c", [(1030, 1000), (7, 4099), (3, 21841), (2, 300000)])
def test_kd_without_labels(n, c, dtype):
    case = cast(make("kd", n, c), dtype)
    case.target = None
    compare("kd", case, ce_weight=0.0)


@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@pytest.mark.parametrize("n, c", [(70, 100), (1030, 1000), (3, 21841)])
@pytest.mark.parametrize("name", NAMES)
def test_reductions_and_upstream_gradients(name, n, c, reduction):
    if name == "uskd" and not sorts(c, torch.float32):
        pytest.skip("too long for the sort")
    case = cast(make(name, n, c), torch.float32)
    upstream = torch.linspace(-3, 2, n) if reduction == "none" else torch.tensor(0.3)
    compare(name, case, upstream, reduction=reduction)
    compare(name, case, upstream, reduction=reduction, stored_gradient=False)


@pytest.mark.parametrize("stored", (True, False))
@pytest.mark.parametrize("reduction", ("mean", "none"))
@pytest.mark.parametrize("name", NAMES)
def test_float16_under_a_loss_scaler(name, reduction, stored):
    """Gradients below float16's smallest number survive until they are scaled."""
    n, c = 1030, 100
    case = cast(make(name, n, c), torch.float16)
    for x in (*case.students, *case.teachers):
        x *= 0.25 if name != "uskd" else 1
    above = torch.full((n,), 64.0) if reduction == "none" else torch.tensor(65536.0)
    got = compare(name, case, above, reduction=reduction, stored_gradient=stored)
    assert all(g.isfinite().all() and (g != 0).float().mean() > 0.9 for g in got[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("c", (33, 1001, 4096))
@pytest.mark.parametrize("name", WITH_PROBABILITIES)
def test_class_probabilities(name, c, dtype):
    if unfit(name, c, dtype):
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
@pytest.mark.parametrize("name", WITH_TEACHER)
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
@pytest.mark.parametrize("count", (1, 2, 3, 9))
@pytest.mark.parametrize("n, c", [(9, 33), (1030, 250), (9, 1000), (9, 4096), (3, 21841)])
def test_several_slts(n, c, count, detach):
    case = cast(make("slkd", n, c, slts=count), torch.float32)
    compare("slkd", case, fusion=[1 / count] * count, detach_slts=detach)


@pytest.mark.parametrize("rest", ("spread", "drop", "zero"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n, c, k", [(9, 33, 5), (1030, 1000, 64), (7, 4099, 100), (2, 50257, 8)])
@pytest.mark.parametrize("name", WITH_TOP_K)
def test_top_k_teachers(name, n, c, k, dtype, rest):
    from test_sparse import lists

    case = cast(make(name, n, c), dtype)
    case.teachers = [lists(case, k, rest)]
    compare(name, case)


@pytest.mark.parametrize("c", (33, 1000))
def test_a_top_k_teacher_beside_whole_ones(c):
    from test_sparse import lists

    case = cast(make("kd", 70, c, teachers=2), torch.float32)
    sparse = lists(Case(case.students, case.teachers[1:], case.target), 7, "spread")
    case.teachers = [case.teachers[0], sparse]
    compare("kd", case, teacher_weights=[0.25, 0.75])


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


@pytest.mark.parametrize("n, c", [(9, 33), (9, 1001), (600, 250), (9, 4096), (3, 21841)])
@pytest.mark.parametrize(
    "change", (masked, labels_masked, ties, far, ignored, all_ignored), ids=lambda f: f.__name__
)
@pytest.mark.parametrize("name", NAMES)
def test_hard_rows(name, change, n, c):
    if name == "uskd" and not sorts(c, torch.float64):
        pytest.skip("too long for the sort in double")
    # In double: float32 rounds the ranks of tied and far keys its own way.
    case = cast(make(name, n, c), torch.float64 if name == "uskd" else torch.float32)
    change(case)
    compare(name, case)


def placed(x, offset, width):
    whole = torch.full((len(x), width), float("nan"), dtype=x.dtype)
    whole[:, offset : offset + x.shape[1]] = x
    return whole[:, offset : offset + x.shape[1]]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("offset, wider", [(0, 3), (1, 8), (3, 11), (5, 16)])
@pytest.mark.parametrize("n, c", [(9, 1000), (600, 1000), (5, 8000), (3, 32000)])
@pytest.mark.parametrize("name", NAMES)
def test_strides_and_offsets(name, n, c, offset, wider, dtype):
    """Where all lie alike on 16-byte boundaries, and where only some do."""
    c = 250 if name == "uskd" else c
    case, width = cast(make(name, n, c), dtype), c + wider
    students = [placed(x, offset, width) if k % 2 == 0 else x for k, x in enumerate(case.students)]
    teachers = [placed(x, offset, width) for x in case.teachers]
    compare(name, Case(students, case.teachers, case.target))
    compare(name, Case(case.students, teachers, case.target))
    alike = [placed(x, offset, width) for x in case.students]
    compare(name, Case(alike, teachers, case.target))


@pytest.mark.parametrize("name", NAMES)
def test_no_rows(name):
    compare(name, cast(make(name, 0, 33), torch.float32), reduction="sum")


@pytest.mark.parametrize("name", ("kd", "dkd"))
@pytest.mark.parametrize("n, c", [(33, 100), (1030, 1000), (33, 4099), (3, 21841), (2, 300000)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_logits_give_exactly_zero(name, n, c, dtype):
    case = cast(make(name, n, c), dtype)
    case = to_gpu(Case([case.teachers[0].clone()], [case.teachers[0]], case.target))
    loss, _, gradients = run(name, case, "cuda", **{**FULL[name], "ce_weight": 0.0})
    assert loss == 0 and not gradients[0].any()


@pytest.mark.parametrize("n, c", [(1030, 100), (70, 1000), (33, 8000), (33, 21841), (5, 300000)])
@pytest.mark.parametrize("name", NAMES)
def test_same_bits_every_time(name, n, c):
    if name == "uskd" and not sorts(c, torch.float32):
        pytest.skip("too long for the sort")
    case = to_gpu(cast(make(name, n, c), torch.float32))
    same_bits(*(run(name, case, "cuda", **FULL[name]) for _ in range(2)))
