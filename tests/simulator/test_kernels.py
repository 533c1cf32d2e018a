"""Every CUDA kernel, executed on the simulated GPU: right values, and nothing that a GPU would not
forgive. Which kernel a call takes is the launcher's choice, so that one is tested with it.
"""

import pytest
import sass
import simulator
import torch
from calls import FULL, PAIR, Case, arguments, cast, compare, make, probabilities
from sass import Kernel
from simulator import Gpu, device
from test_cuda_build import the_table

pytestmark = pytest.mark.slow(90)

TYPES = {"f32": torch.float32, "f64": torch.float64, "bf16": torch.bfloat16, "f16": torch.float16}
# The teachers' types beside students of another, at odd numbers of classes and at even ones.
OTHER = {("bf16", 1): torch.float32, ("bf16", 0): torch.float16}
OTHER |= {("f32", 1): torch.bfloat16, ("f32", 0): torch.float16}
SEEDS = 3
# Classes that lie on 16-byte boundaries in every way, of few and of many rows.
WARPS = [(9, 33), (12, 64), (17, 201)]
BLOCKS = [(2, 7), (5, 1001)]
ANY_WARPS, ANY_BLOCKS = [(9, 33), (6, 200)], [(3, 1101), (2, 2600)]
LONG = {"slkd": {"f32": 2100, "bf16": 4200, "f16": 4200}}


def sizes(kernel: Kernel) -> list[tuple[int, int]]:
    long = LONG.get(kernel.loss, {}).get(kernel.type, 8250)
    if kernel.type == "f64":
        return [(9, 33), (3, 300)]
    return {
        "fast_warps": WARPS,
        "fast_blocks": [*BLOCKS, (17, 700 if kernel.loss == "slkd" else 1500)],
        "fast_clusters": [(3, long), (2, 2 * long + 3), (2, 4 * long - 8)],
        "fast_streams": [(3, 8251), (2, 8320), (1, 45003)],
        "general_warps": ANY_WARPS,
        "general_blocks": ANY_BLOCKS,
    }[kernel.kind]


def of_device(kernel: Kernel) -> simulator.Device:
    # Rows that are read twice: of a GPU without clusters, and where even 16 blocks do not hold one.
    name = "A100" if kernel.kind == "fast_streams" and kernel.loss != "tf_nkd" else "H100"
    return device(name, processors=16 if kernel.kind == "fast_clusters" else 2)


def a_case(kernel: Kernel, n: int, c: int) -> tuple[Case, dict]:
    """That the launcher sends to this kernel."""
    slts = int(kernel.variant) if kernel.variant in ("1", "2") else 2
    settings = {**FULL[kernel.loss], **(PAIR.get(kernel.loss, {}) if c == 2 else {})}
    if kernel.loss == "slkd":
        settings["fusion"] = [1.0] if slts == 1 else [0.25, 0.75]
    teachers = 2 if kernel.variant == "two" else 1
    if teachers == 2:
        settings["teacher_weights"] = [0.25, 0.75]
    case = make(kernel.loss, n, c, seed=c, slts=slts, teachers=teachers)
    if kernel.kind.startswith("general") and kernel.type != "f64":
        case = cast(case, torch.bfloat16, torch.float32)
        case.students = [spaced(x) for x in case.students]  # rows that lie apart
    else:
        other = OTHER[kernel.type, c % 2] if kernel.variant == "mixed" else None
        case = cast(case, TYPES[kernel.type], other)
    if kernel.variant == "bare":
        case.target, settings["ce_weight"] = None, 0.0
    elif kernel.variant == "soft":
        case.target = probabilities(n, c).to(torch.bfloat16 if c % 2 else torch.float32)
    elif n > 4:
        case.target[3] = -100
    return case, settings


def spaced(x: torch.Tensor) -> torch.Tensor:
    """The same rows, 3 elements apart."""
    return torch.cat([x, torch.full((len(x), 3), torch.nan, dtype=x.dtype)], 1)[:, : x.shape[1]]


