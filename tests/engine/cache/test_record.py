"""A teacher that was recorded: the views are the run's own, whoever records them and however often
it is stopped, and a student learns from it what it learns from the teacher."""

import json
import os
import shutil
import signal
from functools import cache as once
from importlib.util import find_spec

import pytest
import torch
from disks import fill, small_disk
from processes import begin, together
from same import assert_same_run
from tiny import tiny

from kdfuse.engine.cache import shards
from kdfuse.engine.cache.header import NAME, read
from kdfuse.engine.cache.replay import Recorded
from kdfuse.engine.cache.shards import CacheError
from kdfuse.engine.data.sources import open_source
from kdfuse.engine.models import create
from kdfuse.engine.run.checkpoint import load
from kdfuse.engine.run.lease import held
from kdfuse.engine.training import classification, recording
from kdfuse.engine.training.build import frozen
from kdfuse.engine.training.classification import Classification
from kdfuse.engine.training.ranks import join
from kdfuse.engine.training.recording import record
from kdfuse.engine.training.start import train

pytestmark = pytest.mark.slow(30)

LOADERS = ["torchvision"] + (["dali"] if find_spec("nvidia.dali") else [])
STEPS = 10
STANDARDISED = {"name": "kd", "standardise": True}
EXACT = {"number": "float32"}


def recipe_of(root, method="kd", cache=None, **changes):
    data = {"loader": "torchvision", "augment": "random_resized_crop", **changes.pop("data", {})}
    run = {"batch": 32, "subset": 16, **changes.pop("run", {})}
    data["subset"] = run.pop("subset")
    optim = {"lr": 0.05, **changes.pop("optim", {})}
    weights = root.parent / "teacher.pth"
    if not weights.exists():
        torch.manual_seed(1)
        torch.save(create("resnet8", 10).state_dict(), weights)
    changes.setdefault("teacher", {"name": "resnet8", "checkpoint": weights})
    return tiny(root, method, cache=cache or EXACT, data=data, run=run, optim=optim, **changes)


def from_cache(recipe, folder):
    """The same recipe with a cache in place of its teacher."""
    plain = recipe.model_dump()
    plain["teacher"] |= {"cache": folder, "checkpoint": None}
    return type(recipe).model_validate(plain)


@pytest.fixture(autouse=True)
def short_shards(monkeypatch):
    monkeypatch.setattr(shards, "ROWS", 64)  # two steps


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")}


@pytest.fixture(scope="module")
def recorded(digits, tmp_path_factory):
    """The cache of a recipe, recorded once."""

    @once
    def made(method="kd", **words):
        folder = tmp_path_factory.mktemp("cache") / "c"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shards, "ROWS", 64)
            record(recipe_of(digits, method, cache=EXACT | words), folder)
        return folder

    return made


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(
    "method",
    [*("kd", "dkd", "nkd", "wttm", "slkd", "dist", "wsld", "ctkd"), STANDARDISED],
    ids=str,
)
def test_a_student_ends_with_the_bytes_of_the_live_teachers(method, loader, digits, tmp_path):
    if loader == "dali" and method not in ("kd", "slkd"):
        pytest.skip("the loader knows nothing of the method")
    of_data = {"loader": loader, "flip": True}
    of_data |= {"mixup": 0.4, "cutmix": 1.0} if method in ("kd", "slkd", "wttm") else {}
    run = {"accumulate": 2 if method == "wttm" else 1}
    recipe = recipe_of(digits, method, data=of_data, optim={"ema": 0.9}, run=run)
    record(recipe, tmp_path / "cache")
    live = train(recipe, tmp_path / "live")
    replayed = train(from_cache(recipe, tmp_path / "cache"), tmp_path / "replayed")
    (one, facts), (other, of_other) = (
        load(run / "checkpoints" / f"step-{STEPS:08d}") for run in (live, replayed)
    )
    assert facts["results"] == of_other["results"]
    for part in ("student", "slts", "ema", "optimizers"):
        torch.testing.assert_close(one[part], other[part], rtol=0, atol=0)


