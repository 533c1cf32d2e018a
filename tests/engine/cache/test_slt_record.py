"""Self-learning teachers that were recorded as they learned: a student learns from the record what
it learned beside them, and the record is the same however often the run was killed."""

import json
import os
import shutil
import signal
from functools import cache as once
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from disks import fill, small_disk
from processes import begin, together
from same import assert_same
from tiny import tiny

from kdfuse.engine.cache import shards
from kdfuse.engine.cache.forms import Form
from kdfuse.engine.cache.shards import CacheError
from kdfuse.engine.cache.slts import RecordedSlts
from kdfuse.engine.data.sources import open_source
from kdfuse.engine.methods import METHODS, Outputs
from kdfuse.engine.models import create
from kdfuse.engine.recipe.load import Recipe
from kdfuse.engine.run.checkpoint import load
from kdfuse.engine.training import classification, slt_record
from kdfuse.engine.training.classification import Classification
from kdfuse.engine.training.meters import Diverged
from kdfuse.engine.training.ranks import join
from kdfuse.engine.training.recording import record
from kdfuse.engine.training.start import train

pytestmark = pytest.mark.slow(60)

STEPS = 10
SLKD = {"name": "slkd", "slts": 2, "fusion": [0.25, 0.75]}


def recipe_of(root, **changes):
    """Two epochs of five steps of 32 digits; a record's files have two steps, or one."""
    data = {"flip": True, **changes.pop("data", {})}
    run = {"batch": 32, "speed": "exact", "log_every": 1, **changes.pop("run", {})}
    data["subset"] = run.pop("subset", 16)
    weights = root.parent / "slt-teacher.pth"
    if not weights.exists():
        torch.manual_seed(1)
        torch.save(create("resnet8", 10).state_dict(), weights)
    changes = {"teacher": {"name": "resnet8", "checkpoint": weights}, **changes}
    changes["cache"] = {"number": "float32", **changes.pop("cache", {})}
    return tiny(root, SLKD | changes.pop("method", {}), data=data, run=run, **changes)


def recording(recipe, folder):
    return changed(recipe, run={"record": folder})


def replaying(recipe, folder, cache=None, **sections):
    """The same recipe from a record of its SL-Ts, and from a cache of its teacher."""
    teacher = {} if cache is None else {"cache": cache, "checkpoint": None}
    return changed(recipe, slt={"record": folder}, teacher=teacher, **sections)


def changed(recipe, **sections):
    plain = recipe.model_dump()
    for name, values in sections.items():
        plain[name] = (plain[name] or {}) | values
    return Recipe.model_validate(plain)


@pytest.fixture(autouse=True)
def short_shards(monkeypatch):
    monkeypatch.setattr(shards, "ROWS", 64)  # two steps


@pytest.fixture(scope="module")
def recorded(digits, tmp_path_factory):
    """The run of a recipe that records, and its record, made once."""

    @once
    def made(form="full"):
        root = tmp_path_factory.mktemp("recorded")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shards, "ROWS", 64)
            cache = {"form": form} | ({"number": "float32"} if form == "full" else {})
            train(recording(recipe_of(digits, cache=cache), root / "said"), root / "run")
        return root

    return made


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")}


def last(run):
    return load(run / "checkpoints" / f"step-{STEPS:08d}")


def steps_of(run):
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == "step"]