def upstream_of(n: int) -> torch.Tensor:
    """Powers of two, by which bfloat16 gradients are not rounded again."""
    return torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.25, 1.0, 4.0]).double().repeat(n // 7 + 1)[:n]


@pytest.mark.parametrize("kernel", sorted(the_table(), key=str), ids=str)
def test_kernel(library, kernel, request):
    """A schedule for each size; with --long several."""
    every = request.config.getoption("--long")
    for at, (n, c) in enumerate(sizes(kernel)):
        case, settings = a_case(kernel, n, c)
        upstream = upstream_of(n)
        inputs = arguments(kernel.loss, case, **settings)
        for seed in range(SEEDS) if every and c < 10_000 else (at,):
            gpu = Gpu(library, of_device(kernel), seed)
            got = gpu.run(kernel.loss, *inputs, upstream=upstream)
            assert [launch.kernel for launch in got.launches] == [str(kernel)]
            types = [x.dtype for x in case.students]
            gradients = [g.to(t) for g, t in zip(got.gradients, types, strict=True)]
            compare(kernel.loss, case, upstream, got.loss, gradients, **settings)


def test_the_simulated_table_is_the_shipped_one(library):
    assert {str(kernel) for kernel in the_table()} == set(Gpu(library).kernels.values())


@pytest.mark.parametrize("name", sass.LOSSES)
@pytest.mark.parametrize("reduction", ("mean", "sum"))
def test_reductions(library, name, reduction):
    """Over several blocks, whose sums meet at the end."""
    case = cast(make(name, 23, 40), torch.float32)
    case.target[::5] = -100
    inputs = arguments(name, case, **FULL[name])
    rows = Gpu(library).run(name, *inputs)
    valid = int((case.target >= 0).sum())
    seven = torch.tensor(7.5)
    for by in ({}, {"divisor": 7.5}, {"denominator": seven}, {"denominator": seven.double()}):
        for seed in range(SEEDS):
            got = Gpu(library, seed=seed).run(name, *inputs, reduction=reduction, **by)
            n = 1.0 if reduction == "sum" else 7.5 if by else valid
            assert len(got.launches) == 1
            torch.testing.assert_close(got.loss.double(), rows.loss.double().sum() / n)
            assert got.terms[-1] == valid
            for a, b in zip(got.gradients, rows.gradients, strict=True):
                torch.testing.assert_close(a, b / n)


@pytest.mark.parametrize(
    "name", ("kd", *(pytest.param(name, marks=pytest.mark.long) for name in ("tf_nkd", "uskd")))
)
def test_many_rows_are_counted_by_all_blocks(library, name):
    """Also before a mean over the batch."""
    n = 16_400
    case = cast(make(name, n, 5), torch.float32)
    case.target[7::1000] = -100
    inputs = arguments(name, case, **FULL[name])
    got = Gpu(library).run(name, *inputs, reduction="mean")
    assert [launch.together for launch in got.launches] == [True]
    assert got.terms[-1] == (case.target >= 0).sum()


@pytest.mark.parametrize("name", sass.LOSSES)
def test_a_label_outside_the_classes_stops_the_kernel(library, name):
    case = cast(make(name, 9, 33), torch.float32)
    case.target[4] = 33
    inputs = arguments(name, case, **FULL[name])
    with pytest.raises(simulator.Failed, match=r"target outside the classes.*\(grid.h:\d+\)"):
        Gpu(library).run(name, *inputs)


def test_without_gradient_nothing_is_written_but_the_numbers(library):
    case = cast(make("kd", 9, 33), torch.float32)
    inputs = arguments("kd", case, **FULL["kd"])
    got = Gpu(library).run("kd", *inputs, with_gradient=False)
    written = {k for k, x in got.traffic.items() if x.written or x.written_singly}
    assert written == {"loss", "terms", "scratch"}


@pytest.mark.parametrize("each", (False, True), ids=("one factor", "a factor a row"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
def test_scale(library, dtype, each):
    n, c = 7, 37
    random = torch.Generator().manual_seed(0)
    stored = [torch.randn(n, c, generator=random).to(dtype) for _ in range(3)]
    factor = upstream_of(n).float() if each else torch.tensor(0.5)
    expected = [g * (factor[:, None] if each else factor).to(dtype) for g in stored]
    Gpu(library).scale(stored, factor)
    for a, b in zip(stored, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("factor", (0.5, 1.0, 1e5, "a factor a row"))
def test_scale_to_half(library, factor):
    """Each gradient is read once and each half written once, whatever the factor is."""
    n, c = 7, 37
    stored = [torch.randn(n, c, generator=torch.Generator().manual_seed(k)) for k in range(3)]
    by = upstream_of(n).float() if isinstance(factor, str) else torch.tensor(factor)
    halves = [torch.empty(n, c, dtype=torch.float16) for _ in stored]
    kept = [x.clone() for x in stored]
    got = Gpu(library).scale(stored, by, halves)
    for half, x, before in zip(halves, stored, kept, strict=True):
        assert torch.equal(half, (before * (by[:, None] if by.dim() else by)).half())
        assert torch.equal(x, before)
    for k in range(3):
        of, to = got.traffic[f"written {k}"], got.traffic[f"half {k}"]
        assert of.read + of.read_singly == n * c * 4 and of.written == of.written_singly == 0
        assert to.written + to.written_singly == n * c * 2


def test_a_factor_of_1_moves_nothing(library):
    gradient = torch.randn(9, 40)
    got = Gpu(library).scale([gradient], torch.tensor(1.0))
    assert got.traffic["written 0"] == simulator.Traffic(0, 0, 0, 0)
