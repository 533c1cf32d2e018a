"""SP, PKT and RKD against float64 formulas, and over two processes."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from features import TARGET, check, check_compiled, check_learns, largest, normal, outputs
from processes import together
from steps import loss_of

from kdfuse.engine.methods import METHODS, Outputs, rkd
from kdfuse.engine.methods.parts.gather import gathered

POOLED = [(5, 1, 1)], [(9, 1, 1)]
MAPS = [(5, 4, 3)], [(9, 2, 2)]
TERMS = {"sp": ("sp",), "pkt": ("pkt",), "rkd": ("distance", "angle")}


def rows_of(out):
    return [
        next(iter(taps.values())).flatten(1).double()
        for taps in (out.student_taps, out.teacher_taps)
    ]


def sp(out):
    def similarity(f):
        gram = torch.einsum("id,jd->ij", f, f)
        return gram / gram.square().sum(1, keepdim=True).sqrt()

    student, teacher = map(similarity, rows_of(out))
    return {"sp": (student - teacher).square().sum() / len(student) ** 2}


def pkt(out):
    def neighbours(f):
        cosine = F.cosine_similarity(f[:, None], f[None], dim=2)
        return (cosine / 2 + 0.5) / (cosine / 2 + 0.5).sum(1, keepdim=True)

    q, p = map(neighbours, rows_of(out))
    return {"pkt": (p * (p.log() - q.log())).sum() / len(p) ** 2}


def huber(x):
    return torch.where(x.abs() < 1, x**2 / 2, x.abs() - 0.5).mean()


def naive_rkd(out):
    """With the differences of all images, (B, B, d)."""
    distances, angles = [], []
    for f in rows_of(out):
        n = len(f)
        difference = f[None] - f[:, None]
        apart = difference.square().sum(2) + torch.eye(n)
        distance = apart.sqrt() * (1 - torch.eye(n))
        distances.append(distance * n * (n - 1) / distance.sum())
        unit = difference / apart.sqrt()[:, :, None]
        angles.append(torch.einsum("ijd,ikd->ijk", unit, unit))
    return {"distance": huber(distances[0] - distances[1]), "angle": huber(angles[0] - angles[1])}


FORMULAS = {"sp": sp, "pkt": pkt, "rkd": naive_rkd}


@pytest.mark.parametrize("shapes", [POOLED, MAPS], ids=["pooled", "maps"])
@pytest.mark.parametrize("name", FORMULAS)
def test_values_and_gradients(name, shapes):
    check(METHODS[name](), outputs(*shapes), FORMULAS[name])


def test_angles_in_parts_are_the_angles_at_once(monkeypatch):
    monkeypatch.setattr(rkd, "ANGLES", 2 * 6 * 6)
    check(METHODS["rkd"](), outputs(*POOLED), naive_rkd)
    monkeypatch.setattr(rkd, "ANGLES", 4 * 6 * 6)  # the last part is smaller
    check(METHODS["rkd"](), outputs(*POOLED), naive_rkd)


def test_rkd_makes_some_angles_at_a_time_and_keeps_none(monkeypatch):
    out, kept = outputs([(50,)], [(60,)], n=20, dtype=torch.float32), []

    def pack(x):
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        assert largest(METHODS["rkd"](), out) == 20**3
        monkeypatch.setattr(rkd, "ANGLES", 4 * 20**2)
        assert largest(METHODS["rkd"](), out) == 4 * 20**2
    assert max(kept) == 20 * 50


@pytest.mark.parametrize("clusters", [1, 2])
def test_rkd_keeps_its_digits_where_images_are_near_and_far_from_the_origin(clusters):
    out = outputs(*POOLED)
    rows = out.student_taps["stage0"].detach().flatten(1) + 1000
    rows[3:] *= 3 - 2 * clusters  # two groups are as far from each other as from the origin
    out.student_taps = {"pooled": rows.float().double().requires_grad_()}
    check(METHODS["rkd"](), out, naive_rkd, rtol=1e-3)


def test_rkd_knows_equal_images_far_from_the_origin():
    rows = normal(24, 256, seed=0).float() + 1000
    rows[12:] = rows[:12]
    out = outputs(*POOLED, n=24)
    found = []
    for offset in (0, 1000):
        out.student_taps = {"pooled": rows - 1000 + offset}
        found.append(METHODS["rkd"]().features(out, TARGET))
    torch.testing.assert_close(found[0], found[1])


def test_images_in_one_place_have_no_angle_and_no_gradient():
    out = outputs(*POOLED)
    out.student_taps = {"pooled": torch.ones(6, 5, requires_grad=True)}
    found = METHODS["rkd"]().features(out, TARGET)
    teacher = rows_of(out)[1]
    unit = F.normalize(teacher[None] - teacher[:, None], dim=2)
    angles = torch.einsum("ijd,ikd->ijk", unit, unit)
    torch.testing.assert_close(found["angle"].double(), huber(angles))
    sum(found.values()).backward()
    assert torch.equal(out.student_taps["pooled"].grad, torch.zeros(6, 5))


def test_two_equal_images_among_others_have_finite_gradients():
    for name in FORMULAS:
        rows = normal(6, 5, seed=0)
        rows[1], rows[2] = rows[0], 0
        out = outputs(*POOLED)
        out.student_taps = {"pooled": rows.requires_grad_()}
        sum(METHODS[name]().features(out, TARGET).values()).backward()
        assert rows.grad.isfinite().all() and rows.grad.abs().max() > 0


@pytest.mark.parametrize("name", FORMULAS)
def test_a_student_that_is_its_teacher_has_no_loss(name):
    rows = normal(6, 5, seed=1)
    out = Outputs(torch.empty(0), None, student_taps={"a": rows}, teacher_taps={"b": rows})
    assert all(float(value) == 0 for value in METHODS[name]().features(out, TARGET).values())


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("sp", lambda f, q: 3 * f @ q),
        ("pkt", lambda f, q: f.abs().sum(1, keepdim=True) * f @ q),
        ("rkd", lambda f, q: 3 * f @ q + 2),
    ],
)
def test_what_changes_no_relation_changes_no_loss(name, change):
    q, _ = torch.linalg.qr(normal(5, 5, seed=3))
    out = outputs(*POOLED)
    rows = rows_of(out)[0].detach()
    found = []
    for student in (rows, change(rows, q)):
        out.student_taps = {"pooled": student}
        found.append(METHODS[name]().features(out, TARGET))
    torch.testing.assert_close(found[0], found[1], rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("name", FORMULAS)
def test_bf16_features_are_compared_in_float32(name):
    half = outputs(*MAPS, dtype=torch.bfloat16)
    found = METHODS[name]().features(half, TARGET)
    for term, expected in FORMULAS[name](half).items():
        assert found[term].dtype == torch.float32
        torch.testing.assert_close(found[term].double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", FORMULAS)
def test_compiled_in_one_graph(name):
    check_compiled(METHODS[name](), outputs(*MAPS, dtype=torch.float32))


@pytest.mark.parametrize("name", FORMULAS)
def test_steps_lower_the_loss(name):
    check_learns(name, TERMS[name])


def test_rkd_weighs_its_parts_and_logs_them_unweighted():
    method = METHODS["rkd"](distance_weight=3.0, angle_weight=0.5, feature_weight=2.0)
    out = outputs(*POOLED)
    out.features = {"distance": torch.tensor(1.0), "angle": torch.tensor(10.0)}
    loss, terms = loss_of(method, out, TARGET)
    ce = F.cross_entropy(out.student, TARGET)
    torch.testing.assert_close(loss.double(), ce + 2 * (3 * 1 + 0.5 * 10), rtol=1e-5, atol=0)
    assert (float(terms["distance"]), float(terms["angle"])) == (1, 10)


def test_rkd_refuses_a_batch_of_one():
    with pytest.raises(ValueError, match=r"has 1; raise run\.batch, or with several processes set"):
        METHODS["rkd"]().features(outputs(*POOLED, n=1), TARGET[:1])


@pytest.mark.parametrize(("name", "tap"), [("sp", "stage3"), ("pkt", "pooled"), ("rkd", "pooled")])
def test_published_taps_and_weights(name, tap):
    named = {"stem": "a", "stage1": "b", "stage3": "c", "stage3.pre": "d", "pooled": "e"}
    method = METHODS[name]()
    reads = method.reads({"student": named, "teacher": named})
    assert reads == {"student": (tap,), "teacher": (tap,)}
    weights = {"sp": 3000.0, "pkt": 30000.0, "rkd": 1.0}
    assert (method.ce_weight, method.kd_weight, method.gather) == (1.0, 0.0, False)
    assert method.feature_weight == weights[name]


def test_one_process_gathers_itself():
    x = normal(3, 2, seed=0)
    assert gathered(x) is x


# Two processes, each with half of six images, against one with all.


def of_layer(name, options, share, compiled=False):
    """Losses of features that one layer makes of an input, and the gradient of its weight."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(8, 5)
    model = layer
    if dist.is_initialized():
        model = torch.nn.parallel.DistributedDataParallel(layer)
    inputs, teacher = (normal(6, 8, seed=i, dtype=torch.float32)[share] for i in (5, 6))
    method = METHODS[name](**options)
    features = method.features
    if compiled:
        features = torch.compile(features, fullgraph=True, backend="aot_eager")
    out = Outputs(torch.empty(0), student_taps={"x": model(inputs)}, teacher_taps={"x": teacher})
    found = features(out, TARGET)
    sum(found.values()).backward()
    return {"losses": {k: v.detach() for k, v in found.items()}, "gradient": layer.weight.grad}