@pytest.mark.parametrize(
    "changes",
    [
        {"optim": {"ema": 0.9}},
        {"data": {"mixup": 0.4, "cutmix": 1.0}, "run": {"accumulate": 2}},
        {"method": {"teachers": "slts"}},
        # Both draw random numbers in each step.
        {
            "student": {"name": "torchvision:squeezenet1_1"},
            "slt": {"name": "torchvision:squeezenet1_1"},
        },
    ],
    ids=["plain", "mixed", "slts", "dropout"],
)
def test_a_student_ends_with_the_bytes_of_the_live_slts(changes, digits, tmp_path):
    if "student" in changes:
        changes = changes | {"data": {"size": 32}, "optim": {"lr": 1e-3}}
    recipe = recipe_of(digits, **changes)
    record(recipe, tmp_path / "cache")
    live = train(recording(recipe, tmp_path / "said"), tmp_path / "live")
    again = replaying(recipe, tmp_path / "said", tmp_path / "cache")
    replayed = train(again, tmp_path / "replayed")
    (one, facts), (other, of_other) = last(live), last(replayed)
    assert one["slts"] and other["slts"] == [] and list(other["optimizers"]) == ["student"]
    for part in ("student", "ema", "rng"):
        assert_same(one[part], other[part])
    assert_same(one["optimizers"]["student"], other["optimizers"]["student"])
    assert facts["results"] == of_other["results"]
    for ours, theirs in zip(steps_of(live), steps_of(replayed), strict=True):
        shared = ("fused_kd", "ce", "top1", *(["kd"] if "kd" in ours else []))
        assert all(ours[name] == theirs[name] for name in shared)
        assert "slt0_kd" in ours and "slt0_kd" not in theirs


def test_the_teacher_may_be_recorded_while_the_slts_are(digits, recorded, tmp_path):
    recipe = recipe_of(digits)
    record(recipe, tmp_path / "cache")
    taught = changed(recipe, teacher={"cache": tmp_path / "cache", "checkpoint": None})
    train(recording(taught, tmp_path / "said"), tmp_path / "run")
    assert files_of(tmp_path / "said") == files_of(recorded() / "said")
    # And the teacher may run while the SL-Ts are a record.
    train(replaying(recipe, tmp_path / "said"), tmp_path / "other")
    assert_same(last(tmp_path / "other")[0]["student"], last(tmp_path / "run")[0]["student"])


def test_the_first_rows_are_the_fused_logits_of_the_slts(digits, recorded):
    """In training mode, on the first batch, with the weights that they begin with."""
    task = Classification(recipe_of(digits), join("cpu"))
    batch = next(iter(task.epoch(0, 0)))
    out = task.networks.outputs(batch.images, batch.target, batch.index)["main"]
    task.close()
    fused = 0.25 * out.slts[0].double() + 0.75 * out.slts[1].double()
    (found,) = RecordedSlts(recorded() / "said").at(0, 0, range(32))
    torch.testing.assert_close(found.double(), fused, rtol=1e-6, atol=1e-6)


def test_recording_changes_a_run_within_rounding(digits, recorded, tmp_path):
    train(recipe_of(digits), tmp_path / "run")
    pairs = list(zip(steps_of(tmp_path / "run"), steps_of(recorded() / "run"), strict=True))
    for plain, with_record in pairs[:3]:
        losses = [k for k in plain if k.endswith(("loss", "kd", "ce"))]
        assert {"loss", "kd", "fused_kd", "ce", "slt0_kd", "slt1_ce"} <= set(losses)
        for name in losses:
            assert with_record[name] == pytest.approx(plain[name], rel=1e-3), name
    names = [set(steps) - {"time", "images_per_s", "data_wait"} for steps in pairs[0]]
    assert names[0] == names[1]


def test_another_student_of_another_seed_learns_from_it(digits, recorded, tmp_path, capsys):
    recipe = recipe_of(digits, student={"name": "resnet14"}, run={"seed": 7, "stop_epoch": 1})
    train(replaying(recipe, recorded() / "said"), tmp_path / "run")
    assert "1 of 2 epochs" in capsys.readouterr().out
    found = steps_of(tmp_path / "run")
    assert len(found) == 5 and found[-1]["loss"] < found[0]["loss"]
    task = Classification(replaying(recipe, recorded() / "said"), join("cpu"))
    live = Classification(recipe_of(digits), join("cpu"))
    pairs = zip(task.epoch(0, 2), live.epoch(0, 2), strict=True)
    assert all(torch.equal(one.images, other.images) for one, other in pairs)
    assert not task.networks.main.slts
    task.close()
    live.close()


def kl(taught, z, temperature):
    p = (taught.double() / temperature).softmax(1)
    log_q = (z.double() / temperature).log_softmax(1)
    return temperature**2 * F.kl_div(log_q, p, reduction="batchmean")


