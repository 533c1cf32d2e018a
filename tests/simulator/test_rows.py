"""Rows of every kind through the launcher's own choice of kernel, against the ops on the CPU."""

from dataclasses import replace

import pytest
import torch
from asked import REDUCTIONS
from calls import (
    FULL,
    NAMES,
    NO_TEACHER,
    PAIR,
    TAUGHT,
    WITH_PROBABILITIES,
    WITH_TEACHER,
    WITH_TOP_K,
    Case,
    arguments,
    cast,
    make,
    probabilities,
)
from simulator import Gpu, device
from test_cuda_build import the_table
from test_kernels import SEEDS, a_case, of_device, sizes

import kdfuse
from kdfuse.kernels import backends
from kdfuse.kernels.table import OPS

INF = float("inf")
pytestmark = [
    pytest.mark.slow(60),
    pytest.mark.skipif(
        backends.compiled()[0] is None,
        reason=f"no CPU ops to compare with: {backends.compiled()[1]}",
    ),
]
# Rows of few classes: a warp each, where there are many beside the multiprocessors, else a block.
WAYS = {"warps": device(processors=1), "blocks": device(processors=64), "streams": device("A100")}
ways = pytest.mark.parametrize("way", ("warps", "blocks"))


def settings_for(name, c, **more):
    return {**FULL[name], **(PAIR.get(name, {}) if c == 2 else {}), **more}


def check(library, name, case, settings, way="warps", *, reduction="none", seed=0):
    students, teachers, target, params = arguments(name, case, **settings)
    op = getattr(torch.ops.kdfuse, name).default
    number = REDUCTIONS.index(reduction)
    true = op(students, teachers, [], [], target, None, None, None, params, number, -100, True)
    gpu = Gpu(library, WAYS[way], seed)
    got = gpu.run(name, students, teachers, target, params, reduction=reduction)
    wide = torch.float64 in [x.dtype for x in (*students, *teachers)]
    for what, a, b in (("loss", got.loss, true[0]), ("terms", got.terms, true[1])):
        near(a, b, f"{name} {what}", 1e-12 if wide else 3e-5, 1e-12 if wide else 1e-5)
    assert len(got.gradients) == len(true[2])
    # Differences of logits carry the rounding of the logits.
    largest = max(x[x.isfinite()].abs().max().item() for x in (*students, *teachers))
    for k, (a, b) in enumerate(zip(got.gradients, true[2], strict=True)):
        step = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 8e-3}[a.dtype]
        least = 1e-12 if wide else 1e-6 + 1e-7 * largest
        near(a.double(), b.double(), f"{name} gradient {k}", step, least)
    return got


def near(a, b, what, relative, absolute):
    torch.testing.assert_close(
        a, b, rtol=relative, atol=absolute, equal_nan=True, msg=lambda m: f"{what}: {m}"
    )


