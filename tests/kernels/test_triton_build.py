"""What can be said of the Triton kernels without a device: the code that they compile to, and how
they are launched. Their arithmetic is tested in test_triton.py."""

import functools
import importlib.util
from collections import defaultdict

import pytest
import torch
from calls import FULL, NAMES, TAUGHT, WITH_TOP_K, Case, arguments, cast, make

from kdfuse.kernels.table import OPS
from kdfuse.kernels.triton import lang as triton_lang

if triton_lang.MISSING or importlib.util.find_spec("triton.backends.nvidia") is None:
    pytest.skip("no triton for NVIDIA", allow_module_level=True)

import triton_aot
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from kdfuse.kernels.triton import call as triton_call
from kdfuse.kernels.triton import launch as triton_launch
from kdfuse.kernels.triton import ops as triton_ops
from kdfuse.kernels.triton.batch import count_rows
from kdfuse.kernels.triton.self_taught import scores
from kdfuse.kernels.triton.slkd import slkd_rows
from kdfuse.kernels.triton.taught import taught_rows
from kdfuse.kernels.triton.tf_nkd import tf_nkd_rows
from kdfuse.kernels.triton.uskd import LONGEST, uskd_rows

pytestmark = pytest.mark.slow(100)

INPUTS = {**dict.fromkeys(TAUGHT, 2), "tf_nkd": 1, "uskd": 2, "slkd": 4}
GRADIENTS = {"uskd": 2, "slkd": 3}
# Of 65536 in a multiprocessor: at 128 threads a block 64 let 8 blocks run beside each other.
REGISTERS = {"kd": 64, "dkd": 80, "nkd": 80, "wttm": 80, "tf_nkd": 80, "uskd": 128, "slkd": 192}
# Rows that are held, of each type; rows in tiles, that 8 classes at a time divide and that they do
# not, of a type each.
HALF, SINGLE = torch.bfloat16, torch.float32
TILED = [name for name in NAMES if name != "uskd"]
# dkd, nkd and wttm are kd's kernel with a few lines of their own: of them one type.
LIKE_KD = ("dkd", "nkd", "wttm")


def longer(rows, of):
    """The rows, of which those that `of` chooses are for --long."""
    return [pytest.param(*row, marks=[pytest.mark.long] if of(*row) else []) for row in rows]


def again(name, *row):
    return name in LIKE_KD and row[-1] == SINGLE


TILES = [(name, *row) for name in TILED for row in ((32000, HALF), (21841, SINGLE))]
ROWS = [(name, 1000, dtype) for name in NAMES for dtype in (HALF, SINGLE)] + TILES
ROWS += [("kd", 100, HALF), ("slkd", 100, HALF), ("uskd", LONGEST, SINGLE)]
# sm_90 for every loss; its neighbours for those of the least and of the most code.
ARCHS = [(name, dtype, 90) for name in NAMES for dtype in (HALF, SINGLE)]
ARCHS += [(name, *at) for name in ("kd", "uskd", "slkd") for at in ((HALF, 80), (SINGLE, 100))]
KERNELS = (count_rows, taught_rows, scores, tf_nkd_rows, uskd_rows, slkd_rows)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "triton"))


def inputs_of(name, case, **more):
    """What the op of a call is given, reduced to its mean."""
    students, teachers, target, params = arguments(name, case, **{**FULL[name], **more})
    return (students, teachers, [], [], target, None, None, None, params, 1, -100, True)


def zeros(name, n, c, dtype):
    case = make(name, 1, 2)

    def like(xs):
        return [torch.zeros(n, c, dtype=dtype) for _ in xs]

    return Case(like(case.students), like(case.teachers), torch.zeros(n, dtype=torch.int64))


@functools.cache
def compiled(name, c, dtype, arch):
    """The code of every launch of a call, the rows' last."""
    with pytest.MonkeyPatch.context() as patch:
        inputs = inputs_of(name, zeros(name, 4, c, dtype))
        launches = triton_aot.launches(patch, name, *inputs)
    return [triton_aot.Code(triton_aot.compile_for(arch, *launch)) for launch in launches]


@pytest.mark.parametrize("name, c, dtype", longer(ROWS, again), ids=str)
def test_rows_stay_in_registers(name, c, dtype):
    for code in compiled(name, c, dtype, 90):
        assert code.stack == 0 and code.count("LDL|STL") == 0
        assert code.registers <= REGISTERS[name]