@pytest.mark.parametrize(
    ("form", "near"),
    [
        (Form("full", 100, None, "float32"), 1e-6),
        (Form("full", 100, None, "float16"), 1e-3),
        (Form("full", 100, None, "int8"), 1e-2),
        (Form("top_k", 100, 4.0, k=60, rest="spread"), 0.1),
    ],
    ids=["float32", "float16", "int8", "top_k"],
)
def test_the_loss_of_each_form_is_near_the_formula(form, near):
    """In float64, of logits with a spread of 3 over 100 classes."""
    chance = torch.Generator().manual_seed(0)
    z, t, s0, s1 = 3 * torch.randn(4, 64, 100, generator=chance)
    target = torch.randint(0, 100, (64,), generator=chance)
    method = METHODS["slkd"](
        ce_weight=0.2, kd_weight=0.8, fused_ce_weight=0.5, fused_kd_weight=0.6, fusion=[0.25, 0.75]
    )
    rows = form.encode(method.fuse([s0, s1]), target, target)
    out = Outputs(student=z, teacher=t, fused=form.answer(form.decode(rows)))
    fused = 0.25 * s0.double() + 0.75 * s1.double()
    expected = 0.7 * F.cross_entropy(z.double(), target) + 0.8 * kl(t, z, 4.0)
    expected = (expected + 0.6 * kl(fused, z, 4.0)).item()
    loss, terms = method.loss(out, target, {})
    assert loss.item() == pytest.approx(expected, rel=near)
    assert terms["fused_kd"].item() == pytest.approx(kl(fused, z, 4.0).item(), rel=2 * near)


def test_drawn_answers_are_right_in_the_mean():
    """The gradient of KD from the fused SL-Ts, over many draws."""
    chance = torch.Generator().manual_seed(0)
    form = Form("sampled", 20, 4.0, draws=4, keep=1)
    z, fused = 3 * torch.randn(2, 4, 20, generator=chance)
    method = METHODS["slkd"](teachers="slts", fused_ce_weight=0.0)
    target, many = torch.zeros(4 * 500, dtype=torch.int64), z.repeat(500, 1).requires_grad_()
    rows = form.encode(fused.repeat(500, 1), target, torch.arange(len(target)))
    out = Outputs(student=many, teacher=many.detach(), fused=form.answer(form.decode(rows)))
    method.loss(out, target, {})[0].backward()
    mean = many.grad.reshape(500, 4, 20).sum(0)
    whole = 4 * ((z / 4).softmax(1) - (fused / 4).softmax(1)) / 4
    assert (mean - whole).abs().max() < 0.02 and whole.abs().max() > 0.1