def test_each_batch_is_that_of_the_teacher(digits, recorded):
    """Its images bit by bit, and the answers those of the network to them."""
    recipe = recipe_of(digits)
    live = Classification(recipe, join("cpu"))
    again = Classification(from_cache(recipe, recorded()), join("cpu"))
    again.networks.train()
    for epoch in range(2):
        pairs = zip(live.epoch(epoch, 0), again.epoch(epoch, 0), strict=True)
        for ours, theirs in pairs:
            assert torch.equal(ours.images, theirs.images)
            assert torch.equal(ours.index, theirs.index)
            (answers,) = theirs.answers
            out = live.networks.outputs(ours.images, ours.target, ours.index)["main"]
            assert torch.equal(out.teacher, answers)
    live.close()
    again.close()


@pytest.mark.parametrize("loader", LOADERS)
def test_views_come_again(loader, digits, tmp_path):
    recipe = recipe_of(digits, cache=EXACT | {"views": 2}, data={"loader": loader})
    record(recipe, tmp_path / "cache")
    run = {"epochs": 5, "subset": 16}
    longer = from_cache(recipe_of(digits, data={"loader": loader}, run=run), tmp_path / "cache")
    task = Classification(longer, join("cpu"))
    seen = [[(b.images, b.index, b.answers[0]) for b in task.epoch(e, 0)] for e in range(5)]
    names = [task.images(epoch, 1) for epoch in range(5)]
    task.close()
    for epoch in (2, 3, 4):
        torch.testing.assert_close(seen[epoch], seen[epoch % 2], rtol=0, atol=0)
        assert names[epoch] == names[epoch % 2]
    assert names[0] != names[1] and not torch.equal(seen[0][0][0], seen[1][0][0])


def killed_at(recipe, folder, number):
    usual, made = shards.write, []

    def write(path, *given):
        made.append(path)
        if len(made) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        usual(path, *given)

    recording.write = write
    shards.ROWS = 64
    record(recipe, folder)


@pytest.mark.parametrize("number", [1, 2, 4])
def test_killed_and_begun_again_it_has_the_same_bytes(number, digits, recorded, tmp_path):
    folder = tmp_path / "cache"
    (child,), said = begin(1, killed_at, recipe_of(digits), folder, number)
    child.join()
    assert child.exitcode == -9, said()
    view = folder / "view-00000"
    if view.is_dir():  # what a kill within a file leaves
        (view / "00002.unfinished").write_bytes(b"half")
    with pytest.raises(CacheError, match=r"is not whole, \d of its 6 files are not there yet"):
        Recorded(folder)
    record(recipe_of(digits), folder)
    found = {k: v for k, v in files_of(folder).items() if k.suffix != ".unfinished"}
    assert found == files_of(recorded()) and len(found) == 7


def in_ranks(recipe, folder):
    shards.ROWS = 64
    record(recipe, folder)


@pytest.mark.parametrize("world", [2, 3])
def test_several_processes_write_the_same_files(world, digits, recorded, tmp_path):
    together(world, in_ranks, recipe_of(digits), tmp_path / "cache")
    assert files_of(tmp_path / "cache") == files_of(recorded())


def train_in_ranks(recipe, folder):
    shards.ROWS = 64
    train(recipe, folder)


def test_processes_share_a_cache(digits, recorded, tmp_path):
    """The gradients are those of one process, but for the statistics of BatchNorm."""
    recipe = from_cache(recipe_of(digits, run={"log_every": 1}), recorded())
    together(2, train_in_ranks, recipe, tmp_path / "two")
    live = recipe_of(digits, run={"log_every": 1})
    together(2, train_in_ranks, live, tmp_path / "live")
    for one, other in zip(*(lines_of(tmp_path / run) for run in ("two", "live")), strict=True):
        assert one == other


def lines_of(run):
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["kind"] == "step"]
    return [{k: r[k] for k in ("step", "loss", "kd", "ce", "top1")} for r in steps]


def test_a_run_from_a_cache_goes_on_with_the_same_bytes(digits, recorded, tmp_path):
    recipe = from_cache(recipe_of(digits, run={"checkpoint_every": 3, "keep": 9}), recorded())
    whole = train(recipe, tmp_path / "whole")
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut, symlinks=True)
    for step in (6, 9, 10):
        shutil.rmtree(cut / "checkpoints" / f"step-{step:08d}")
    train(recipe, cut, resume=True)
    assert_same_run(cut, whole, STEPS)


