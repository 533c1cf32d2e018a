"""What networks predict beside their teacher: against formulas in float64, and what it costs."""

from contextlib import closing
from math import log

import numpy as np
import pytest
import torch
from tiny import tiny

from kdfuse.engine.run.log import read
from kdfuse.engine.training import trajectories
from kdfuse.engine.training.classification import Classification
from kdfuse.engine.training.ranks import Group
from kdfuse.engine.training.start import train
from kdfuse.engine.training.trajectories import divergence, entropy

pytestmark = pytest.mark.slow(12)

ALONE = Group(0, 1, torch.device("cpu"))
FAMILIES = ("kl_", "softened_kl_", "entropy_", "agreement_")


def open_task(few, method, **changes):
    changes.setdefault("run", {})["eval_batch"] = 16  # 40 images: the last batch is padded
    return closing(Classification(tiny(few, method, **changes), ALONE))


def measured(found):
    return {name: value for name, value in found.items() if name.startswith(FAMILIES)}


def predictions(task):
    """{name: (images, classes) float64 logits}, the teacher's among them."""
    networks = task.networks
    all_of_them = {**networks.evaluated(), "teacher": (networks.teacher, "teacher")}
    rows = {name: [] for name in all_of_them}
    for batch in task.val.epoch(0):
        for name, (network, role) in all_of_them.items():
            logits = networks.predict(network, role, batch.images)[: batch.valid]
            rows[name].append(logits.double().numpy())
    return {name: np.concatenate(found) for name, found in rows.items()}


def softmax(logits):
    raised = np.exp(logits - logits.max(1, keepdims=True))
    return raised / raised.sum(1, keepdims=True)


def by_hand(logits, pairs, temperature):
    kl = lambda p, q: (p * np.log(p / q)).sum(1).mean()  # noqa: E731
    found = {}
    for name, t in (("kl", 1.0), ("softened_kl", temperature)):
        p = {network: softmax(own / t) for network, own in logits.items()}
        found |= {f"{name}_{a}_to_{b}": kl(p[a], p[b]) for a, b in pairs}
    for network, own in logits.items():
        p = softmax(own)
        found[f"entropy_{network}"] = -(p * np.log(p)).sum(1).mean()
        if network != "teacher":
            same = own.argmax(1) == logits["teacher"].argmax(1)
            found[f"agreement_{network}"] = 100 * same.mean()
    return found


def test_they_are_what_their_formulas_say(few):
    """Networks that differ: the student has taken steps."""
    with open_task(
        few, {"name": "slkd", "slts": 2, "temperature": 3.0}, optim={"ema": 0.5}
    ) as task:
        for batch in task.epoch(0, 0):
            task.state.begin(0.05, task.schedule(0, 0))
            task.step(batch)
        found = task.evaluate()
        taught = ("student", "slt0", "slt1", "ema")
        pairs = [("teacher", name) for name in taught] + [("slt0", "student"), ("slt1", "student")]
        expected = by_hand(predictions(task), pairs, 3.0)
    assert measured(found) == pytest.approx(expected, rel=1e-4, abs=1e-7)
    assert expected["kl_teacher_to_student"] > 1e-3
    assert set(found) - set(expected) == {
        f"{who}top{k}" for who in ("", "slt0_", "slt1_", "ema_") for k in (1, 5)
    }


def test_of_students_beside_each_other_each_has_its_own_temperature(few):
    also = {"soft": {"method": {"name": "kd", "temperature": 2.0}, "student": {"name": "resnet8"}}}
    with open_task(few, {"name": "kd", "temperature": 1.0}, also=also) as task:
        found = measured(task.evaluate())
        pairs = [("teacher", "student"), ("teacher", "soft_student")]
        expected = by_hand(predictions(task), pairs, 2.0)
    del expected["softened_kl_teacher_to_student"]  # it is at T = 1
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_a_student_that_is_its_teacher_agrees_in_all(few):
    with open_task(few, "kd") as task:
        own = task.networks.teacher
        task.networks.main.student = own
        found = measured(task.evaluate())
    assert found["kl_teacher_to_student"] == found["softened_kl_teacher_to_student"] == 0.0
    assert found["agreement_student"] == 100.0
    assert found["entropy_student"] == found["entropy_teacher"] <= log(10) + 1e-6


def test_certainty_and_ignorance():
    certain = torch.tensor([[0.0, -torch.inf, -torch.inf, -torch.inf]])
    ignorant = torch.full((1, 4), -log(4))
    assert divergence(certain, ignorant).item() == pytest.approx(log(4))
    assert entropy(certain).item() == 0.0 and entropy(ignorant).item() == pytest.approx(log(4))
    assert divergence(ignorant, certain).item() == torch.inf


@pytest.mark.parametrize("checked", [True, False], ids=["new", "resumed"])
def test_the_teacher_runs_over_the_set_once(checked, few):
    """With the check before the first step, or, in a run that goes on, in its first evaluation."""
    with open_task(few, "kd") as task:
        calls = []
        task.networks.teacher.register_forward_hook(lambda *_: calls.append(1))
        if checked:
            task.check_teachers()
        first = task.evaluate()
        assert len(calls) == 3  # batches
        assert task.evaluate() == first and len(calls) == 3


def test_runs_without_such_a_teacher_have_none(few, monkeypatch, capsys):
    with open_task(few, "ce") as task:
        assert not measured(task.evaluate())
    with open_task(few, "ofd") as task:
        assert not measured(task.evaluate())
        assert "changes its BatchNorm statistics" in capsys.readouterr().out
    monkeypatch.setattr(trajectories, "ROOM", 40 * 10 * 4 - 1)
    with open_task(few, "kd") as task:
        assert not measured(task.evaluate())
        assert "its answers would take" in capsys.readouterr().out
    monkeypatch.setattr(trajectories, "ROOM", 40 * 10 * 4)
    with open_task(few, "kd") as task:
        assert measured(task.evaluate())


def test_a_run_logs_them_and_is_judged_by_accuracy_alone(few, tmp_path):
    folder = train(tiny(few, "slkd"), tmp_path / "run")
    *_, before, end = read(folder / "log.jsonl")
    assert before["kind"] == "epoch" and 0 <= before["agreement_slt1"] <= 100
    assert {"kl_slt0_to_student", "softened_kl_slt0_to_student", "entropy_teacher"} <= set(before)
    assert not measured(end) and {"last_top1", "best_top1"} <= set(end)