@pytest.mark.parametrize("form", ["top_k", "sampled"])
def test_students_learn_from_smaller_forms(form, digits, tmp_path):
    words = {"form": form, "number": "float16"} | ({"k": 4} if form == "top_k" else {"draws": 4})
    recipe = recipe_of(digits, cache=words)
    live = train(recording(recipe, tmp_path / "said"), tmp_path / "live")
    run = train(replaying(recipe, tmp_path / "said"), tmp_path / "run")
    for one, other in zip(steps_of(live)[:2], steps_of(run)[:2], strict=True):
        # By at most ln 10 for each of T^2.
        assert abs(one["fused_kd"] - other["fused_kd"]) < 16 * 2.31
        assert one["ce"] == pytest.approx(other["ce"], rel=0.2)
    with pytest.raises(CacheError, match="method.temperature: 4.0 -> 2.0"):
        Classification(
            replaying(recipe, tmp_path / "said", method={"temperature": 2.0}), join("cpu")
        )


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"data": {"size": 15}}, "data.size: 16 -> 15"),
        ({"data": {"flip": False}}, "data.flip: True -> False"),
        ({"data": {"mixup": 0.2}}, "data.mixup: 0.0 -> 0.2"),
        ({"data": {"loader": "resident"}}, "sources.loader: torchvision -> resident"),
        ({"run": {"batch": 16}}, "batch: 32 -> 16"),
        ({"data": {"subset": 20}}, r"sources.training images: \w+ -> \w+"),
        ({"method": {"temperature": 2.0}}, "method.temperature: 4.0 -> 2.0"),
        ({"method": {"slts": 3, "fusion": None}}, r"method.slts: 2 -> 3"),
        ({"method": {"fusion": None}}, r"method.fusion: \[0.25, 0.75\] -> None"),
        ({"run": {"epochs": 3}}, r"has 2 epochs of .* this run has 3; set run.epochs=2"),
        ({"slt": {"name": "resnet14"}}, "answers of resnet8, and slt.name is resnet14"),
        ({"teacher": {"checkpoint": None}}, "learned from another teacher"),
    ],
    ids=str,
)
def test_a_record_of_something_else_is_refused_with_the_difference(
    changes, line, digits, recorded, tmp_path
):
    recipe = changed(replaying(recipe_of(digits), recorded() / "said"), **changes)
    with pytest.raises(CacheError, match=line):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_is_no_record_is_refused(digits, recorded, tmp_path):
    recipe, said = recipe_of(digits), recorded() / "said"
    with pytest.raises(CacheError, match=r"slt.record: .* is no record, it has no cache.json"):
        train(replaying(recipe, tmp_path), tmp_path / "run")
    record(recipe, tmp_path / "cache")
    with pytest.raises(CacheError, match="has the answers of a teacher; give it as teacher.cache"):
        train(replaying(recipe, tmp_path / "cache"), tmp_path / "run")
    taught = changed(recipe, teacher={"cache": said, "checkpoint": None})
    with pytest.raises(CacheError, match="has the answers of SL-Ts; give it as slt.record"):
        train(taught, tmp_path / "run")
    half = tmp_path / "half"
    shutil.copytree(said, half)
    (half / "view-00001" / "00002.shard").unlink()
    with pytest.raises(CacheError, match=r"slt.record: .* is not whole, 1 .*resume=true"):
        train(replaying(recipe, half), tmp_path / "run")


def test_a_cache_and_a_record_are_of_the_same_views(digits, recorded, tmp_path):
    recipe, said = recipe_of(digits), recorded() / "said"
    record(changed(recipe, run={"seed": 3}), tmp_path / "seed")
    with pytest.raises(CacheError, match="views of seed 0, and teacher.cache .* those of 3"):
        train(replaying(recipe, said, tmp_path / "seed"), tmp_path / "run")
    record(changed(recipe, cache={"views": 1}), tmp_path / "one")
    with pytest.raises(CacheError, match="begin again after 2 epochs, and .* after 1"):
        train(replaying(recipe, said, tmp_path / "one"), tmp_path / "run")
    # SL-Ts that learned from few views: each epoch of the record is of the first again.
    taught = changed(recipe, teacher={"cache": tmp_path / "one", "checkpoint": None})
    live = train(recording(taught, tmp_path / "again"), tmp_path / "live")
    task = Classification(replaying(recipe, tmp_path / "again"), join("cpu"))
    first, second = ([b.images for b in task.epoch(epoch, 0)] for epoch in (0, 1))
    task.close()
    assert_same(first, second)
    run = train(replaying(recipe, tmp_path / "again", tmp_path / "one"), tmp_path / "run")
    assert_same(last(run)[0]["student"], last(live)[0]["student"])


