"""Every refusal names the argument and its value, on every backend, before anything is computed."""

import pytest
import torch
from calls import FULL, NAMES, PAIR, WITH_TEACHER, Case, call, cast, make, probabilities, weights_of

import kdfuse
from kdfuse.kernels import backends
from kdfuse.kernels.table import OPS

BACKENDS = [name for name in ("reference", "cpu") if not backends.backends()[name]]
Z = torch.zeros(4, 5)
Y = torch.tensor([0, 1, 2, 4])


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def changed(name, **more):
    case = cast(make(name, 4, 5), torch.float32)
    for key, value in more.items():
        setattr(case, key, value)
    return case


@pytest.mark.parametrize("name", NAMES)
def test_shapes_of_logits(name, backend):
    for wrong, text in ((torch.zeros(5), r"\(5,\)"), (torch.zeros(4, 5, 2), r"\(4, 5, 2\)")):
        case = changed(name)
        case.students[0] = wrong
        with pytest.raises(ValueError, match=rf"student must have shape \(N, C\), got {text}"):
            call(name, case, backend=backend)
    case = changed(name, students=[torch.zeros(4, 1)] * len(changed(name).students))
    with pytest.raises(ValueError, match=r"student must have at least 2 classes, got .*\(4, 1\)"):
        call(name, case, backend=backend)


@pytest.mark.parametrize("shape", [(4, 6), (3, 5), (1, 5), (4,)])
@pytest.mark.parametrize("name", NAMES)
def test_shapes_that_differ(name, backend, shape):
    case = changed(name)
    kinds = [case.teachers] if case.teachers else []
    kinds += [case.students] if len(case.students) > 1 else []
    for others in kinds:
        kept, others[-1] = others[-1], torch.zeros(shape)
        with pytest.raises(ValueError, match=str(shape).replace("(", r"\(").replace(")", r"\)")):
            call(name, case, backend=backend)
        others[-1] = kept


@pytest.mark.parametrize("name", [n for n in NAMES if n in PAIR])
def test_two_classes_leave_nothing_beside_the_label(name, backend):
    case = Case([Z[:, :2]] * (2 if name == "uskd" else 1), [Z[:, :2]], Y % 2)
    with pytest.raises(ValueError, match="C == 2 .* use (beta|gamma)=0"):
        call(name, case, backend=backend)
    assert call(name, case, backend=backend, **PAIR[name]).isfinite()


@pytest.mark.parametrize("name", NAMES)
def test_logits_that_are_no_floats(name, backend):
    for wrong, text in ((torch.zeros(4, 5, dtype=torch.int64), "int64"), (Z.bool(), "bool")):
        case = changed(name)
        case.students[0] = wrong
        with pytest.raises(TypeError, match=f"student must have a floating type, got torch.{text}"):
            call(name, case, backend=backend)
        if case.teachers:
            case = changed(name, teachers=[wrong])
            with pytest.raises(TypeError, match="teacher must have a floating type"):
                call(name, case, backend=backend)
    with pytest.raises(TypeError, match="student must be a tensor of logits, got list"):
        call(name, changed(name, students=[[[0.0]]] * 3), backend=backend)


@pytest.mark.parametrize("name", WITH_TEACHER)
def test_a_teacher_with_grad(name, backend):
    case = changed(name, teachers=[Z.clone().requires_grad_()])
    with pytest.raises(ValueError, match=r"teacher requires grad.*teacher.detach\(\)"):
        call(name, case, backend=backend)
    with torch.no_grad():  # evaluation of a teacher in training is no mistake
        assert call(name, case, backend=backend).isfinite()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("wrong", (-1, 5, -101, 2**40, -(2**63)))
def test_target_outside_the_classes(name, backend, wrong):
    for row in (0, 3):
        target = Y.clone()
        target[row] = wrong
        match = rf"target\[{row}\] is {wrong}, outside the 5 classes.*ignore_index \(-100\)"
        with pytest.raises((ValueError, RuntimeError), match=match):
            call(name, changed(name, target=target), backend=backend, **FULL[name])
        students = [x.requires_grad_() for x in changed(name).students]
        with pytest.raises((ValueError, RuntimeError), match=match):
            call(name, changed(name, students=students, target=target), backend=backend)


@pytest.mark.parametrize("name", NAMES)
def test_ignore_index_moves_the_mark(name, backend):
    target = torch.tensor([0, -100, -1, 4])
    with pytest.raises((ValueError, RuntimeError), match=r"target\[1\] is -100.*\(-1\)"):
        call(name, changed(name, target=target), backend=backend, ignore_index=-1)
    target = torch.tensor([0, 2, 2, 4])  # a class may be the mark as well
    _, terms = call(
        name, changed(name, target=target), backend=backend, ignore_index=2, return_terms=True
    )
    assert terms["rows"].item() == 2


