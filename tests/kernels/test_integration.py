"""The losses inside PyTorch: operator checks, compilers, autocast, autograd's edges, memory."""

import subprocess
import sys

import pytest
import torch
from calls import (
    FULL,
    NAMES,
    WITH_TEACHER,
    Case,
    call,
    cast,
    loss_and_gradients,
    make,
    params_of,
    probabilities,
)

import kdfuse
from kdfuse.kernels import backends
from kdfuse.kernels.op import REDUCTIONS

BACKENDS = [name for name in ("reference", "cpu") if not backends.backends()[name]]
pytestmark = [
    pytest.mark.slow(25),
    pytest.mark.skipif("cpu" not in BACKENDS, reason="no compiled module"),
]


def compiled_arguments(name, dtype, grad, reduction="mean", with_gradient=False):
    case = cast(make(name, 6, 9), dtype)
    students = [x.requires_grad_(grad) for x in case.students]
    static = (params_of(name), REDUCTIONS[reduction], -100, with_gradient)
    return (students, case.teachers, [], [], case.target, None, None, None, *static)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, dtype):
    op = getattr(torch.ops.kdfuse, name).default
    for grad in (False, True):
        for reduction in ("mean", "none"):
            torch.library.opcheck(op, compiled_arguments(name, dtype, grad, reduction))
    torch.library.opcheck(op, compiled_arguments(name, dtype, False, with_gradient=True))


@pytest.mark.parametrize("name", NAMES)
def test_the_bare_op_has_no_silent_second_derivative(name):
    op = getattr(torch.ops.kdfuse, name).default
    arguments = compiled_arguments(name, torch.float64, True)
    loss, z = op(*arguments)[0], arguments[0][0]
    with pytest.raises(RuntimeError, match="second derivative"):
        (g,) = torch.autograd.grad(loss, z, create_graph=True)
        torch.autograd.grad(g.square().sum(), z)
    arguments = compiled_arguments(name, torch.float64, True, with_gradient=True)
    gradients = op(*arguments)[2]
    with pytest.raises(RuntimeError, match="second derivative|does not require grad"):
        torch.autograd.grad(gradients[0].square().sum(), arguments[0][0])


@pytest.mark.parametrize("name", NAMES)
def test_the_bare_op_counts_what_it_is_given(name):
    op = getattr(torch.ops.kdfuse, name).default
    students, teachers, *rest, params, reduction, mark, wanted = compiled_arguments(
        name, torch.float32, False
    )
    for wrong in (
        (students, [*teachers, *students[:1]], params),
        (students, teachers[1:] if teachers else students, params),
        (students[:-1], teachers, params),
        (students, teachers, params[:-1]),
    ):
        with pytest.raises(RuntimeError, match="does not take|student must have shape"):
            op(wrong[0], wrong[1], *rest, wrong[2], reduction, mark, wanted)


@pytest.mark.parametrize(
    "name, stored", [*((name, True) for name in NAMES), ("kd", False), ("slkd", False)]
)
def test_compile_is_one_graph_for_any_batch(name, stored):
    torch._dynamo.reset()

    def step(students, teachers, target):
        settings = {**FULL[name], "return_terms": True, "stored_gradient": stored}
        loss, terms = call(name, Case(students, teachers, target), **settings)
        return 2 * loss, terms

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (8, 13, 5):
        case = cast(make(name, n, 33), torch.float32)
        case.target[2] = -100
        results = []
        for function in (step, compiled):
            students = [x.detach().requires_grad_() for x in case.students]
            loss, terms = function(students, case.teachers, case.target)
            results.append([loss.detach(), terms, torch.autograd.grad(loss, students)])
        torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-7)


def test_compile_with_inductor():
    torch._dynamo.reset()
    case = cast(make("kd", 6, 9), torch.float32)
    weight = torch.eye(9, requires_grad=True)

    def step(z):
        return kdfuse.kd_loss(z @ weight, case.teachers[0], case.target, ce_weight=0.3)

    (want,) = torch.autograd.grad(step(case.students[0]), weight)
    loss = torch.compile(step, fullgraph=True)(case.students[0])
    torch.testing.assert_close(torch.autograd.grad(loss, weight)[0], want, rtol=1e-5, atol=1e-6)


