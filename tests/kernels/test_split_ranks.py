"""Two and three processes that hold parts of the classes, and DTensors: against the whole, and the
collectives of a call counted.
"""

import re

import pytest
import torch
import torch.distributed as dist
from calls import FULL, IN_PARTS, Case, call, cast, make
from processes import together
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import kdfuse

pytestmark = pytest.mark.slow(25)

TYPES = (torch.float32, torch.bfloat16, torch.float64)
SETTINGS = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "denominator": {"denominator": 7.0},
    "made late": {"stored_gradient": False},
}
# Every type, and every reduction in float32.
KINDS = [(dtype, "mean") for dtype in TYPES] + [(torch.float32, k) for k in SETTINGS if k != "mean"]
CUTS = {2: (0, 5, 33), 3: (0, 20, 21, 33)}
PLACEMENTS = {"classes": (Shard(1),), "rows": (Shard(0),), "replicas": (Replicate(),)}
ON_MESH = [
    (name, kind) for name in IN_PARTS for kind in PLACEMENTS if (name, kind) != ("tf_nkd", "rows")
]
ON_MESH += [("uskd", "replicas")]
SIZES = (33, 4)  # in chunks of torch's own; of four classes the last of three processes has none


def case_of(name, dtype, classes=33):
    case = cast(make(name, 9, classes), dtype)
    case.target[4] = -100
    return case


def group_case(name, dtype, rank, world):
    case, cuts = case_of(name, dtype), CUTS[world]
    begin, end = cuts[rank], cuts[rank + 1]
    students = [x[:, begin:end].clone().requires_grad_() for x in case.students]
    student = kdfuse.ClassPart(students[0], begin, 33)
    part = Case(
        [student, *students[1:]], [x[:, begin:end].clone() for x in case.teachers], case.target
    )
    return part, students


def upstream_of(loss):
    return torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape)


def counted(mode):
    counts = mode.get_comm_counts()
    return {str(op): n for op, n in counts.items() if n}


def of_group(rank, world):
    """Every loss with a plain part in each process."""
    found = {}
    for name in IN_PARTS:
        for dtype, kind in KINDS:
            part, students = group_case(name, dtype, rank, world)
            settings = {**FULL[name], **SETTINGS[kind]}
            with CommDebugMode() as forward:
                loss, terms = call(name, part, return_terms=True, **settings)
            with CommDebugMode() as backward:
                gradients = torch.autograd.grad(loss, students, upstream_of(loss))
            found[f"{name} {dtype} {kind}"] = {
                "loss": loss.detach(),
                "terms": terms,
                "gradients": list(gradients),
                "forward": counted(forward),
                "backward": counted(backward),
            }
    return found


def compiled(rank, world):
    """Whether torch.compile, in one graph with the collective in it, leaves each loss as it is."""
    same = {}
    for name in IN_PARTS:
        part, students = group_case(name, torch.float32, rank, world)

        def loss_of(case, name=name):
            return call(name, case, **FULL[name])

        made = []
        for run in (loss_of, torch.compile(loss_of, fullgraph=True, backend="aot_eager")):
            loss = run(part)
            made.append([loss.detach(), *torch.autograd.grad(loss, students)])
        same[name] = all(torch.equal(x, y) for x, y in zip(*made, strict=True))
    return same


def of_mesh(rank, world):
    """Every loss with DTensors."""
    mesh = init_device_mesh("cpu", (world,))
    return {
        f"{name} {kind} {way} {classes}": on_mesh(mesh, name, kind, way, classes)
        for name, kind in ON_MESH
        for way in SETTINGS
        for classes in SIZES
    }


