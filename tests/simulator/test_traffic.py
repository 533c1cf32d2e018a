"""The bytes that the kernels move, to the byte: those of README's table."""

import pytest
import torch
from calls import FULL, TAUGHT, WITH_TEACHER, WITH_TOP_K, arguments, cast, make
from sass import Kernel
from simulator import Gpu, device
from test_kernels import a_case

from kdfuse import SparseTeacher

pytestmark = pytest.mark.slow(15)
TYPES = (torch.bfloat16, torch.float16, torch.float32)


def moved(library, name, n, c, dtype, gpu="H100", **settings):
    case = cast(make(name, n, c), dtype)
    inputs = arguments(name, case, **{**FULL[name], **settings})
    of = device(gpu, processors=16 if c > 8000 else 2)
    return Gpu(library, of).run(name, *inputs)


def check(got, passes, n, c, dtype):
    """Each logit is read `passes` times and each gradient written once, 16 bytes at a time; singly
    a thread reads a label's logits and writes a label's gradient."""
    launch = got.launches[0]
    threads = 32 if "warps" in launch.kernel else launch.threads * launch.cluster
    size = 2 if dtype != torch.float32 else 4
    own = 2 if dtype == torch.bfloat16 else 4
    for name, traffic in got.traffic.items():
        kind = name.split()[0]
        if kind in ("student", "teacher"):
            assert traffic.read == passes * n * c * size, name
            assert traffic.read_singly == passes * n * threads * size, name
            assert traffic.written == traffic.written_singly == 0
        elif kind == "gradient":
            assert traffic.read == traffic.read_singly == 0
            assert (traffic.written, traffic.written_singly) == (n * c * own, n * own)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", TAUGHT)
def test_rows_in_registers_move_once(library, name, dtype):
    for n, c in [(20, 64), (20, 240), (4, 1024), (2, 8256 if name != "slkd" else 4160)]:
        got = moved(library, name, n, c, dtype)
        assert got.launches[0].kernel.split("-")[0] in (
            "fast_warps",
            "fast_blocks",
            "fast_clusters",
        )
        check(got, 1, n, c, dtype)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_mean_over_the_batch_reads_the_student_twice(library, dtype):
    for n, c in ((20, 64), (4, 1024)):
        check(moved(library, "tf_nkd", n, c, dtype), 2, n, c, dtype)


@pytest.mark.parametrize("name", TAUGHT)
def test_rows_read_twice_are_held_where_they_fit(library, name):
    """Of a GPU without clusters; 163 KiB hold 40,000 classes of two inputs in bfloat16."""
    held, beyond = (
        moved(library, name, 1, c, torch.bfloat16, gpu="A100") for c in (16_000, 45_008)
    )
    for got, passes, c in ((held, 1, 16_000), (beyond, 2, 45_008)):
        assert got.launches[0].kernel.startswith("fast_streams")
        for kind in ("student 0", "teacher 0"):
            assert got.traffic[kind].read == passes * c * 2
        assert got.traffic["gradient 0"].written == c * 2


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32), ids=str)
@pytest.mark.parametrize("name", WITH_TEACHER)
def test_rows_of_mixed_types_move_once(library, name, dtype):
    n, c = 6, 512  # of which a warp holds all five of SLKD
    teacher = torch.float32 if dtype != torch.float32 else torch.bfloat16
    case = cast(make(name, n, c), dtype, teacher)
    got = Gpu(library).run(name, *arguments(name, case, **FULL[name]))
    general = name == "slkd" or dtype == torch.float16
    assert got.launches[0].kernel.startswith("general" if general else "fast_blocks")
    own = dtype if dtype == torch.bfloat16 else torch.float32
    bytes_of = {"student": dtype.itemsize, "teacher": teacher.itemsize}
    for tensor, traffic in got.traffic.items():
        kind = tensor.split()[0]
        if kind in bytes_of:
            assert traffic.read == n * c * bytes_of[kind]
        elif kind == "gradient":
            assert traffic.written == n * c * own.itemsize


@pytest.mark.parametrize("variant", ("two", "soft"))
@pytest.mark.parametrize("dtype", ("bf16", "f32"))
def test_a_second_teacher_and_class_probabilities_move_once(library, dtype, variant):
    for n, c in ((20, 64), (4, 1024)):
        case, settings = a_case(Kernel("fast_blocks", "kd", dtype, variant), n, c)
        got = Gpu(library).run("kd", *arguments("kd", case, **settings))
        assert got.launches[0].kernel.endswith(variant)
        size = case.students[0].element_size()
        for tensor, traffic in got.traffic.items():
            if tensor.split()[0] in ("student", "teacher"):
                assert traffic.read == n * c * size, tensor
            elif tensor == "target" and variant == "soft":
                assert traffic.read == n * c * case.target.element_size()
            elif tensor.startswith("gradient"):
                assert traffic.written == n * c * size


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
@pytest.mark.parametrize("name", WITH_TOP_K)
def test_the_list_of_a_top_k_teacher_is_read_once_by_every_warp(library, name, dtype):
    for n, c in ((20, 64), (4, 1024), (2, 8256)):
        case = cast(make(name, n, c), dtype)
        wide = case.teachers[0].double()
        case.target[:] = wide.argmin(1)  # which is not listed
        top = SparseTeacher.top_k(wide, 20, temperature=4.0)
        students, _, target, params = arguments(name, case, **{**FULL[name], "temperature": 4.0})
        lists = {"indices": [top.indices], "masses": [top.mass]}
        values = top.values.half()
        gpu = Gpu(library, device("H100", processors=16))
        got = gpu.run(name, students, [values], target, params, **lists)
        launch = got.launches[0]
        warps = 1 if "warps" in launch.kernel else launch.threads // 32 * launch.cluster
        student, teacher = got.traffic["student 0"], got.traffic["teacher 0"]
        assert student.read == n * c * dtype.itemsize
        assert (teacher.read, teacher.read_singly) == (0, n * warps * 20 * values.itemsize)
        assert got.traffic["indices 0"].read_singly == n * warps * 20 * 8
        assert got.traffic["gradient 0"].written == n * c * dtype.itemsize


def test_scratch_is_a_few_numbers_a_block(library):
    got = moved(library, "kd", 20, 64, torch.bfloat16)
    blocks, columns = got.launches[0].blocks, 5
    scratch = got.traffic["scratch"]
    assert scratch.read + scratch.read_singly == 8 * blocks * columns
    assert scratch.written_singly == 8 * blocks * columns