@ways
@pytest.mark.parametrize("c", (2, 3, 7, 8, 9, 31, 33, 100, 1001))
@pytest.mark.parametrize("name", NAMES)
def test_shapes(library, name, c, way):
    """Odd C: the rows lie on 16-byte boundaries in every way that there is."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        check(library, name, cast(make(name, 9, c, seed=c), dtype), settings_for(name, c), way)


@ways
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("name", WITH_PROBABILITIES)
def test_class_probabilities(library, name, dtype, way):
    case = cast(make(name, 9, 33), dtype)
    case.target = probabilities(9, 33).to(dtype)
    check(library, name, case, settings_for(name, 33), way)
    # Not only two classes, and not only labels with the highest logits.
    case.target = torch.softmax(torch.arange(9 * 33).reshape(9, 33).double().sin(), 1).to(dtype)
    check(library, name, case, settings_for(name, 33), way)
    # Of any sum; of two that are as likely the lower class is the label.
    case.target = case.target * torch.linspace(0.3, 1.5, 9)[:, None].to(dtype)
    check(library, name, case, settings_for(name, 33), way)
    case.target = torch.zeros(9, 33, dtype=dtype)
    case.target[:, 5:7] = 0.5
    case.students[0][::2, 5], case.students[0][1::2, 6] = 9.0, 9.0
    check(library, name, case, settings_for(name, 33), way)


@ways
@pytest.mark.parametrize("name", NO_TEACHER)
def test_a_teacher_without_weight_may_hold_anything(library, name, way):
    case = cast(make(name, 9, 33), torch.float32)
    case.teachers[0][::3], case.teachers[0][1::3] = float("nan"), INF
    got = check(library, name, case, settings_for(name, 33, **NO_TEACHER[name]), way)
    assert got.loss.isfinite().all() and all(g.isfinite().all() for g in got.gradients)


@ways
@pytest.mark.parametrize("value", (float("nan"), INF, -INF))
def test_the_others_of_dkd_do_not_see_a_teachers_label(library, value, way):
    case = cast(make("dkd", 9, 33), torch.float32)
    case.teachers[0].scatter_(1, case.target[:, None], value)
    got = check(library, "dkd", case, settings_for("dkd", 33, alpha=0.0), way)
    assert got.loss.isfinite().all() and got.gradients[0].isfinite().all()


@ways
@pytest.mark.parametrize("value", (float("nan"), INF))
@pytest.mark.parametrize("name", [n for n in WITH_PROBABILITIES if not OPS[n].needs_target])
def test_class_probabilities_without_cross_entropy_may_hold_anything(library, name, value, way):
    case = cast(make(name, 9, 33), torch.float32)
    case.target = probabilities(9, 33).float()
    case.target[::2, 5] = value
    got = check(library, name, case, settings_for(name, 33, ce_weight=0.0), way)
    assert got.loss.isfinite().all() and got.gradients[0].isfinite().all()


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
@pytest.mark.parametrize("name", NAMES)
def test_types(library, name, student, teacher):
    for c in (37, 1200):
        check(library, name, cast(make(name, 6, c), student, teacher), settings_for(name, c))


@pytest.mark.parametrize("count", (1, 2, 3, 5))
def test_several_teachers(library, count):
    weights = [0.0 if k == 1 else 1.0 / (k + 1) for k in range(count)]
    for c in (33, 1200):
        case = cast(make("kd", 6, c, teachers=count), torch.float32)
        for more in ({}, {"teacher_weights": weights}):
            check(library, "kd", case, settings_for("kd", c, **more))


@ways
@pytest.mark.parametrize("count", (1, 2, 3))
@pytest.mark.parametrize("detach", (True, False))
def test_several_slts(library, detach, count, way):
    case = cast(make("slkd", 9, 45, slts=count), torch.float32)
    fusion = [(k + 1) * 2 / (count * (count + 1)) for k in range(count)]
    check(library, "slkd", case, settings_for("slkd", 45, fusion=fusion, detach_slts=detach), way)


@pytest.mark.parametrize("rest", ("spread", "drop"))
@pytest.mark.parametrize("k", (1, 7, 40))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
@pytest.mark.parametrize("name", WITH_TOP_K)
def test_top_k_teachers(library, name, dtype, k, rest):
    """Beside a whole teacher for kd; the first label is listed, the last one is not."""
    case = cast(make(name, 9, 41, teachers=2), dtype)
    wide = case.teachers[0].double()
    wide += torch.arange(9)[:, None] * 400.0  # some rows far from 0
    wide[1, 3:] = -torch.inf  # so that classes at -inf are listed
    top = kdfuse.SparseTeacher.top_k(wide, k, temperature=2.0, rest=rest)
    case.target[0], case.target[-1] = top.indices[0, 0], wide[-1].argmin()
    top = replace(top, values=top.values.to(dtype))
    check_top_k(
        Gpu(library, WAYS["warps"]), name, case, top, settings_for(name, 41, temperature=2.0)
    )


def check_top_k(gpu, name, case, top, settings):
    """The first teacher as its list `top`."""
    students, teachers, target, params = arguments(name, case, **settings)
    teachers = [top.values, *teachers[1:]]
    empty, mass = torch.empty(0, dtype=torch.int64), top.mass
    indices = [top.indices, empty][: len(teachers)]
    masses = [torch.empty(0) if mass is None else mass, torch.empty(0)][: len(teachers)]
    true = getattr(torch.ops.kdfuse, name).default(
        students, teachers, indices, masses, target, *[None] * 3, params, 0, -100, True
    )
    more = {"indices": indices, "masses": masses}
    got = gpu.run(name, students, teachers, target, params, **more)
    dtype = students[0].dtype
    loose = 1e-11 if dtype == torch.float64 else 1e-4
    near(got.loss, true[0], "loss", loose, loose)
    near(got.terms, true[1], "terms", loose, loose)
    step = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 8e-3}[dtype]
    near(got.gradients[0].double(), true[2][0].double(), "gradient", step, min(step, 1e-5))
    return got


LISTED = [k for k in the_table() if k.variant in ("mixed", "soft") and k.loss in WITH_TOP_K]


@pytest.mark.parametrize("kernel", sorted(LISTED, key=str), ids=str)
def test_the_list_of_a_top_k_teacher_takes_the_place_of_its_row(library, kernel):
    """In the fast rows: of fewer entries than a warp has lanes and of more, labels among them and
    not, of rows near 0 and far from it; a row without a label may list anything."""
    for k, (n, c) in zip((1, 20, 50, 5), sizes(kernel), strict=False):
        case, settings = a_case(kernel, n, c)
        wide = case.teachers[0].double() + torch.arange(n)[:, None] * 300.0
        wide[-1, 4:] = -torch.inf  # so that classes at -inf are listed
        top = kdfuse.SparseTeacher.top_k(wide, min(k, c - 1), temperature=settings["temperature"])
        if kernel.variant != "soft":
            case.target[0], case.target[-1] = top.indices[0, -1], wide[-1].argmin()
            top.indices[case.target == -100] = 10**12
        values = top.values.to(torch.float32 if c % 2 else torch.float16)
        top = replace(top, values=values)
        for seed in range(SEEDS if c < 10_000 else 1):
            got = check_top_k(
                Gpu(library, of_device(kernel), seed), kernel.loss, case, top, settings
            )
            assert [launch.kernel for launch in got.launches] == [str(kernel)]
            assert "teacher 0" in got.traffic and not got.traffic["teacher 0"].written


@pytest.mark.parametrize("temperature", (0.5, 1.0, 2.0, 7.5))
@pytest.mark.parametrize("name", WITH_TEACHER)
def test_temperatures(library, name, temperature):
    case = cast(make(name, 9, 33), torch.float32)
    check(library, name, case, settings_for(name, 33, temperature=temperature))


@ways
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_ignored_rows(library, name, reduction, way):
    case = cast(make(name, 9, 33), torch.float32)
    case.target[::3] = -100
    for x in (*case.students, *case.teachers):
        x[0] = float("nan")  # an ignored row may hold anything
    check(library, name, case, settings_for(name, 33), way, reduction=reduction)
    case.target[:] = -100
    check(library, name, case, settings_for(name, 33), way, reduction=reduction)


def students_masked(case):
    for x in (*case.students, *case.teachers):
        x[:, 3:20] = -INF


def teachers_masked(case):
    for x in case.teachers:
        x[:, :17] = -INF


def labels_masked(case):
    for x in case.students:
        x[torch.arange(len(x)), case.target] = -INF


def label_alone(case):
    for x in (*case.students, *case.teachers):
        kept = x[torch.arange(len(x)), case.target].clone()
        x[:] = -INF
        x[torch.arange(len(x)), case.target] = kept


def ties(case):
    for x in (*case.students, *case.teachers):
        x.copy_(x.sign())


def far(case):
    for x in (*case.students, *case.teachers):
        x += 1e4


def saturated(case):
    for x in (*case.students, *case.teachers):
        x *= 100


def leading(case):
    for x in (*case.students, *case.teachers):
        x[:, : int(0.6 * x.shape[1])] = -INF


def peaked(case):
    for x in (*case.students, *case.teachers):
        x[:, 0] = 90.0


def climbing(case):
    for x in (*case.students, *case.teachers):
        x[:] = torch.linspace(0, 180, x.shape[1]).to(x)


@ways
@pytest.mark.parametrize(
    "change",
    (
        students_masked,
        teachers_masked,
        labels_masked,
        label_alone,
        ties,
        far,
        saturated,
        leading,
        peaked,
        climbing,
    ),
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("name", NAMES)
def test_hard_rows(library, name, change, way):
    # In double: float32 rounds the ranks of tied and far keys its own way.
    case = cast(make(name, 9, 33), torch.float64 if name == "uskd" else torch.float32)
    change(case)
    check(library, name, case, settings_for(name, 33), way)


@pytest.mark.parametrize("change", (label_alone, leading, peaked, climbing))
@pytest.mark.parametrize("name", (*TAUGHT, "tf_nkd"))
def test_hard_rows_that_are_read_twice(library, name, change):
    """Of a GPU without clusters: their peaks grow as they are read."""
    case = cast(make(name, 2, 8400), torch.float32)
    change(case)
    got = check(library, name, case, FULL[name], "streams")
    assert got.launches[0].kernel.startswith("fast_streams")


@pytest.mark.parametrize("name", (*TAUGHT, "tf_nkd"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_ranks_of_rows_that_are_read_twice(library, name, dtype):
    """Ties in the label's own chunk, and a label at -inf beside all that is."""
    case = cast(make(name, 8, 16_401), dtype)
    case.students[0][:], case.students[0][:, 4:6] = -1.0, 5.0
    case.target = torch.tensor([5, 4, 3, 5, 16_400, 6, 0, 5])
    got = check(library, name, case, FULL[name], "streams")
    assert got.launches[0].kernel.startswith("fast_streams")
    case.students[0][:], case.students[0][:, 0] = -INF, 2.0
    case.target = torch.tensor([3, 4, 5, 3, 1, 3, 4, 3])
    check(library, name, case, FULL[name], "streams")