def test_a_resumed_run_keeps_its_cache(digits, recorded, tmp_path):
    recipe = from_cache(recipe_of(digits, run={"checkpoint_every": 3}), recorded())
    run = train(recipe, tmp_path / "run")
    moved = tmp_path / "moved"
    shutil.copytree(recorded(), moved)
    assert train(from_cache(recipe, moved), run, resume=True) == run
    other = recipe_of(digits, cache={"number": "float16"})
    record(other, tmp_path / "other")
    with pytest.raises(ValueError, match="teacher's weights"):
        train(from_cache(recipe, tmp_path / "other"), run, resume=True)


def test_another_seed_or_student_learns_from_the_same_views(digits, recorded, tmp_path):
    """The plan's seed is the cache's."""
    recipe = recipe_of(digits, run={"seed": 7}, student={"name": "resnet14"})
    task = Classification(from_cache(recipe, recorded()), join("cpu"))
    live = Classification(recipe_of(digits), join("cpu"))
    pairs = zip(task.epoch(1, 2), live.epoch(1, 2), strict=True)
    assert all(torch.equal(one.images, other.images) for one, other in pairs)
    task.close()
    live.close()


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"data": {"size": 15}}, "data.size: 16 -> 15"),
        ({"data": {"flip": True}}, "data.flip: False -> True"),
        ({"data": {"mixup": 0.2}}, "data.mixup: 0.0 -> 0.2"),
        ({"run": {"batch": 16}}, "batch: 32 -> 16"),
        ({"run": {"subset": 20}}, r"sources.training images: \w+ -> \w+"),
        ({"data": {"loader": "resident"}}, "sources.loader: torchvision -> resident"),
        ({"teacher": {"name": "resnet14"}}, "has the answers of resnet8, and teacher.name is"),
    ],
)
def test_a_cache_of_other_views_is_refused_with_the_difference(
    changed, line, digits, recorded, tmp_path
):
    recipe = from_cache(recipe_of(digits, **changed), recorded())
    with pytest.raises(CacheError, match=line):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("method", "words", "wrong"),
    [
        (
            {"name": "kd", "temperature": 2.0},
            {"form": "top_k", "k": 4},
            r"set method.temperature=4",
        ),
        ({"name": "dist", "temperature": 4.0}, {"form": "top_k", "k": 4}, "needs all logits"),
        (STANDARDISED, {"form": "sampled", "draws": 4}, "needs all logits"),
        ("dkd", {"form": "top_k", "k": 4}, "cache.label=true"),
        ("slkd", {"form": "top_k", "k": 4, "rest": "bucket"}, "defined for method kd alone"),
        (
            {"name": "wttm", "temperature": 4.0},
            {"form": "sampled", "draws": 4},
            "not: its rows are weighted",
        ),
        (
            {"name": "nkd", "temperature": 4.0},
            {"form": "sampled", "draws": 4, "label": True},
            "at T = 1, not at 4",
        ),
    ],
    ids=str,
)
def test_a_method_that_cannot_learn_from_a_form_says_so(method, words, wrong, digits, tmp_path):
    record(recipe_of(digits, cache=words | {"views": 1}), tmp_path / "cache")
    recipe = from_cache(recipe_of(digits, method), tmp_path / "cache")
    with pytest.raises(CacheError, match=wrong):
        train(recipe, tmp_path / "run")


@pytest.mark.parametrize("name", ["jointrd", "ofd"])
def test_methods_that_need_a_running_teacher_are_refused_by_name(name, digits, tmp_path):
    with pytest.raises(ValueError, match=f"teacher.cache: method {name} needs more of its teacher"):
        tiny(digits, name, teacher={"name": "resnet8", "cache": tmp_path})


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("kd", {"form": "top_k", "k": 4}),
        ("kd", {"form": "top_k", "k": 4, "rest": "bucket"}),
        ("kd", {"form": "sampled", "draws": 4}),
        ("dkd", {"form": "sampled", "draws": 4, "label": True}),
        ("dkd", {"form": "top_k", "k": 4, "label": True}),
        ("slkd", {"form": "sampled", "draws": 4, "keep": 1}),
        ("nkd", {"form": "top_k", "k": 4, "label": True, "rest": "drop"}),
        ({"name": "wttm", "temperature": 4.0}, {"form": "top_k", "k": 4}),
    ],
    ids=str,
)
def test_students_learn_from_every_form(method, words, digits, tmp_path):
    """The loss of the first step is near that of the whole teacher, and a run comes to its end."""
    recipe = recipe_of(digits, method, cache=words, run={"log_every": 1})
    record(recipe, tmp_path / "cache")
    found = steps_of(train(from_cache(recipe, tmp_path / "cache"), tmp_path / "run"))
    live = steps_of(train(recipe, tmp_path / "live"))
    assert len(found) == len(live) == STEPS
    assert found[0]["top1"] == live[0]["top1"]
    # The teacher is nearly uniform, so few of its classes say something else: by at most ln 10,
    # weighted as the loss weighs it.
    assert abs(found[0]["loss"] - live[0]["loss"]) < 16 * 2.31 * 2