@pytest.mark.parametrize(
    "name, dtype, arch",
    longer(ARCHS, lambda name, dtype, arch: again(name, dtype) or (arch != 90 and name != "slkd")),
    ids=str,
)
def test_1000_classes_move_in_16_bytes(name, dtype, arch):
    """8 classes a thread: one access of bfloat16, two of float32; each exponential is made once."""
    *_, code = compiled(name, 1000, dtype, arch)
    assert code.stack == 0 and code.count("LDL|STL") == 0
    wide = 1 if dtype == torch.bfloat16 else 2
    inputs, gradients = INPUTS[name], GRADIENTS.get(name, 1)
    assert code.count(r"LDG\.E\.(\w+\.)*128") >= wide * inputs
    assert code.count(r"STG\.E\.(\w+\.)*128") == wide * gradients
    if name in (*TAUGHT, "tf_nkd"):
        # Of either input at its temperature, and at 1 of the student and where it is read of the
        # teacher; those of scalars.
        op = OPS[name]
        of_row = 3 + op.teacher_at_1 - op.student_at_1 if name != "tf_nkd" else 1
        assert code.count(r"MUFU\.EX2") <= 8 * of_row + 8


@pytest.mark.parametrize("name, c, dtype", longer(TILES, again), ids=str)
def test_tiles_move_in_16_bytes(name, c, dtype):
    """Where 8 divides C and the strides; other rows move an element at a time."""
    *_, code = compiled(name, c, dtype, 90)
    wide = (1 if dtype == torch.bfloat16 else 2) * (c % 8 == 0)
    assert code.count(r"STG\.E\.(\w+\.)*128") == wide * GRADIENTS.get(name, 1)


@pytest.mark.parametrize("name", longer(zip(NAMES, strict=True), lambda name: name in LIKE_KD))
def test_float64_compiles_without_spills(name):
    for code in compiled(name, 1000, torch.float64, 90):
        assert code.stack == 0 and code.count("LDL|STL") == 0


@pytest.mark.parametrize("name", WITH_TOP_K)
def test_listed_teachers_compile_without_spills(monkeypatch, name):
    """20 of 1000 logits and what was left out: no access is as long as the whole row."""
    case = zeros(name, 4, 1000, torch.bfloat16)
    k, none = 20, torch.empty(0)
    students, _, _, _, *end = inputs_of(name, case)
    for mass in (none, torch.zeros(4)):
        lists = [torch.zeros(4, k)], [torch.zeros(4, k, dtype=torch.int64)], [mass]
        [launch] = triton_aot.launches(monkeypatch, name, students, *lists, *end)
        code = triton_aot.Code(triton_aot.compile_for(90, *launch))
        assert code.stack == 0 and code.count("LDL|STL") == 0
        assert code.count(r"STG\.E\.(\w+\.)*128") == 1


def test_labels_for_all_are_counted_by_one_program_more(monkeypatch):
    n = triton_call.COUNTED_BY_EACH
    case = zeros("kd", n + 1, 16, torch.float32)
    few = Case([case.students[0][:n]], [case.teachers[0][:n]], case.target[:n])
    for given, names in ((few, ["taught_rows"]), (case, ["count_rows", "taught_rows"])):
        launches = triton_aot.launches(monkeypatch, "kd", *inputs_of("kd", given))
        assert [kernel.__name__ for kernel, *_ in launches] == names
    triton_aot.compile_for(90, *launches[0])


@pytest.mark.parametrize("name", NAMES)
def test_launches(monkeypatch, name):
    """One; two where a batch mean comes first."""
    inputs = inputs_of(name, zeros(name, 4, 16, torch.float32))
    launches = triton_aot.launches(monkeypatch, name, *inputs)
    assert len(launches) == (2 if name in ("tf_nkd", "uskd") else 1)


@pytest.mark.parametrize("name", ("kd", "slkd"))
def test_products_and_sums_are_not_contracted(monkeypatch, name):
    """student == teacher must be exactly 0 whatever Triton's default is."""
    inputs = inputs_of(name, zeros(name, 4, 1000, torch.float32))
    [launch] = triton_aot.launches(monkeypatch, name, *inputs)
    made = triton_aot.compile_for(90, *launch)
    assert not made.metadata.enable_fp_fusion
    assert "__assertfail" in made.asm["ptx"]