@ways
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_ranks_with_ties(library, dtype, way):
    """Few values, many ties: top-1 and top-5 need the order of classes, not of numbers alone."""
    torch.manual_seed(0)
    n, c = 200, 43
    z = torch.randint(-3, 4, (n, c)).to(dtype) / 4
    z[::7, 3:9] = -INF
    z[::11, 5] = -0.0
    z[::11, 6] = 0.0
    case = Case([z], [], torch.randint(0, c, (n,)))
    check(library, "tf_nkd", case, settings_for("tf_nkd", c), way)


@pytest.mark.parametrize("rank", ("released", "paper"))
def test_ranks(library, rank):
    case = make("uskd", 9, 100)
    random = torch.Generator().manual_seed(0)
    case.students = [torch.randn(9, 100, generator=random).double() for _ in range(2)]
    check(library, "uskd", case, settings_for("uskd", 100, rank=rank))


@pytest.mark.parametrize("way", ("warps", "streams"))  # an H100, an A100
def test_ranks_of_rows_that_leave_no_room_beside_their_sort(library, way):
    case = cast(make("uskd", 1, 21841), torch.float32)
    check(library, "uskd", case, settings_for("uskd", 21841), way)


@pytest.mark.parametrize("name", NAMES)
def test_strides(library, name):
    def spaced(x):
        nan = torch.full((len(x), 5), float("nan"), dtype=x.dtype)
        return torch.cat([x, nan], 1)[:, : x.shape[1]]

    case = cast(make(name, 9, 33), torch.float32)
    students = [spaced(x) if k % 2 == 0 else x for k, x in enumerate(case.students)]
    case = Case(students, [spaced(x) for x in case.teachers], case.target)
    check(library, name, case, settings_for(name, 33))