def steps_of(run):
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == "step"]


def test_two_teachers_are_one_with_their_mean(digits, tmp_path):
    """kd_loss of both at once is, but for a constant, that of their mean."""
    words = {"teachers": [{"name": "resnet14"}], "form": "full", "number": "float32"}
    recipe = recipe_of(digits, cache=words | {"views": 1})
    header = record(recipe, tmp_path / "cache")
    assert header.teachers == ("resnet8", "resnet14") and header.form.temperature == 4.0
    (first,) = Recorded(tmp_path / "cache").at(0, 0, range(32))
    networks, _ = frozen(recipe, 10, torch.device("cpu"))
    assert len(networks.teach(torch.zeros(2, 3, 16, 16, dtype=torch.uint8))[0]) == 2
    assert first.shape == (32, 10) and (first <= 0).all()
    torch.testing.assert_close((first / 4).exp().sum(1), torch.ones(32))
    with pytest.raises(ValueError, match=r"cache.teachers.0.trained_by: only the recipe's own"):
        trained_by = {"name": "resnet14", "trained_by": "digits/ce:resnet8"}
        record(recipe_of(digits, cache={"teachers": [trained_by]}), tmp_path / "c2")


def damage(kind, path):
    held = path.read_bytes()
    at = {"rows": 5, "trailer": len(held) - 60, "end": len(held) - 4}.get(kind)
    if at is not None:
        held = held[:at] + bytes([held[at] ^ 4]) + held[at + 1 :]
    path.write_bytes({"cut": held[:-7], "emptied": b"", "longer": held + b"x"}.get(kind, held))


@pytest.mark.parametrize("kind", ["rows", "trailer", "end", "cut", "emptied", "longer"])
def test_a_damaged_file_is_named(kind, digits, recorded, kd, tmp_path):
    folder = tmp_path / "cache"
    shutil.copytree(recorded(), folder)
    path = folder / "view-00001" / "00002.shard"
    damage(kind, path)
    done = kd("cache", "check", folder)
    assert done.code == 2 and str(path) in done.err.replace("\n", "")
    if kind != "rows":  # which are not read before they are used
        with pytest.raises(CacheError, match="00002.shard: it"):
            Recorded(folder)
    path.unlink()
    record(recipe_of(digits), folder)
    assert files_of(folder) == files_of(recorded())


def test_a_file_that_is_cut_off_while_a_run_reads_it_is_named(recorded, tmp_path):
    folder = tmp_path / "cache"
    shutil.copytree(recorded(), folder)
    cache = Recorded(folder)
    path = folder / "view-00000" / "00001.shard"
    os.truncate(path, 500)
    with pytest.raises(CacheError, match="00001.shard: it was cut off since the run began"):
        cache.at(0, 2, range(32))
    path.unlink()
    with pytest.raises(CacheError, match="No such file or directory; it was there when"):
        cache.at(0, 2, range(32))
    assert len(cache.at(0, 1, range(8, 20))[0]) == 12


def test_one_command_records_in_a_folder_at_a_time(digits, recorded, tmp_path):
    folder = tmp_path / "cache"
    with held(folder), pytest.raises(ValueError, match="another process is training there"):
        record(recipe_of(digits), folder)
    record(recipe_of(digits), folder)
    assert files_of(folder) == files_of(recorded())


def test_measuring_steps_from_a_cache_is_refused(recorded, digits, tmp_path):
    recipe = from_cache(recipe_of(digits), recorded())
    with pytest.raises(ValueError, match=r"teacher\.cache: its answers are to the views of a run"):
        classification.begin(recipe, join("cpu"), 10, torch.zeros(160, dtype=torch.int64), {})