def main(folder):
    """What each process does."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    share = slice(3 * rank, 3 * rank + 3)
    found = {}
    for name in FORMULAS:
        found[name] = of_layer(name, {"gather": True}, share)
        found[f"{name} own"] = of_layer(name, {}, share)
    found["rkd compiled"] = of_layer("rkd", {"gather": True}, share, compiled=True)
    x = normal(6, 2, seed=0)[share].requires_grad_()
    rows = gathered(x)
    (rows * torch.arange(12).view(6, 2)).sum().backward()
    found["rows"], found["of rows"] = rows.detach(), x.grad
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()  # gloo may abort where one process leaves while another still talks to it
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gathered")
    together(2, main, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_gathered_rows_and_their_gradient(ranks):
    for rank, found in enumerate(ranks):
        assert torch.equal(found["rows"], normal(6, 2, seed=0))
        own = torch.arange(12).view(6, 2)[3 * rank : 3 * rank + 3]
        assert torch.equal(found["of rows"], 2.0 * own)


@pytest.mark.parametrize("name", FORMULAS)
def test_gathered_losses_and_gradients_are_those_of_one_process(ranks, name):
    alone = of_layer(name, {}, slice(None))
    for found in ranks:
        for own in (found[name], found.get(f"{name} compiled", found[name])):
            torch.testing.assert_close(own["losses"], alone["losses"], rtol=1e-5, atol=1e-8)
            torch.testing.assert_close(own["gradient"], alone["gradient"], rtol=1e-4, atol=1e-6)
        own = found[f"{name} own"]
        assert not any(torch.allclose(own["losses"][k], v) for k, v in alone["losses"].items())
