"""`kdfuse bench step` of what was recorded: the answers are read as a run reads them."""

import json

import pytest
import torch
from tiny import tiny

from kdfuse.engine.bench.step import run as bench
from kdfuse.engine.bench.step.answers import Answers
from kdfuse.engine.bench.step.cases import chosen
from kdfuse.engine.bench.step.peer import why_not
from kdfuse.engine.cache.replay import Recorded
from kdfuse.engine.models import create
from kdfuse.engine.recipe.load import Recipe
from kdfuse.engine.training.recording import record
from kdfuse.engine.training.start import train

pytestmark = pytest.mark.slow(15)

EPOCHS = 2
SYNTHETIC = ["data.source=synthetic", "data.root=null", "data.loader=auto"]


@pytest.fixture(scope="module")
def recorded(few, tmp_path_factory):
    """A recipe of SLKD, the cache of its teacher `c` and the record of its SL-Ts `s`, all there."""
    folder = tmp_path_factory.mktemp("answers")
    torch.manual_seed(1)
    torch.save(create("resnet8", 10).state_dict(), folder / "teacher.pth")
    teacher = {"name": "resnet8", "checkpoint": folder / "teacher.pth"}
    run = {"epochs": EPOCHS, "threads": 1, "record": folder / "s"}
    method = {"name": "slkd", "slts": 2}
    recipe = tiny(few, method, teacher=teacher, run=run, cache={"number": "int8"})
    record(recipe, folder / "c")
    train(recipe, folder / "run")
    plain = recipe.model_dump(mode="json")
    plain["run"]["record"], plain["cache"], plain["data"]["classes"] = None, {}, 10
    plain["teacher"]["checkpoint"] = None  # bench step draws it; the record knows the difference
    (folder / "slkd.yaml").write_text(json.dumps(plain))
    return folder, plain


def test_they_come_in_the_order_of_the_steps_and_begin_again(recorded):
    folder, plain = recorded
    teacher, slt = plain["teacher"] | {"cache": folder / "c"}, {"record": folder / "s"}
    recipe = Recipe.model_validate(plain | {"teacher": teacher, "slt": slt})
    answers, cache = Answers(recipe, 10, torch.device("cpu")), Recorded(folder / "c")
    assert answers
    steps, whole = cache.header.steps, range(recipe.run.batch)
    for step in [*range(EPOCHS * steps), 0]:
        of_teacher, of_slts = answers()
        (wanted,) = cache.at(step // steps, step % steps, whole)
        assert torch.equal(of_teacher, wanted) and of_slts.shape == wanted.shape
    assert not Answers(Recipe.model_validate(plain), 10, torch.device("cpu"))


def test_steps_with_and_without_stand_beside_each_other(recorded):
    folder, plain = recorded
    words = [str(folder / "slkd.yaml"), "--device", "cpu", "--seconds", "0", "--workers", "0"]
    both = ["--beside", f"teacher.cache={folder / 'c'}", f"slt.record={folder / 's'}"]
    _, live, found = bench.run(bench.arguments([*words, *both]))
    assert set(live["parts_ms"]) == {"student", "teacher", "slt"}
    assert set(found["parts_ms"]) == {"student"} and found["beside"] == both[1:]
    assert 0 < found["reading_share"] < 1 and "reading_share" not in live
    assert found["flops"] < live["flops"] / 2  # one network trains in place of three, none runs
    assert "times_peer" in live and "no plain loop was measured" in found["peer_absent"]
    (alone,) = chosen(words[0], both[1:], None, "cpu")
    assert why_not(alone) == "the plain loop knows no teacher.cache, no slt.record"


@pytest.mark.parametrize(
    "words, message",
    [
        (["run.batch=16"], "run.batch=16: .* was recorded with 64"),
        ([*SYNTHETIC, "data.classes=9"], "data.classes=9: .* was recorded with 10"),
        (["teacher.cache=nowhere"], "nowhere is no cache"),
        (["--cases", "teacher"], "--cases teacher: tiny has a cache of it"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(recorded, words, message):
    folder, _ = recorded
    cached = [] if "teacher.cache" in words[0] else [f"teacher.cache={folder / 'c'}"]
    with pytest.raises(ValueError, match=message):
        bench.run(bench.arguments([str(folder / "slkd.yaml"), *cached, *words]))