def test_a_file_in_anothers_place_is_named(recorded, tmp_path):
    folder = tmp_path / "cache"
    shutil.copytree(recorded(), folder)
    shutil.copy(folder / "view-00000" / "00000.shard", folder / "view-00001" / "00000.shard")
    with pytest.raises(CacheError, match="belongs to another cache, or to another place"):
        Recorded(folder)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"version": 1}', '{"version": 2}', "[" * 100_000, "1e999"]
)
def test_a_damaged_header_is_one_message(text, recorded, tmp_path):
    folder = tmp_path / "cache"
    shutil.copytree(recorded(), folder)
    (folder / NAME).write_text(text)
    with pytest.raises(CacheError, match=r"cache.json: (damaged|of another version)"):
        read(folder)


def test_a_folder_with_something_else_is_refused(digits, recorded, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CacheError, match="not empty, it has file"):
        record(recipe_of(digits), tmp_path)
    folder = tmp_path / "cache"
    shutil.copytree(recorded(), folder)
    with pytest.raises(CacheError, match="another cache is there.*\n  data.flip: False -> True"):
        record(recipe_of(digits, data={"flip": True}), folder)
    with pytest.raises(ValueError, match=r"teacher\.cache: tmp|teacher\.cache: .* is no cache"):
        Recorded(tmp_path)


def test_a_full_disk_leaves_what_was_recorded(digits, recorded, tmp_path):
    recipe = recipe_of(digits)
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        folder = disk / "cache"
        record(recipe_of(digits), folder)
        (folder / "view-00001" / "00001.shard").unlink()
        filler = fill(disk, left=4096)  # for the lease
        with pytest.raises(OSError, match=r"No space left.*00001.shard"):
            record(recipe, folder)
        filler.unlink()
        record(recipe, folder)
        assert files_of(folder) == files_of(recorded())


def test_an_image_that_could_not_be_read_stays_out_and_one_that_cannot_now_is_named(
    digits, tmp_path, monkeypatch
):
    root = tmp_path / "digits"
    shutil.copytree(digits, root)
    recipe = recipe_of(root, data={"bad_images": 5})
    images = open_source(recipe.data, "train")
    first, second = (root / images.name(row) for row in (3, 60))
    whole = first.read_bytes()

    def without(module, path):
        """Cut a file behind the listing of all of them."""
        make = module.make_loader

        def made(*given, **options):
            path.write_bytes(whole[:90])
            return make(*given, **options)

        monkeypatch.setattr(module, "make_loader", made)

    without(recording, first)
    with pytest.warns(UserWarning, match=first.name):
        record(recipe, tmp_path / "cache")
    first.write_bytes(whole)
    assert list(Recorded(tmp_path / "cache").unreadable) == [3]
    # Only the file of each view that was to have it says so, whatever was found before.
    says = [b'"unreadable": {"3": ' in p.read_bytes() for p in tmp_path.rglob("*.shard")]
    assert says.count(True) == 2 and len(says) == 6
    learner = from_cache(recipe, tmp_path / "cache")
    train(learner, tmp_path / "run")
    without(classification, second)
    with (
        pytest.warns(UserWarning, match=second.name),
        pytest.raises(CacheError, match=rf"{second.name}, which cannot be read now"),
    ):
        train(learner, tmp_path / "other")


def test_the_command_line(digits, kd, tmp_path):
    words = ("data.root=" + str(digits), "data.subset=16", "run.epochs=2", "run.batch=32")
    words += ("run.teacher_at_chance=allow", "teacher.trained_with=[run.epochs=1]")
    words += ("run.device=cpu", "run.threads=1")
    out = tmp_path / "c"
    done = kd("cache", "digits/kd", *words, "--out", out, "cache.form=sampled", "cache.draws=4")
    assert done.code == 0, done.err
    assert f"{out}: resnet20: sampled at T = 4, " in done.out
    done = kd("cache", "show", out)
    assert done.code == 0 and "4 draws, 0 of the largest exact" in done.out
    assert "2 of 160 images, in batches of 32" in done.out
    done = kd("cache", "check", out)
    assert done.code == 0 and "every file is as it was written" in done.out
    done = kd("train", "digits/kd", *words, f"teacher.cache={out}", "--out", tmp_path / "run")
    assert done.code == 0, done.err
    for wrong in (("cache", "digits/ce"), ("cache", "show", tmp_path)):
        assert kd(*wrong).code == 2
