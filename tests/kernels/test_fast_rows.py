"""The CUDA kernels' rows in registers, and those that are read twice, on the host (host_rows.cpp):
the same numbers as the CPU ops, for rows of one type with labels.
"""

import shutil

import host_rows
import pytest
import torch
from calls import BITS, cast, make
from test_host_rows import check, settings_for

INF = float("inf")
NAMES = ("kd", "dkd", "nkd", "tf_nkd", "slkd")
WAYS = ("resident", "streamed", "held")
PAIRS = [(name, way) for name in NAMES for way in (WAYS if name != "slkd" else ("resident",))]
TYPES = (torch.float32, torch.bfloat16, torch.float16)
pytestmark = [
    pytest.mark.slow(20),
    pytest.mark.skipif(
        shutil.which("g++") is None and shutil.which("c++") is None, reason="no C++ compiler"
    ),
]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("c", (3, 8, 9, 31, 100, 1000, 1001))
@pytest.mark.parametrize("name, way", PAIRS)
def test_shapes(library, monkeypatch, name, way, c, dtype):
    """C odd: the rows lie on 16-byte boundaries in every way that there is."""
    case = cast(make(name, 9, c, seed=c), dtype)
    check(library, monkeypatch, name, case, settings_for(name, c), path=way)


@pytest.mark.parametrize("threads", (2, 3, 5))
@pytest.mark.parametrize("name, way", PAIRS)
def test_teams(library, monkeypatch, name, way, threads):
    case = cast(make(name, 9, 77), torch.bfloat16)
    upstream = torch.linspace(-3, 2, 9)
    check(
        library,
        monkeypatch,
        name,
        case,
        settings_for(name, 77),
        upstream=upstream,
        threads=threads,
        path=way,
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("c", (5, 64, 1001))
def test_kd_without_labels(library, monkeypatch, way, c):
    case = cast(make("kd", 9, c), torch.float32)
    case.target = None
    for threads in (1, 3):
        settings = {"temperature": 3.0, "kd_weight": 0.7}
        check(library, monkeypatch, "kd", case, settings, threads=threads, path=way)


@pytest.mark.parametrize("detach", (True, False))
@pytest.mark.parametrize("slts", (1, 2))
@pytest.mark.parametrize("threads", (1, 4))
def test_slts(library, monkeypatch, threads, slts, detach):
    case = cast(make("slkd", 7, 45, slts=slts), torch.float32)
    fusion = [1.0] if slts == 1 else [0.3, 0.7]
    settings = settings_for("slkd", 45, fusion=fusion, detach_slts=detach)
    check(library, monkeypatch, "slkd", case, settings, threads=threads, path="resident")


@pytest.mark.parametrize("name, way", PAIRS)
def test_rows_that_do_not_count(library, monkeypatch, name, way):
    case = cast(make(name, 9, 41), torch.float32)
    case.target[[0, 3, 8]] = -100
    for x in (*case.students, *case.teachers):
        x[3] = float("nan")
    for threads in (1, 3):
        check(library, monkeypatch, name, case, settings_for(name, 41), threads=threads, path=way)


def ties(x):
    x[:] = 1.5


def all_but_the_label(x):
    x[:, 1:] = -INF


def leading(x):
    x[:, :37] = -INF


def far(x):
    x += 10000.0


def peaked(x):
    x[:, 0] = 90.0


def climbing(x):
    x[:] = torch.arange(x.shape[1]).to(x) * 3.0


@pytest.mark.parametrize("threads", (1, 3))
@pytest.mark.parametrize("change", (ties, all_but_the_label, leading, far, peaked, climbing))
@pytest.mark.parametrize("name, way", PAIRS)
def test_hard_rows(library, monkeypatch, name, way, change, threads):
    case = cast(make(name, 8, 61), torch.float32)
    case.target[:] = torch.tensor([0, 0, 1, 30, 38, 59, 60, 60])
    for x in (*case.students, *case.teachers):
        change(x)
    check(library, monkeypatch, name, case, settings_for(name, 61), threads=threads, path=way)


@pytest.mark.parametrize("which", ("student", "teacher"))
@pytest.mark.parametrize("name, way", [p for p in PAIRS if p[0] != "tf_nkd"])
def test_one_side_masked(library, monkeypatch, name, way, which):
    case = cast(make(name, 8, 61), torch.float32)
    case.target[:] = 5
    for x in case.students if which == "student" else case.teachers:
        x[:, 20:40] = -INF
    for threads in (1, 3):
        check(library, monkeypatch, name, case, settings_for(name, 61), threads=threads, path=way)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_equal_rows_give_exactly_nothing(library, monkeypatch, way, dtype):
    case = cast(make("kd", 5, 99), dtype)
    case.teachers[0] = case.students[0].clone()
    students, teachers, target, params = host_rows.arguments(
        monkeypatch, "kd", case, temperature=4.0
    )
    loss, terms, (gradient,) = host_rows.run(
        library, "kd", students, teachers, target, params, reduction=1, threads=3, path=way
    )
    assert terms[0] == 0 and not gradient.any()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_ranks_with_ties(library, monkeypatch, way, dtype):
    """Few values, many ties: top-1 and top-5 need the order of classes, not of numbers alone."""
    torch.manual_seed(0)
    n, c = 200, 43
    z = torch.randint(-3, 4, (n, c)).to(dtype) / 4
    z[::7, 3:9] = -INF
    z[::11, 5] = -0.0
    z[::11, 6] = 0.0
    target = torch.randint(0, c, (n,))
    case = cast(make("tf_nkd", n, c), dtype)
    case.students[0], case.target = z, target
    check(library, monkeypatch, "tf_nkd", case, settings_for("tf_nkd", c), threads=3, path=way)


@pytest.mark.parametrize("factor", (1.0, -2.5, "rows"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
@pytest.mark.parametrize("n, c", ((1, 3), (5, 9), (4, 64)))
def test_gradients_are_scaled(library, n, c, dtype, factor):
    torch.manual_seed(0)
    gradient = torch.randn(n, c).to(dtype)
    by = torch.randn(n, dtype=torch.float64) if factor == "rows" else torch.tensor(factor)
    want = gradient.double() * (by[:, None] if factor == "rows" else by).double()
    host_rows.scale(library, gradient, by)
    near = torch.testing.assert_close
    near(gradient.double(), want, rtol=2.0 ** -BITS[dtype], atol=0.0)