def on_mesh(mesh, name, kind, way, classes):
    case, placements = case_of(name, torch.float32, classes), PLACEMENTS[kind]
    students = [distribute_tensor(x, mesh, placements).requires_grad_() for x in case.students]
    teachers = [distribute_tensor(x, mesh, placements) for x in case.teachers]
    target = distribute_tensor(case.target, mesh, [Shard(0) if kind == "rows" else Replicate()])
    settings = {**FULL[name], **SETTINGS[way]}
    with CommDebugMode() as forward:
        loss, terms = call(name, Case(students, teachers, target), return_terms=True, **settings)
    weight = upstream_of(loss.full_tensor().detach())
    (distribute_tensor(weight, mesh, loss.placements) * loss).sum().backward()
    return {
        "loss": loss.full_tensor().detach(),
        "placements": str(loss.placements),
        "terms": terms,
        "gradients": [x.grad.full_tensor() for x in students],
        "of gradients": str(students[0].grad.placements),
        "forward": counted(forward),
    }


def refusals(rank, world):
    """The message of each call that is refused, on every process alike."""
    mesh = init_device_mesh("cpu", (world,))
    z = torch.zeros(6, 6)
    y = torch.zeros(6, dtype=torch.int64)

    def shard(*placements):
        return distribute_tensor(z, mesh, placements)

    calls = {
        "partial": lambda: kdfuse.kd_loss(DTensor.from_local(z, mesh, [Partial()]), z),
        "teacher": lambda: kdfuse.kd_loss(shard(Shard(1)), z),
        "placements": lambda: kdfuse.kd_loss(shard(Shard(1)), shard(Shard(0))),
        "uskd classes": lambda: kdfuse.uskd_loss(shard(Shard(1)), shard(Shard(1)), y),
        "uskd rows": lambda: kdfuse.uskd_loss(shard(Shard(0)), shard(Shard(0)), y),
        "tf_nkd rows": lambda: kdfuse.tf_nkd_loss(shard(Shard(0)), y),
        "target": lambda: kdfuse.kd_loss(
            shard(Shard(1)), shard(Shard(1)), distribute_tensor(y, mesh, [Shard(0)])
        ),
        "overlap": lambda: kdfuse.kd_loss(kdfuse.ClassPart(z, 0, 6), z),
    }
    said = {}
    for name, run in calls.items():
        try:
            run()
        except (TypeError, ValueError) as error:
            said[name] = f"{type(error).__name__}: {error}"
    return said