class Recorder:
    """In the place of Triton's launcher for a device: what a launch would be given."""

    launches: list[tuple] = []

    def __init__(self, source, metadata):
        self.names = source.fn.arg_names

    def __call__(self, x, y, z, stream, function, packed, metadata, enter, leave, *args):
        assert len(args) == len(self.names)
        Recorder.launches.append((x, y, z, stream, function, packed, *args))


class Utilities:
    def load_binary(self, name, kernel, shared, device):
        return 1, 2, 64, 0, 1024  # module, function, registers, spills, threads

    def get_device_properties(self, device):
        return {"max_shared_mem": 232448}

    def unload_module(self, module):
        pass


class Device:
    """A driver that compiles for sm_90 and launches nothing."""

    launcher_cls = Recorder
    utils = Utilities()

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 77

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


class Place:
    def get_device(self):
        return 0


@pytest.fixture
def recorded(monkeypatch):
    launch = triton_launch.launch
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(triton_launch, "_KERNELS", {})
    monkeypatch.setattr(triton_call, "launch", lambda *given: launch(*given[:5], Place()))
    monkeypatch.setattr(Recorder, "launches", [])
    monkeypatch.setattr(driver, "_active", Device())
    for kernel in KERNELS:  # what is compiled here must not be launched elsewhere
        monkeypatch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))
    yield Recorder.launches
    for kernel in KERNELS:
        for made in kernel.device_caches[0][0].values():
            made.module = None  # nothing was loaded, nothing is to be unloaded


def same(a, b):
    if isinstance(a, tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape  # outputs are new every time
    return a == b


@pytest.mark.skipif(not triton_launch.DIRECT, reason="this Triton is launched through its front")
@pytest.mark.parametrize("name", NAMES)
def test_compiled_kernels_are_launched_as_triton_launches_them(monkeypatch, recorded, name):
    case = cast(make(name, 4, 16), torch.bfloat16, torch.float32)
    inputs = inputs_of(name, case)
    triton_ops.run_op(OPS[name], *inputs)
    by_triton = list(recorded)
    recorded.clear()
    monkeypatch.setattr(type(taught_rows), "run", None)  # its front is not used again
    triton_ops.run_op(OPS[name], *inputs)
    assert by_triton and same(tuple(by_triton), tuple(recorded))


@pytest.mark.skipif(not triton_launch.DIRECT, reason="this Triton is launched through its front")
def test_what_code_is_compiled_for_is_in_its_key(monkeypatch, recorded):
    """Another type, alignment or length of numbers is other code; other values are the same."""
    case = cast(make("kd", 4, 16), torch.float32)

    def run(students, beta=1.0, target=case.target):
        moved = Case(students, case.teachers, target)
        inputs = inputs_of("kd", moved, kd_weight=beta)
        triton_ops.run_op(OPS["kd"], *inputs)
        return len(triton_launch._KERNELS)

    (z,) = case.students
    assert run([z]) == run([z.clone()], beta=0.3) == 1
    assert run([z], target=case.target + 1) == 1
    assert run([z.double()]) == 2
    assert run([torch.zeros(4 * 16 + 1)[1:].view(4, 16)]) == 3
    assert run([torch.zeros(4, 18)[:, :16]]) == 4  # rows that are not 16 bytes apart
    assert run([torch.zeros(4, 48)[:, 16:32]]) == 5
    assert run([torch.zeros(4, 80)[:, 16:32]]) == 5


@pytest.mark.parametrize("name", ("kd", "tf_nkd", pytest.param("slkd", marks=pytest.mark.long)))
def test_triton_compiles_for_nothing_that_is_not_in_the_key(monkeypatch, recorded, name):
    """Hidden in Triton's own key, a multiple of 16 would be taken for granted in other calls."""
    monkeypatch.setattr(triton_call, "COUNTED_BY_EACH", 4)

    def run():
        for n in (1, 4, 5, 16, 33):
            for c, ignore in ((16, -100), (48, 1), (112, 16), (16, 2**40)):
                inputs = inputs_of(name, zeros(name, n, c, torch.float32))
                triton_ops.run_op(OPS[name], *inputs[:10], ignore, inputs[11])

    run()
    known = len(triton_launch._KERNELS)
    monkeypatch.setattr(triton_launch, "DIRECT", False)
    monkeypatch.setattr(triton_launch, "_KERNELS", {})
    run()
    assert 0 < sum(len(kernel.device_caches[0][0]) for kernel in KERNELS) <= known
