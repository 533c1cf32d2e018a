"""CRD: the contrast against a memory of all images, its negatives, its state, many processes."""

import pytest
import torch
import torch.nn.functional as F
from processes import together
from torch import Size, nn
from twenty_steps import losses, made

from kdfuse.engine.methods import METHODS, Networks, Outputs, crd
from kdfuse.engine.methods.crd import Memory
from kdfuse.engine.training.ranks import join

CRD = METHODS["crd"]


def memory(labels, negatives=5, *, dimensions=6, temperature=0.3, momentum=0.5, seed=0):
    """For a student of 3 and a teacher of 4 channels, in float64."""
    torch.manual_seed(seed)
    student, teacher = Size((1, 3, 1, 1)), Size((1, 4))
    return Memory(student, teacher, labels, negatives, dimensions, temperature, momentum).double()


def inputs(n, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(n, 3, 1, 1, generator=generator).to(dtype).requires_grad_()
    return student, torch.randn(n, 4, generator=generator).to(dtype)


def naive(held, student, teacher, index, rows, z=None):
    """The loss from gathered rows (N, 1 + K, D), the normalizers, and both embeddings."""
    n, images, k = len(index), len(held.labels), rows.shape[1] - 1
    linear = [held.embed_student(student.flatten(1)), held.embed_teacher(teacher.flatten(1))]
    embedded = [e / (e * e).sum(1, keepdim=True).sqrt() for e in linear]
    banks = [held.teacher_memory.clone(), held.student_memory.clone()]
    total, found = 0.0, []
    for side, (e, bank) in enumerate(zip(embedded, banks, strict=True)):
        score = torch.exp((bank[rows] * e[:, None]).sum(2) / held.temperature)
        found.append(score.mean().detach() * images if z is None else z[side])
        p = score / found[-1]
        m = k / images
        positive = torch.log(p[:, 0] / (p[:, 0] + m + 1e-7))
        negative = torch.log(m / (p[:, 1:] + m + 1e-7))
        total = total - (positive.sum() + negative.sum()) / n
    return total, found, embedded


def drawn(held, index, seed):
    torch.manual_seed(seed)
    return torch.cat([index[:, None], held.draw(index)], 1)


@pytest.mark.parametrize("piece", [2**26, 64])
@pytest.mark.parametrize("images", [40, 700])  # all of the memory is multiplied, or rows gathered
def test_value_gradients_and_memory_are_those_of_the_plain_form(monkeypatch, images, piece):
    monkeypatch.setattr(crd, "PIECE", piece)
    held = memory(torch.arange(images) % 3)
    student, teacher = inputs(7)
    index = torch.tensor([5, 39, 0, 17, 8, 21, 30])
    rows = drawn(held, index, seed=1)
    assert crd.whole_is_cheaper(held.student_memory, rows) is (images == 40)
    expected, z, embedded = naive(held, student, teacher, index, rows)
    wrt = [student, *held.parameters()]
    gradients = torch.autograd.grad(expected, wrt)
    memories = []
    for bank, new in zip([held.student_memory, held.teacher_memory], embedded, strict=True):
        row = 0.5 * bank[index] + 0.5 * new.detach()
        memories.append(bank.clone())
        memories[-1][index] = row / row.norm(dim=1, keepdim=True)

    torch.manual_seed(1)
    found = held.train().contrast(student, teacher, index)
    torch.testing.assert_close(found, expected)
    for actual, wanted in zip(torch.autograd.grad(found, wrt), gradients, strict=True):
        torch.testing.assert_close(actual, wanted)
    torch.testing.assert_close(held.student_memory, memories[0])
    torch.testing.assert_close(held.teacher_memory, memories[1])
    torch.testing.assert_close(held.normalizers, torch.stack(z))


def test_the_normalizers_are_the_first_batchs_also_after_a_resumption():
    held, index = memory(torch.arange(40) % 3), torch.arange(6)
    held.contrast(*inputs(6), index)
    first = held.normalizers.clone()
    assert (first > 0).all()
    resumed = memory(torch.arange(40) % 3, seed=9)
    resumed.load_state_dict(held.state_dict())
    rows = drawn(resumed, index, seed=3)
    expected, _, _ = naive(resumed, *inputs(6, seed=2), index, rows, first)
    for state in (held, resumed):
        torch.manual_seed(3)
        torch.testing.assert_close(state.contrast(*inputs(6, seed=2), index), expected)
    for name, value in held.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert torch.equal(held.normalizers, first)


def test_evaluation_changes_nothing():
    held = memory(torch.arange(40) % 3).eval()
    before = {name: value.clone() for name, value in held.state_dict().items()}
    held.contrast(*inputs(6), torch.arange(6))
    assert all(torch.equal(value, before[name]) for name, value in held.state_dict().items())


def test_memories_start_uniform_and_of_length_one_on_average():
    held = memory(torch.arange(4000) % 10, dimensions=12)
    for bank in (held.student_memory, held.teacher_memory):
        assert 0.99 * 0.5 < float(bank.abs().max()) < 0.5 + 1e-6
        assert float(bank.square().sum(1).mean()) == pytest.approx(1, rel=0.02)


def test_negatives_are_uniform_over_all_images_of_other_classes():
    labels = torch.tensor([2, 0, 1, 1, 4, 1, 0, 2, 1, 4])  # no order, no balance, no class 3
    held = memory(labels, negatives=60_000)
    index = torch.arange(len(labels))
    rows = held.draw(index)
    assert torch.equal(rows, held.draw(index)) is False
    for image in index.tolist():
        counts = rows[image].bincount(minlength=len(labels))
        others = labels != labels[image]
        assert (counts[~others] == 0).all()
        share = 1 / float(others.sum())
        deviation = (60_000 * share * (1 - share)) ** 0.5
        assert ((counts[others] - 60_000 * share).abs() < 5 * deviation).all()


def test_draws_follow_from_torchs_generator():
    held, index = memory(torch.arange(40) % 3), torch.arange(6)
    assert torch.equal(drawn(held, index, seed=4), drawn(held, index, seed=4))


def networks(shapes=((1, 3, 1, 1), (1, 4)), labels=(0, 1, 2, 0), taps=1):
    found = {
        role: {f"tap{i}": Size(shape) for i in range(taps)}
        for role, shape in zip(("student", "teacher"), shapes, strict=True)
    }
    return Networks(3, nn.Identity(), shapes=found, labels=torch.tensor(labels))


def test_the_options_reach_the_head():
    head = CRD(negatives=9, dimensions=7, contrast_temperature=0.2, momentum=0.3).head(networks())
    assert (head.negatives, head.temperature, head.momentum) == (9, 0.2, 0.3)
    shapes = {name: tuple(value.shape) for name, value in head.state_dict().items()}
    assert shapes == {
        "embed_student.weight": (7, 3),
        "embed_student.bias": (7,),
        "embed_teacher.weight": (7, 4),
        "embed_teacher.bias": (7,),
        "student_memory": (4, 7),
        "teacher_memory": (4, 7),
        "normalizers": (2,),
    }
    assert CRD(kd_weight=1.0).feature_weight == 0.8


def test_what_cannot_be_contrasted_is_refused():
    with pytest.raises(ValueError, match="reads one point of each network, got 2"):
        CRD().head(networks(taps=2))
    with pytest.raises(ValueError, match="images of one class only"):
        CRD().head(networks(labels=(1, 1, 1)))


def test_under_autocast_all_is_float32():
    held, index = memory(torch.arange(40) % 3).float(), torch.arange(6)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        student, teacher = (x.detach().to(dtype) for x in inputs(6))
        taps = {"student_taps": {"p": student}, "teacher_taps": {"p": teacher}}
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            head = held.eval()(Outputs(torch.zeros(6, 3), **taps), index, index)
        found[dtype] = CRD().features(Outputs(torch.zeros(6, 3), head=head), index)["crd"]
        assert found[dtype].dtype == torch.float32 and found[dtype].requires_grad
    torch.testing.assert_close(*found.values(), rtol=0.02, atol=0)


def test_compiled_it_is_the_same():
    found, state = {}, {}
    for compiled in (False, True):
        held, index = memory(torch.arange(40) % 3), torch.arange(6)
        student, teacher = inputs(6)
        call = held.contrast
        if compiled:
            call = torch.compile(call, fullgraph=True, backend="aot_eager")
        torch.manual_seed(0)
        loss = call(student, teacher, index)
        found[compiled] = (loss.detach(), *torch.autograd.grad(loss, [student, *held.parameters()]))
        state[compiled] = held.state_dict()
    torch.testing.assert_close(found[True], found[False])
    torch.testing.assert_close(state[True], state[False])


def test_twenty_steps_lower_it():
    """With memories that hardly move: what moves in step with the networks is no fixed aim."""
    _, distiller = made({"name": "crd", "negatives": 64, "momentum": 0.99})
    before = distiller.main.head.student_memory.clone()
    found = losses(distiller, "crd")
    assert found[-1] < 0.8 * found[0]  # measured: 0.60 at most
    assert not torch.equal(distiller.main.head.student_memory, before)


def main(folder):
    """What each of two processes does: two losses of its own rows of a batch of eight."""
    group = join("cpu")
    held = memory(torch.arange(40) % 3)
    share = slice(4 * group.rank, 4 * group.rank + 4)
    found = []
    for step in range(2):
        student, teacher = (x.detach()[share] for x in inputs(8, seed=step))
        torch.manual_seed(10 * step + group.rank)
        found.append(held.contrast(student, teacher, (torch.arange(8) + 4 * step)[share]).detach())
    torch.save({"losses": found, "state": held.state_dict()}, folder / f"{group.rank}.pt")


def test_two_processes_have_one_memory_and_their_own_negatives(tmp_path):
    together(2, main, tmp_path)
    both = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]

    held, z = memory(torch.arange(40) % 3), None
    for step in range(2):
        index = torch.arange(8) + 4 * step
        shares, embedded = [], []
        for rank in (0, 1):
            rows = slice(4 * rank, 4 * rank + 4)
            student, teacher = (x.detach()[rows] for x in inputs(8, seed=step))
            chosen = drawn(held, index[rows], seed=10 * step + rank)
            shares.append((student, teacher, index[rows], chosen))
        if z is None:
            firsts = [naive(held, *share)[1] for share in shares]
            z = [(a + b) / 2 for a, b in zip(*firsts, strict=True)]
        for rank, share in enumerate(shares):
            expected, _, new = naive(held, *share, z)
            torch.testing.assert_close(both[rank]["losses"][step], expected.detach())
            embedded.append(new)
        for bank, *new in zip((held.student_memory, held.teacher_memory), *embedded, strict=True):
            bank[index] = F.normalize(0.5 * bank[index] + 0.5 * torch.cat(new).detach())
    held.normalizers.copy_(torch.stack(z))
    for name, value in held.state_dict().items():
        assert torch.equal(both[0]["state"][name], both[1]["state"][name]), name
        torch.testing.assert_close(both[0]["state"][name], value)