OTHER = {"method": {"name": "slkd"}, "student": {"name": "resnet8"}}
RECORDS, REPLAYS = {"run": {"record": "r"}}, {"slt": {"record": "s"}}
DML = {"method": {"name": "dml"}}


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        (DML | RECORDS | {"slt": {"name": "resnet8"}}, "run.record: .* not those of dml"),
        (RECORDS | {"method": {"teachers": "teacher"}}, "run.record: .*method.teachers=both"),
        (RECORDS | {"method": {"detach_slts": False}}, "run.record: .* for this student alone"),
        (RECORDS | REPLAYS, "run.record: slt.record has the answers already"),
        ({"run": {"record": "r", "capture": True}}, "run.record: .* set run.capture=false"),
        (RECORDS | {"cache": {"views": 2}}, "cache.views: 2 has no effect with run.record"),
        (RECORDS | {"cache": {"form": "top_k", "rest": "bucket"}}, "cache.rest: bucket"),
        (RECORDS | {"cache": {"form": "top_k", "label": True}}, "cache.label: KD from"),
        (RECORDS | {"also": {"b": OTHER}}, "run.record: also.b has SL-Ts of its own"),
        (DML | {"slt": {"name": "resnet8", "record": "s"}}, "slt.record: .* not those of dml"),
        ({"method": {"name": "kd"}} | REPLAYS, "slt: method kd has no SL-Ts"),
        (REPLAYS | {"method": {"teachers": "teacher"}}, "slt.record: .*method.teachers=both"),
        (REPLAYS | {"method": {"detach_slts": False}}, "slt.record: .*method.detach_slts=true"),
        ({"slt": {"record": "s", "checkpoint": "w"}}, 'slt.checkpoint: "w" has no effect with'),
        ({"slt": {}}, "name: missing; give a network's name, or record=FOLDER"),
        ({"also": {"b": OTHER | REPLAYS}}, "also.b.slt.record: a run learns from one record"),
        (REPLAYS | {"run": {"compile": True, "compile_only": ["slts"]}}, "slts is not among"),
    ],
    ids=str,
)
def test_a_recipe_that_cannot_be_recorded_or_replayed_says_why(sections, line):
    method = {"name": "slkd"} | sections.get("method", {})
    others = {name: values for name, values in sections.items() if name != "method"}
    with pytest.raises(ValueError, match=line):
        tiny(Path("digits"), method, **others)


def test_detectors_have_no_record():
    with pytest.raises(ValueError, match="run.record: .* has no effect with task detection"):
        Recipe.load("coco/kd", ["run.record=said", "data.root=coco"])


def killed_in(recipe, folder, number):
    """Train until a step's batch is done, and be killed."""
    shards.ROWS = 64
    step = Classification.step

    def until(self, batch):
        terms = step(self, batch)
        if self.state.done + 1 == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return terms

    Classification.step = until
    train(recipe, folder)


@pytest.mark.parametrize(("number", "every"), [(2, None), (8, 3), (9, None)])
def test_killed_and_resumed_it_has_the_same_bytes(number, every, digits, recorded, tmp_path):
    recipe = recipe_of(digits, run={"checkpoint_every": every})
    recipe = recording(recipe, tmp_path / "said")
    (child,), said = begin(1, killed_in, recipe, tmp_path / "run", number)
    child.join()
    assert child.exitcode == -9, said()
    with pytest.raises(CacheError, match="is not whole"):
        RecordedSlts(tmp_path / "said")
    train(recipe, tmp_path / "run", resume=True)
    assert files_of(tmp_path / "said") == files_of(recorded() / "said")
    for part in ("student", "slts"):
        assert_same(last(tmp_path / "run")[0][part], last(recorded() / "run")[0][part])


def test_a_run_goes_on_from_before_what_is_recorded_already(digits, recorded, tmp_path):
    """The newest checkpoints are lost, and files of steps behind them are there."""
    recipe = recording(recipe_of(digits, run={"checkpoint_every": 3, "keep": 9}), tmp_path / "said")
    run = train(recipe, tmp_path / "run")
    for step in (6, 9, 10):
        shutil.rmtree(run / "checkpoints" / f"step-{step:08d}")
    moved = tmp_path / "moved"
    shutil.move(tmp_path / "said", moved)
    train(changed(recipe, run={"record": moved}), run, resume=True)
    assert files_of(moved) == files_of(recorded() / "said")


