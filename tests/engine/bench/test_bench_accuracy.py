"""The benchmark of accuracy: the plain loop is the engine's training by other means."""

import ast
import json
from pathlib import Path

import pytest
import torch
from tiny import tiny
from torch.nn import functional as F

from kdfuse import dkd_loss, kd_loss
from kdfuse.engine.bench.accuracy import loop, run
from kdfuse.engine.models import create

pytestmark = pytest.mark.slow(15)


def test_the_plain_losses_are_those_of_the_kernels():
    torch.manual_seed(0)
    student, teacher = (3 * torch.randn(16, 10, dtype=torch.float64) for _ in range(2))
    target = torch.randint(10, (16,))
    kd = loop.KD(temperature=4.0, ce_weight=0.1, kd_weight=0.9)
    mine = kd_loss(student, teacher, target, temperature=4.0, ce_weight=0.1, kd_weight=0.9)
    torch.testing.assert_close(kd(student, teacher, target), mine)
    dkd = loop.DKD(temperature=4.0, ce_weight=1.0, alpha=1.0, beta=8.0)
    mine = dkd_loss(student, teacher, target, temperature=4.0, ce_weight=1.0, alpha=1.0, beta=8.0)
    torch.testing.assert_close(dkd(student, teacher, target), mine)
    assert dkd(student, student, target) == pytest.approx(F.cross_entropy(student, target).item())


def test_the_plain_loop_shares_no_code():
    tree = ast.parse(Path(loop.__file__).read_text())
    found = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert not any(node.level or "kdfuse" in (node.module or "") for node in found)


@pytest.fixture(scope="module")
def words(few, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    torch.manual_seed(1)
    torch.save(create("resnet8", 10).state_dict(), folder / "teacher.pth")
    teacher = {"name": "resnet8", "checkpoint": folder / "teacher.pth"}
    recipe = tiny(few, "kd", teacher=teacher, run={"epochs": 2, "speed": "exact"})
    (folder / "kd.yaml").write_text(json.dumps(recipe.model_dump(mode="json")))
    return [str(folder / "kd.yaml"), "--seeds", "2", "--runs", str(folder / "runs")]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_both_train_the_same_and_go_on_where_they_were(words, tmp_path, capsys):
    """Few steps from the same weights on the same images: what differs is rounding."""
    run.main([*words, "--out", str(tmp_path / "a.jsonl")])
    facts, ours, plain = lines(tmp_path / "a.jsonl")
    assert facts["benchmark"] == "accuracy"
    assert [ours["side"], plain["side"]] == ["kdfuse", "plain"]
    assert ours["top1"] == pytest.approx(plain["top1"], abs=3.0)
    assert len(ours["train_s"]) == len(plain["train_s"]) == 2
    run.main([*words, "--out", str(tmp_path / "b.jsonl")])
    assert lines(tmp_path / "b.jsonl")[1:] == [ours, plain]
    capsys.readouterr()


@pytest.mark.parametrize(
    "more, text",
    [
        (["method={name: dkd, warmup: 2}"], "method.warmup=2"),
        (["method={name: nkd}"], "no method nkd"),
        (["optim.ema=0.9"], "optim.ema=0.9"),
        (["teacher.checkpoint=null"], "teacher.checkpoint"),
    ],
)
def test_what_the_plain_loop_cannot_do_is_refused(words, more, text):
    with pytest.raises(ValueError, match=text):
        run.main([words[0], *more])