@pytest.mark.parametrize("name", NAMES)
def test_wrong_targets(name, backend):
    for wrong, kind, text in (
        (Y.int(), TypeError, "int32"),
        (Y.float(), TypeError, "float32"),
        (Y[:3], ValueError, r"\(3,\)"),
        (Y[:, None], ValueError, r"\(4, 1\)"),
        ([0, 1, 2, 3], TypeError, "list"),
    ):
        with pytest.raises(kind, match=f"target must .*{text}"):
            call(name, changed(name, target=wrong), backend=backend)
    if OPS[name].needs_target:
        with pytest.raises(TypeError, match="target must be a tensor, got NoneType"):
            call(name, changed(name, target=None), backend=backend)
    if name == "dkd":
        with pytest.raises(ValueError, match=r"dkd .* got probabilities \(4, 5\)"):
            call(name, changed(name, target=probabilities(4, 5)), backend=backend)
        return
    with pytest.raises(ValueError, match=r"target must have the student's shape .*\(4, 6\)"):
        call(name, changed(name, target=probabilities(4, 6)), backend=backend)
    with pytest.raises(ValueError, match=r"target requires grad.*target.detach\(\)"):
        call(name, changed(name, target=probabilities(4, 5).requires_grad_()), backend=backend)


@pytest.mark.parametrize("wrong", (0, -1.0, float("nan"), float("inf")))
@pytest.mark.parametrize("name", WITH_TEACHER)
def test_temperature(name, backend, wrong):
    with pytest.raises(ValueError, match=f"temperature must be a positive number, got {wrong}"):
        call(name, changed(name), backend=backend, temperature=wrong)


@pytest.mark.parametrize("name", NAMES)
def test_weights_that_are_no_numbers(name, backend):
    for key in weights_of(name):
        for wrong in (float("nan"), float("-inf")):
            with pytest.raises(ValueError, match=f"{key} must be a finite number, got {wrong}"):
                call(name, changed(name), backend=backend, **{key: wrong})


@pytest.mark.parametrize("name", NAMES)
def test_unknown_names(name, backend):
    with pytest.raises(ValueError, match="reduction must be one of none, mean, sum, got 'avg'"):
        call(name, changed(name), backend=backend, reduction="avg")
    with pytest.raises(ValueError, match="backend='gpu' is unknown; choose one of reference, cpu"):
        call(name, changed(name), backend="gpu")
    for missing in ("cuda", "triton"):
        if backends.backends()[missing]:
            with pytest.raises(RuntimeError, match=f"backend='{missing}' cannot run here: "):
                call(name, changed(name), backend=missing)
    with pytest.raises(TypeError, match="temperatur"):
        call(name, changed(name), backend=backend, temperatur=4)


@pytest.mark.parametrize("name", NAMES)
def test_denominator(name, backend):
    for reduction in ("sum", "none"):
        with pytest.raises(ValueError, match=f"denominator goes with .*'mean', not '{reduction}'"):
            call(name, changed(name), backend=backend, reduction=reduction, denominator=4)
    for wrong in (0, -2.0, float("nan"), torch.tensor(0.0), torch.tensor([-1])):
        shown = wrong.item() if isinstance(wrong, torch.Tensor) else wrong
        with pytest.raises(ValueError, match=f"denominator must be a positive number, got {shown}"):
            call(name, changed(name), backend=backend, denominator=wrong)
    with pytest.raises(ValueError, match=r"denominator must be one number, .*\(4,\)"):
        call(name, changed(name), backend=backend, denominator=torch.ones(4))


def test_teachers_and_their_weights(backend):
    with pytest.raises(ValueError, match="teacher must hold at least one .* empty sequence"):
        kdfuse.kd_loss(Z, [], Y, backend=backend)
    for wrong, text in (
        ([1.0], "2 weights.*got 1"),
        ([0.5, -0.5], "-0.5"),
        ([1, torch.nan], "nan"),
    ):
        with pytest.raises(ValueError, match=f"teacher_weights.* must .*{text}"):
            kdfuse.kd_loss(Z, [Z, Z], Y, teacher_weights=wrong, backend=backend)
    with pytest.raises(ValueError, match="ce_weight=0.5 needs a target"):
        kdfuse.kd_loss(Z, Z, ce_weight=0.5, backend=backend)


def test_fusion(backend):
    for wrong, text in (([0.5, 0.6], "1.1"), ([1.0], "2 weights"), ([1.5, -0.5], "-0.5")):
        with pytest.raises(ValueError, match=f"fusion must .*{text}"):
            kdfuse.slkd_loss(Z, Z, [Z, Z], Y, fusion=wrong, backend=backend)
    with pytest.raises(ValueError, match="slts must hold at least one"):
        kdfuse.slkd_loss(Z, Z, [], Y, backend=backend)


def test_rank(backend):
    with pytest.raises(ValueError, match="rank must be one of released, paper, got 'zipf'"):
        kdfuse.uskd_loss(Z, Z, Y, rank="zipf", backend=backend)