@pytest.mark.parametrize("start", range(1, 9))
@pytest.mark.parametrize("name", NAMES)
def test_rows_that_begin_anywhere(library, name, start):
    """In the middle of their memory, whose bytes around them hold no numbers."""

    def moved(x):
        kept = torch.full((x.numel() + 32,), float("nan"), dtype=x.dtype)
        view = kept[start : start + x.numel()].view(x.shape)
        return view.copy_(x)

    case = cast(make(name, 9, 41), torch.bfloat16)
    case = Case([moved(x) for x in case.students], [moved(x) for x in case.teachers], case.target)
    check(library, name, case, settings_for(name, 41))


def test_one_row_for_all(library):
    """A teacher's row that stands for every student's: each may be the last of its memory."""
    n, c, start = 9, 40, 3

    def shifted(x):
        """All alike on 16-byte boundaries: one kernel takes them."""
        return torch.cat([x.new_empty(start), x.flatten()])[start:].view(x.shape)

    case = cast(make("kd", n, c), torch.bfloat16)
    row, students = shifted(case.teachers[0][0]), [shifted(case.students[0])]
    teachers, copies = [row.expand(n, c)], [shifted(row.expand(n, c))]
    _, _, target, params = arguments("kd", case, **FULL["kd"])
    got, true = (
        Gpu(library).run("kd", students, x, target, params, with_gradient=False)
        for x in (teachers, copies)
    )
    assert got.launches == true.launches and got.launches[0].kernel.startswith("fast_")
    assert torch.equal(got.loss, true.loss)


@ways
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("name", ("kd", "dkd", "slkd"))
def test_equal_logits_give_exactly_zero(library, name, dtype, way):
    case = cast(make(name, 9, 100), dtype)
    same = case.teachers[0]
    case = Case([same.clone() for _ in case.students], [same], case.target)
    settings = settings_for(name, 100, ce_weight=0.0)
    if name == "slkd":
        settings |= {"fused_ce_weight": 0.0, "detach_slts": True}
    upstream = torch.full((9,), 0.3, dtype=torch.float64)
    got = Gpu(library, WAYS[way]).run(name, *arguments(name, case, **settings), upstream=upstream)
    gradients = got.gradients
    if name == "slkd":  # the student learns from two teachers, whose parts are rounded apart
        assert gradients[0].abs().max() < 1e-6
        gradients = gradients[1:]
    assert not got.loss.any()
    assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("with_gradient", (True, False))
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_no_rows(library, name, reduction, with_gradient):
    case = cast(make(name, 0, 33), torch.float32)
    got = Gpu(library).run(
        name,
        *arguments(name, case, **FULL[name]),
        reduction=reduction,
        with_gradient=with_gradient,
    )
    assert not got.loss.any() and not got.terms.any() and len(got.launches) == 1


def test_no_rows_have_nothing_to_scale(library):
    """Autograd brings a factor of no elements, at no address."""
    got = Gpu(library).scale([torch.empty(0, 33)], torch.empty(0))
    assert got.launches == []