def test_a_resumed_run_keeps_its_record(digits, tmp_path):
    recipe = recording(recipe_of(digits, run={"checkpoint_every": 3, "keep": 9}), tmp_path / "said")
    run = train(recipe, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "step-00000010")
    with pytest.raises(ValueError, match="SL-Ts: recorded -> None"):
        train(changed(recipe, run={"record": None}), run, resume=True)
    with pytest.raises(CacheError, match="form.number: float32 -> int8"):
        train(changed(recipe, cache={"number": "int8"}), run, resume=True)
    with pytest.raises(CacheError, match="lacks what was recorded from step 0 to 2"):
        train(changed(recipe, run={"record": tmp_path / "empty"}), run, resume=True)
    with pytest.raises(ValueError, match=r"said has a record already.*resume=true"):
        train(recipe, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    train(recipe, run, resume=True)
    RecordedSlts(tmp_path / "said")


def test_a_resumed_run_learns_from_the_same_record(digits, recorded, tmp_path):
    recipe = replaying(recipe_of(digits, run={"checkpoint_every": 3}), recorded() / "said")
    run = train(recipe, tmp_path / "run")
    moved = tmp_path / "moved"
    shutil.copytree(recorded() / "said", moved)
    shutil.rmtree(run / "checkpoints" / "step-00000010")
    train(replaying(recipe, moved), run, resume=True)
    shutil.rmtree(run / "checkpoints" / "step-00000010")
    other = recording(recipe_of(digits, cache={"number": "float16"}), tmp_path / "other")
    train(other, tmp_path / "live")
    with pytest.raises(ValueError, match=r"SL-Ts: [0-9a-f]{12} -> [0-9a-f]{12}\b"):
        train(replaying(recipe, tmp_path / "other"), run, resume=True)


def in_ranks(recipe, folder):
    shards.ROWS = 64
    train(recipe, folder)


def first_halves(recipe):
    """The fused logits of the first batch, each half with BatchNorm's statistics of its own."""
    task = Classification(recipe, join("cpu"))
    batch = next(iter(task.epoch(0, 0)))
    found = []
    for part in (slice(16), slice(16, 32)):
        given = (batch.images[part], batch.target[part], batch.index[part])
        out = task.networks.outputs(*given)["main"]
        found.append(0.25 * out.slts[0] + 0.75 * out.slts[1])
    task.close()
    return torch.cat(found).detach()


def test_two_processes_write_one_record_and_one_goes_on_with_it(digits, tmp_path):
    recipe = recipe_of(digits, run={"checkpoint_every": 3})
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    together(2, in_ranks, recording(recipe, whole), tmp_path / "run")
    (found,) = RecordedSlts(whole).at(0, 0, range(32))
    torch.testing.assert_close(found, first_halves(recipe_of(digits)), rtol=1e-5, atol=1e-5)
    children, _ = begin(2, killed_in, recording(recipe, cut), tmp_path / "killed", 8)
    for child in children:
        child.join(60)
        child.kill()
    train(recording(recipe, cut), tmp_path / "killed", resume=True)
    ours, theirs = RecordedSlts(cut), RecordedSlts(whole)
    for step in range(6):  # of before the checkpoint that one process went on from
        place = step // 5, step % 5, range(32)
        assert torch.equal(ours.at(*place)[0], theirs.at(*place)[0])
    together(2, in_ranks, replaying(recipe, whole), tmp_path / "replayed")
    for one, other in zip(steps_of(tmp_path / "run"), steps_of(tmp_path / "replayed"), strict=True):
        assert one["fused_kd"] == pytest.approx(other["fused_kd"], rel=1e-5)


def test_steps_that_a_run_goes_back_behind_are_recorded_anew(
    digits, recorded, tmp_path, monkeypatch
):
    """The student's logits are infinite in three steps in a row, once; the SL-Ts' are not."""
    step, left = Classification.step, {6, 7, 8}

    def broken(self, batch):
        factor = torch.inf if self.state.done + 1 in left else 1.0
        left.discard(self.state.done + 1)
        student = self.networks.main.student
        handle = student.register_forward_hook(lambda _, x, out: out * factor)
        try:
            return step(self, batch)
        finally:
            handle.remove()

    monkeypatch.setattr(Classification, "step", broken)
    recipe = recipe_of(digits, optim={"skip_limit": 2}, run={"checkpoint_every": 2, "keep": 9})
    run = train(recording(recipe, tmp_path / "said"), tmp_path / "run")
    assert "the run goes back, once" in (run / "log.jsonl").read_text()
    assert files_of(tmp_path / "said") == files_of(recorded() / "said")


def test_a_full_disk_ends_the_run_and_loses_nothing(digits, recorded, tmp_path):
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        recipe = recipe_of(digits, run={"checkpoint_every": 3})
        recipe = recording(recipe, disk / "said")
        (child,), _ = begin(1, killed_in, recipe, tmp_path / "run", 5)
        child.join()
        filler = fill(disk, left=4096)  # for the lease
        with pytest.raises(OSError, match=r"No space left.*\.(rows|of-0-32)"):
            train(recipe, tmp_path / "run", resume=True)
        filler.unlink()
        train(recipe, tmp_path / "run", resume=True)
        assert files_of(disk / "said") == files_of(recorded() / "said")


def test_logits_that_are_not_finite_are_not_recorded(digits, tmp_path, monkeypatch):
    usual = slt_record.SltRecord._take

    def take(self, slts):
        return usual(self, [s * torch.inf for s in slts] if self._step == 6 else slts)

    monkeypatch.setattr(slt_record.SltRecord, "_take", take)
    recipe = recording(recipe_of(digits, run={"checkpoint_every": 3}), tmp_path / "said")
    with pytest.raises(Diverged, match=r"the SL-Ts' logits in step 7 are not finite"):
        train(recipe, tmp_path / "run")
    monkeypatch.undo()
    monkeypatch.setattr(shards, "ROWS", 64)
    train(recipe, tmp_path / "run", resume=True)
    RecordedSlts(tmp_path / "said")


def test_an_image_that_could_not_be_read_stays_out(digits, tmp_path, monkeypatch):
    """One that is cut behind the listing of all of them."""
    root = tmp_path / "digits"
    shutil.copytree(digits, root)
    recipe = recipe_of(root, data={"bad_images": 5})
    path = root / open_source(recipe.data, "train").name(3)
    whole, make = path.read_bytes(), classification.make_loader

    def made(*given, **options):
        path.write_bytes(whole[:90])
        return make(*given, **options)

    monkeypatch.setattr(classification, "make_loader", made)
    with pytest.warns(UserWarning, match=path.name):
        train(recording(recipe, tmp_path / "said"), tmp_path / "live")
    monkeypatch.setattr(classification, "make_loader", make)
    path.write_bytes(whole)
    assert list(RecordedSlts(tmp_path / "said").unreadable) == [3]
    says = [b'"unreadable": {"3": ' in p.read_bytes() for p in tmp_path.rglob("*.shard")]
    assert says.count(True) == 2 and len(says) == 6
    train(replaying(recipe, tmp_path / "said"), tmp_path / "run")
    assert_same(last(tmp_path / "run")[0]["student"], last(tmp_path / "live")[0]["student"])


def test_a_folder_with_something_else_is_refused(digits, tmp_path):
    (tmp_path / "said").mkdir()
    (tmp_path / "said" / "file").write_text("mine")
    with pytest.raises(CacheError, match=r"run.record = .* not empty, it has file"):
        train(recording(recipe_of(digits), tmp_path / "said"), tmp_path / "run")
    with pytest.raises(ValueError, match="run.record: .*run is the run's own folder"):
        train(recording(recipe_of(digits), tmp_path / "run"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_caches_of_teachers_are_as_they_were(digits, tmp_path):
    """What is new in the header of a record is not in theirs, whose files name its digest."""
    record(recipe_of(digits, cache={"views": 1}), tmp_path / "cache")
    assert "slts" not in json.loads((tmp_path / "cache" / "cache.json").read_text())


def test_damage_is_named(digits, recorded, kd, tmp_path):
    folder = tmp_path / "said"
    shutil.copytree(recorded() / "said", folder)
    done = kd("cache", "show", folder)
    assert done.code == 0 and f"slt.record={folder}" in done.out, done.err
    assert "2 x resnet8, fused" in done.out and "temperature     4\n" in done.out
    assert kd("cache", "check", folder).code == 0
    path = folder / "view-00001" / "00001.shard"
    held = path.read_bytes()
    path.write_bytes(held[:5] + bytes([held[5] ^ 4]) + held[6:])
    done = kd("cache", "check", folder)
    assert done.code == 2 and str(path) in done.err.replace("\n", "")
    path.write_bytes(held[:-7])
    with pytest.raises(CacheError, match="00001.shard: it is cut off"):
        RecordedSlts(folder)