@pytest.mark.parametrize(
    "module, setting",
    [
        (kdfuse.KDLoss, "beta"),
        (kdfuse.DKDLoss, "kd_weight"),
        (kdfuse.NKDLoss, "student"),
        (kdfuse.TfNKDLoss, "temperature"),
        (kdfuse.USKDLoss, "fusion"),
        (kdfuse.SLKDLoss, "target"),
    ],
)
def test_modules_refuse_unknown_settings(module, setting):
    with pytest.raises(TypeError, match=f"{module.__name__} has no setting '{setting}'; it has "):
        module(**{setting: 1})


@pytest.mark.parametrize("name", NAMES)
def test_a_refusal_leaves_nothing_behind(name):
    """After an error in the compiled part the next call is right, and no input has changed."""
    case = cast(make(name, 4, 5), torch.float32)
    before = call(name, case, **FULL[name])
    kept = [x.clone() for x in (*case.students, *case.teachers)]
    bad = Case(case.students, case.teachers, torch.tensor([0, 1, 2, 7]))
    with pytest.raises((ValueError, RuntimeError), match="is 7"):
        call(name, bad, **FULL[name])
    assert torch.equal(call(name, case, **FULL[name]), before)
    pairs = zip(kept, (*case.students, *case.teachers), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("backend", (None, "reference"))
def test_a_value_outside_is_a_value_error(backend):
    """Of the compiled op too, which can raise but RuntimeError."""
    z = torch.zeros(3, 5)
    with pytest.raises(ValueError, match="target.1. is 9, outside the 5 classes"):
        kdfuse.kd_loss(z, z, torch.tensor([0, 9, 1]), ce_weight=1.0, backend=backend)


@pytest.mark.parametrize("name", ("temperature", "kd_weight", "denominator"))
def test_a_number_that_wants_a_gradient_is_refused(name):
    z, number = torch.zeros(3, 5), torch.tensor(2.0, requires_grad=True)
    with pytest.raises(ValueError, match=f"{name} requires grad, but gets none"):
        kdfuse.kd_loss(z, z, **{name: number})
    with torch.no_grad():
        kdfuse.kd_loss(z, z, **{name: number})


@pytest.mark.parametrize("wrong", ("4", None, [4.0], torch.tensor([4.0, 4.0])), ids=repr)
def test_what_is_no_number_is_named(wrong):
    case = make("kd", 4, 5)
    (z,), (t,), y = case.students, case.teachers, case.target
    shown = r"one number, got a tensor of \(2,\)" if isinstance(wrong, torch.Tensor) else "a number"
    for key in ("temperature", "kd_weight", "ce_weight"):
        with pytest.raises((TypeError, ValueError), match=f"{key} must be {shown}"):
            kdfuse.kd_loss(z, t, y, **{key: wrong})
    if wrong is not None:
        with pytest.raises((TypeError, ValueError), match=f"denominator must be {shown}"):
            kdfuse.kd_loss(z, t, y, denominator=wrong)


@pytest.mark.parametrize("wrong", (None, "x", 1.5))
def test_ignore_index_is_a_class_index(wrong):
    case = make("kd", 4, 5)
    with pytest.raises(TypeError, match=f"ignore_index must be a class index, got {wrong!r}"):
        call("kd", case, ignore_index=wrong)


def test_weights_are_a_sequence_of_numbers_without_a_gradient():
    case = make("slkd", 4, 5, slts=2)
    z, (t,) = case.students[0], case.teachers
    learnt = torch.nn.Parameter(torch.tensor([0.3, 0.7]))
    for weights in (learnt, learnt.softmax(0)):
        with pytest.raises(ValueError, match="teacher_weights requires grad, .*detach"):
            kdfuse.kd_loss(z, [t, t], teacher_weights=weights)
        with pytest.raises(ValueError, match="fusion requires grad"):
            call("slkd", case, fusion=weights)
    with pytest.raises(ValueError, match=r"teacher_weights\[1\] requires grad"):
        kdfuse.kd_loss(z, [t, t], teacher_weights=[0.3, learnt[1]])
    for wrong in (1.0, "ab"):
        with pytest.raises(TypeError, match="teacher_weights must be a sequence of 2 numbers"):
            kdfuse.kd_loss(z, [t, t], teacher_weights=wrong)
    with torch.no_grad():
        kdfuse.kd_loss(z, [t, t], teacher_weights=learnt)


def test_the_network_that_is_wrong_is_named():
    case = make("slkd", 4, 5, slts=2)
    z, (t,), y = case.students[0], case.teachers, case.target
    with pytest.raises(TypeError, match="teacher must be a tensor of logits, or a sequence"):
        kdfuse.kd_loss(z, None)
    with pytest.raises(ValueError, match=r"teacher\[1\] must have the student's shape"):
        kdfuse.kd_loss(z, [t, t[:, 1:]])
    with pytest.raises(ValueError, match=r"teacher\[1\] requires grad, .*teacher\[1\]\.detach"):
        kdfuse.kd_loss(z, [t, t.clone().requires_grad_()])
    with pytest.raises(ValueError, match=r"slts\[1\] must have the student's shape"):
        kdfuse.slkd_loss(z, t, [z, z[1:]], y)
    with pytest.raises(ValueError, match="weak must have the student's shape"):
        kdfuse.uskd_loss(z, z[1:], y)