def test_compile_of_the_reference_and_of_probabilities():
    torch._dynamo.reset()
    case = cast(make("kd", 6, 9), torch.float32)
    soft = probabilities(6, 9)
    for backend in ("reference", "cpu"):

        def step(z, y, backend=backend):
            return kdfuse.kd_loss(z, case.teachers, y, ce_weight=0.3, backend=backend)

        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        for y in (case.target, soft):
            z = case.students[0]
            torch.testing.assert_close(compiled(z, y), step(z, y), rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_autocast_changes_nothing(name, backend):
    case = cast(make(name, 6, 33), torch.float32)
    want = loss_and_gradients(name, case, backend=backend, **FULL[name])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = loss_and_gradients(name, case, backend=backend, **FULL[name])
    assert got[0].dtype == torch.float32 and got[1][0].dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("reduction", ("mean", "none"))
@pytest.mark.parametrize("stored", (True, False))
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name, backend, stored, reduction):
    case = make(name, 3, 5, seed=1)
    case.target[1] = -100
    settings = {**FULL[name], "backend": backend, "stored_gradient": stored}
    settings["reduction"] = reduction
    if name in ("tf_nkd", "uskd"):
        # Their weights w_t depend on the logits and count as constants: cross-entropy alone.
        settings.update({"weight": 0.0} if name == "tf_nkd" else {"alpha": 0.0})

    def function(*students):
        return call(name, Case(list(students), case.teachers, case.target), **settings)

    students = [x.requires_grad_() for x in case.students]
    assert torch.autograd.gradcheck(function, students, atol=1e-7)
    if backend == "reference":
        assert torch.autograd.gradgradcheck(function, students, atol=1e-6)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_stored_and_made_again_are_the_same(name, dtype):
    case = cast(make(name, 40, 33), dtype)
    upstream = torch.tensor(1.0)
    want = loss_and_gradients(name, case, upstream, **FULL[name])
    got = loss_and_gradients(name, case, upstream, stored_gradient=False, **FULL[name])
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("stored", (True, False))
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_float16_gradients_live_under_a_loss_scale(name, backend, stored):
    """Entries of 1e-9 are 0 in float16; times 65536 they are not, and must come out as such."""
    case = cast(make(name, 512, 100), torch.float16)
    scale = torch.tensor(65536.0)
    settings = {**FULL[name], "backend": backend, "stored_gradient": stored}
    _, gradients = loss_and_gradients(name, case, scale, **settings)
    settings.pop("stored_gradient")
    _, wanted = loss_and_gradients(name, cast(case, torch.float64), scale.double(), **settings)
    for g, want in zip(gradients, wanted, strict=True):
        assert g.dtype == torch.float16
        torch.testing.assert_close(g.double(), want, rtol=2e-3, atol=2e-5)
        if name == "uskd":  # whose soft labels leave no entry small
            continue
        small = (want.abs() < 65536 * 2.0**-24) & (want.abs() > 1e-4)
        assert small.any() and (g[small] != 0).all()


@pytest.mark.parametrize("stored", (True, False))
@pytest.mark.parametrize("name", NAMES)
def test_a_call_passes_by_the_autograd_of_its_op(name, stored):
    """torch.library has it in Python, entered even where nothing requires grad."""
    case, entered, before = make(name, 4, 9), set(), sys.getprofile()
    sys.setprofile(lambda frame, *_: entered.add(frame.f_code.co_filename))
    try:
        loss_and_gradients(name, case, stored_gradient=stored, **FULL[name])
        call(name, case, **FULL[name])
    finally:
        sys.setprofile(before)
    assert any(x.endswith("op.py") for x in entered)
    assert not [x for x in entered if "_library" in x]


@pytest.mark.parametrize("name", NAMES)
def test_torch_func_takes_the_reference(name):
    case = make(name, 4, 5)

    def function(z, target):
        case_of = Case([z, *case.students[1:]], case.teachers, target)
        return call(name, case_of, **FULL[name])

    z = case.students[0]
    _, (want, *_) = loss_and_gradients(name, case, backend="reference", **FULL[name])
    torch.testing.assert_close(torch.func.grad(function)(z, case.target), want)
    stacked = torch.stack([z, z + 1, z * 2])
    got = torch.func.vmap(function, in_dims=(0, None))(stacked, case.target)
    each = torch.stack([function(x, case.target) for x in stacked])
    torch.testing.assert_close(got, each)
    refusal = "backend='cpu' does not run under torch.func"
    with pytest.raises(RuntimeError, match=refusal):
        torch.func.grad(fused(name, case))(z)
    with pytest.raises(RuntimeError, match=refusal):
        torch.func.vmap(fused(name, case))(stacked)


def fused(name, case):
    def function(z):
        return call(name, Case([z, *case.students[1:]], case.teachers, case.target), backend="cpu")

    return function


MEMORY = """
import re
from pathlib import Path
import torch
from calls import Case, call, FULL, WITH_TEACHER

def memory(key):
    return 1024 * int(re.search(key + r":\\s*(\\d+)", Path("/proc/self/status").read_text())[1])

torch.set_num_threads(2)
n, c = 512, 21841
logits = [torch.zeros(n, c).normal_() for _ in range(4)]
target = torch.arange(n)
for name in WITH_TEACHER:
    teacher, *others = logits
    students = [x.detach().requires_grad_() for x in (others if name == "slkd" else others[:1])]
    small = Case([x.detach()[:8].requires_grad_() for x in students], [teacher[:8]], target[:8])
    call(name, small, **FULL[name]).backward()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts again from here
    before = memory("VmRSS")
    call(name, Case(students, [teacher], target), **FULL[name]).backward()
    print(name, (memory("VmHWM") - before) / (len(students) * n * c * 4))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_nothing_of_the_logits_size_but_the_gradients(request):
    """The peak of resident memory grows by the gradients' bytes, in a process of its own."""
    folder = str(request.path.parent)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY],
        capture_output=True,
        text=True,
        cwd=folder,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = dict(line.split() for line in done.stdout.splitlines())
    assert list(found) == list(WITH_TEACHER)
    assert all(0.9 < float(share) < 1.3 for share in found.values()), found
