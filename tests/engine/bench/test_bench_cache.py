"""The benchmark of recorded teachers: what its sides train, and that it goes on where it was."""

import json

import pytest
import torch
from tiny import tiny

from kdfuse.engine.bench.cache import run as cache
from kdfuse.engine.models import create
from kdfuse.engine.recipe.load import Recipe
from kdfuse.engine.run.past import read_run

pytestmark = pytest.mark.slow(10)

SIDES = ["live", "form=full,number=float32", "form=top_k,k=2,views=1"]


@pytest.fixture(scope="module")
def measured(few, tmp_path_factory):
    """The words of a short run of three sides, and its folder."""
    folder = tmp_path_factory.mktemp("bench")
    torch.manual_seed(1)
    torch.save(create("resnet8", 10).state_dict(), folder / "teacher.pth")
    teacher = {"name": "resnet8", "checkpoint": folder / "teacher.pth"}
    recipe = tiny(few, "kd", teacher=teacher, run={"epochs": 2, "speed": "exact"})
    (folder / "kd.yaml").write_text(json.dumps(recipe.model_dump(mode="json")))
    words = [str(folder / "kd.yaml"), "--seeds", "2", "--runs", str(folder / "runs")]
    cache.main([*words, "--sides", *SIDES, "--out", str(folder / "a.jsonl")])
    return words, folder


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_side_trains_what_it_says(measured):
    words, folder = measured
    facts, live, full, few = lines(folder / "a.jsonl")
    assert facts["benchmark"] == "cache" and [r["side"] for r in (live, full, few)] == SIDES
    assert live["top1"][0] == full["top1"][0]  # the same bytes of weights, on the cache's own plan
    assert "view_bytes" not in live and (full["views"], few["views"]) == (2, 1)
    assert (full["view_bytes"], few["view_bytes"]) == (40, 2 * (2 + 2) + 4)
    assert few["image_bytes"] == few["view_bytes"] and full["image_bytes"] == 80
    for record in (live, full, few):
        assert record["mean"] == pytest.approx(sum(record["top1"]) / 2, abs=1e-3)
        one, other = record["top1"]
        assert record["deviation"] == pytest.approx(abs(one - other) / 2**0.5, abs=1e-3)


def test_begun_again_it_goes_on_with_what_is_there(measured, capsys):
    words, folder = measured
    before = {p: p.stat().st_mtime_ns for p in (folder / "runs").rglob("log.jsonl")}
    assert len(before) == 6
    out = folder / "b.jsonl"
    cache.main([*words, "--sides", *SIDES[:2], "--out", str(out), "--plot", str(folder / "a.svg")])
    assert {p: p.stat().st_mtime_ns for p in before} == before
    for was, now in zip(lines(folder / "a.jsonl")[1:], lines(out)[1:], strict=False):
        assert (was["side"], was["top1"]) == (now["side"], now["top1"])
    capsys.readouterr()
    _, table = cache.main(["--from", str(out), "--markdown"])
    assert "| live | - | - | - |" in table and "| form=full,number=float32 | 40 | 2 | 80 |" in table
    assert "the teacher at work" in (folder / "a.svg").read_text()


def test_self_learning_teachers_are_recorded_too(measured, capsys):
    """From records of both, in float32, the first student is the one beside them."""
    _, folder = measured
    plain = json.loads((folder / "kd.yaml").read_text())
    plain["method"] = {"name": "slkd", "slts": 1}
    (folder / "slkd.yaml").write_text(json.dumps(plain))
    out = folder / "slkd.jsonl"
    words = [str(folder / "slkd.yaml"), "--seeds", "1", "--runs", str(folder / "slkd")]
    cache.main([*words, "--sides", "slts,number=float32", "--out", str(out)])
    (_, found) = lines(out)
    assert (found["views"], found["view_bytes"], found["image_bytes"]) == (2, 80, 160)
    recording = read_run(folder / "slkd" / "slts-number=float32-recording")
    assert recording.last is not None and found["top1"] == [recording.last["top1"]]
    assert found["deviation"] is None


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "bench cache: name a recipe with a teacher, as in digits/kd"),
        (["digits/ce:resnet8"], "digits/ce:resnet8 has no teacher to record"),
        (["coco/nkd"], "coco/nkd has no teacher to record; name a classifier's recipe"),
        (["digits/kd", "--sides", "full"], "--sides full: full is neither live nor a setting"),
        (
            ["digits/kd", "--sides", "slts"],
            "run.record: only the SL-Ts of method slkd are recorded",
        ),
        (["digits/kd", "--sides", "form=half"], "cache.form"),
        (["digits/kd", "--seeds", "0"], "argument --seeds: got 0, wants a whole number, 1 or more"),
        (["digits/kd", "--from", "none.jsonl"], "goes with measuring"),
    ],
    ids=str,
)
def test_what_cannot_be_measured_is_said(words, message):
    with pytest.raises(ValueError, match=message):
        cache.main(words)


def test_a_cache_is_not_given(few, tmp_path):
    (tmp_path / "c").mkdir()
    plain = tiny(few, "kd", teacher={"name": "resnet8", "cache": tmp_path / "c"})
    assert isinstance(plain, Recipe)
    (tmp_path / "kd.yaml").write_text(json.dumps(plain.model_dump(mode="json")))
    with pytest.raises(ValueError, match="teacher.cache: it is recorded here; leave it out"):
        cache.main([str(tmp_path / "kd.yaml")])