def grid(rank, world):
    """Rows along one dimension of a mesh, classes along the other; four processes."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "classes"))
    case = case_of("dkd", torch.float32)
    placements = (Shard(0), Shard(1))
    student = distribute_tensor(case.students[0], mesh, placements).requires_grad_()
    teacher = distribute_tensor(case.teachers[0], mesh, placements)
    target = distribute_tensor(case.target, mesh, (Shard(0), Replicate()))
    loss, terms = kdfuse.dkd_loss(student, teacher, target, return_terms=True, **FULL["dkd"])
    (loss * upstream_of(torch.empty(()))).backward()
    gradients = [student.grad.full_tensor()]
    return {"loss": loss.full_tensor().detach(), "terms": terms, "gradients": gradients}


def more_processes_than_chunks(rank, world):
    """Five classes in chunks of two: the last of four processes would begin beyond them."""
    mesh = init_device_mesh("cpu", (world,))
    return on_mesh(mesh, "dkd", "classes", "mean", 5)


def main(folder, *parts):
    """What each process does."""
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    found = {part: globals()[part](rank, world) for part in parts}
    torch.save(found, folder / f"{world}-{rank}.pt")
    dist.barrier()  # gloo may abort where one process leaves while another still talks to it
    dist.destroy_process_group()


def launched(folder, world, *parts):
    together(world, main, folder, *parts)
    return [torch.load(folder / f"{world}-{rank}.pt", weights_only=True) for rank in range(world)]


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request, tmp_path_factory):
    parts = ("of_group", "of_mesh", "refusals", *(["compiled"] if request.param == 2 else []))
    return launched(tmp_path_factory.mktemp("ranks"), request.param, *parts)


def whole(name, dtype, settings, classes=33):
    """The loss, terms and gradients of one process with all classes."""
    case = case_of(name, dtype, classes)
    leaves = [x.requires_grad_() for x in case.students]
    given = Case(leaves, case.teachers, case.target)
    loss, terms = call(name, given, return_terms=True, **FULL[name], **settings)
    return loss.detach(), terms, torch.autograd.grad(loss, leaves, upstream_of(loss))


@pytest.mark.parametrize(("dtype", "kind"), KINDS, ids=str)
@pytest.mark.parametrize("name", IN_PARTS)
def test_parts_give_the_loss_and_the_gradients_of_the_whole(ranks, name, dtype, kind):
    loss, terms, gradients = whole(name, dtype, SETTINGS[kind])
    found = [rank["of_group"][f"{name} {dtype} {kind}"] for rank in ranks]
    for own in found:
        assert torch.equal(own["loss"], found[0]["loss"])
        torch.testing.assert_close(own["loss"], loss)
        torch.testing.assert_close(own["terms"], terms)
    for k, g in enumerate(gradients):
        torch.testing.assert_close(torch.cat([own["gradients"][k] for own in found], 1), g)


def test_one_collective_forward_and_none_backward(ranks):
    for rank in ranks:
        for key, own in rank["of_group"].items():
            assert sum(own["forward"].values()) == 1, (key, own["forward"])
            assert "allgather" in next(iter(own["forward"])), (key, own["forward"])
            assert own["backward"] == {}, key
        for key, own in rank["of_mesh"].items():
            expected = 0 if "replicas" in key else 1
            assert sum(own["forward"].values()) == expected, (key, own["forward"])


def test_compiled_in_one_graph(ranks):
    found = [rank["compiled"] for rank in ranks if "compiled" in rank]
    assert found == [dict.fromkeys(IN_PARTS, True)] * (2 if len(ranks) == 2 else 0)


@pytest.mark.parametrize("way", SETTINGS)
@pytest.mark.parametrize(("name", "kind"), ON_MESH)
def test_dtensors_give_the_loss_of_the_whole(ranks, name, kind, way):
    for classes in SIZES:
        loss, terms, gradients = whole(name, torch.float32, SETTINGS[way], classes)
        for rank in ranks:
            own = rank["of_mesh"][f"{name} {kind} {way} {classes}"]
            torch.testing.assert_close(own["loss"], loss)
            torch.testing.assert_close(own["terms"], terms)
            for g, h in zip(own["gradients"], gradients, strict=True):
                torch.testing.assert_close(g, h)
            rows = kind == "rows" and way == "none"
            assert own["placements"] == str((Shard(0) if rows else Replicate(),))
            assert own["of gradients"] == str(PLACEMENTS[kind])


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("partial", "ValueError: student has placements (Partial(sum),); the losses take"),
        ("teacher", "TypeError: every set of logits must be a DTensor as the student is"),
        ("placements", "ValueError: every set of logits must have the student's mesh and place"),
        ("uskd classes", "ValueError: uskd_loss ranks all classes of a row"),
        ("uskd rows", "ValueError: uskd_loss takes a mean over the batch"),
        ("tf_nkd rows", "ValueError: tf_nkd_loss takes a mean over the batch"),
        ("target", "ValueError: target must have the student's mesh and placements (Replicate()"),
        ("overlap", r"ValueError: the parts of this group hold the classes \[0, \d+\), "),
    ],
)
def test_refusals(ranks, key, message):
    pattern = message if key == "overlap" else re.escape(message)
    for rank in ranks:
        assert re.match(pattern, rank["refusals"].get(key, "nothing"))


def test_four_processes(tmp_path):
    ranks = launched(tmp_path, 4, "grid", "more_processes_than_chunks")
    for key, classes in (("grid", 33), ("more_processes_than_chunks", 5)):
        loss, terms, (gradient,) = whole("dkd", torch.float32, {}, classes)
        for own in (rank[key] for rank in ranks):
            torch.testing.assert_close(own["loss"], loss)
            torch.testing.assert_close(own["terms"], terms)
            torch.testing.assert_close(own["gradients"][0], gradient)
