"""Exact resume: a run killed at any moment ends with the bytes of one that was left alone."""

import math
import os
import random
import shutil
from importlib.util import find_spec
from threading import Timer

import pytest
import torch
from processes import CHILDREN
from tiny import tiny

from kdfuse.engine.models import create
from kdfuse.engine.recipe.load import Recipe
from kdfuse.engine.run.checkpoint import load, save
from kdfuse.engine.run.log import read
from kdfuse.engine.training.start import train

pytestmark = pytest.mark.slow(25)

STEPS = 30
CLOCK = ("time", "images_per_s", "data_wait")
LOADERS = [
    "torchvision",
    pytest.param(
        "dali", marks=pytest.mark.skipif(find_spec("nvidia.dali") is None, reason="needs DALI")
    ),
]


def recipe_of(root, loader, method="slkd", **changes):
    """Three epochs of ten steps; checkpoints and records fall inside the epochs."""
    run = {"epochs": 3, "batch": 32, "log_every": 3, "checkpoint_every": 4, "keep": 9}
    data = {"loader": loader, **changes.pop("data", {})}
    optim = {"lr": 0.05, "ema": 0.9, "schedule": "cosine", **changes.pop("optim", {})}
    run |= changes.pop("run", {})
    return tiny(root, method, data=data, optim=optim, run=run, **changes)


@pytest.fixture(scope="module")
def whole(digits, tmp_path_factory):
    """The finished run that nothing happened to, by loader."""
    made = {}

    def run(loader):
        if loader not in made:
            out = tmp_path_factory.mktemp("whole") / "run"
            assert attempt(recipe_of(digits, loader), out)[0] == 0
            made[loader] = out
        return made[loader]

    return run


def child(recipe, out, pipe):
    os.dup2(pipe.fileno(), 1)
    os.dup2(pipe.fileno(), 2)
    train(recipe, out, resume=True)


def attempt(recipe, out, lines=None, seconds=0.0):
    """Train in a child, which is killed `seconds` after it wrote so many lines.

    Returns its exit code (-9 when it was killed) and what it wrote.
    """
    reader, writer = CHILDREN.Pipe(duplex=False)
    process = CHILDREN.Process(target=child, args=(recipe, out, writer))
    process.start()
    writer.close()
    written = []
    with os.fdopen(os.dup(reader.fileno()), errors="replace") as output:
        if lines == 0:
            Timer(seconds, process.kill).start()
        for line in output:
            written.append(line)
            if len(written) == lines:
                Timer(seconds, process.kill).start()
    reader.close()
    process.join()
    return process.exitcode, "".join(written)


def assert_same(one, other, where="state"):
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert list(one) == list(other), where
        for key in one:
            assert_same(one[key], other[key], f"{where}[{key!r}]")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{where}[{i}]")
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and one.shape == other.shape, where
        one, other = (t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other))
        assert torch.equal(one, other), where
    else:
        assert one == other or (math.isnan(one) and math.isnan(other)), where


def records(run):
    kept = [record for record in read(run / "log.jsonl") if record["kind"] != "note"]
    return [{k: v for k, v in record.items() if k not in CLOCK} for record in kept]


def assert_same_run(run, whole, steps=STEPS):
    for name in (f"step-{steps:08d}", "best"):
        for mine, theirs in zip(
            load(run / "checkpoints" / name), load(whole / "checkpoints" / name), strict=True
        ):
            assert_same(mine, theirs)
    assert records(run) == records(whole)
    assert records(run)[-1]["kind"] == "end" and records(run)[-1]["step"] == steps
    assert (run / "report.html").exists()


@pytest.mark.parametrize("loader", LOADERS)
def test_killed_at_any_moment_it_ends_the_same(loader, digits, whole, tmp_path):
    chance = random.Random(f"kill {loader}")
    kills, out = 0, tmp_path / "run"
    for lines in (0, 1, 3, 6, 5):
        code, text = attempt(
            recipe_of(digits, loader), out, lines, chance.uniform(0, 0.1 if lines else 1.0)
        )
        assert code in (-9, 0), text
        kills += code == -9
    code, text = attempt(recipe_of(digits, loader), out)
    assert code == 0, text
    assert kills >= 4
    assert "resumed from step-" in text
    assert_same_run(out, whole(loader))


def cut(whole, out, step):
    """A copy of a run as it was after `step`: later checkpoints never came."""
    shutil.copytree(whole, out)
    for path in (out / "checkpoints").glob("step-*"):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    return out


def truncate(file):
    os.truncate(file, file.stat().st_size // 2)


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, flip])
def test_a_damaged_checkpoint_is_named_and_passed_over(damage, digits, whole, tmp_path, capsys):
    run = cut(whole("torchvision"), tmp_path / "run", 16)
    damage(run / "checkpoints" / "step-00000016" / "state.pt")
    train(recipe_of(digits, "torchvision"), run, resume=True)
    printed = capsys.readouterr().out
    assert "damaged" in printed and "step-00000016: state.pt" in printed
    assert "resumed from step-00000012" in printed
    assert_same_run(run, whole("torchvision"))


def test_a_finished_run_stays_as_it_is(digits, whole, tmp_path):
    run = cut(whole("torchvision"), tmp_path / "run", STEPS)
    train(recipe_of(digits, "torchvision"), run, resume=True)
    assert_same_run(run, whole("torchvision"))


def test_settings_that_change_no_number_may_change(digits, whole, tmp_path):
    run = cut(whole("torchvision"), tmp_path / "run", 28)
    moved = tmp_path / "elsewhere"
    shutil.copytree(digits, moved)
    changes = {"data": {"workers": 2, "prefetch": 3}, "run": {"keep": 1}, "name": "other"}
    train(recipe_of(moved, "torchvision", **changes), run, resume=True)
    one, other = (load(r / "checkpoints" / "step-00000030")[0] for r in (run, whole("torchvision")))
    assert_same(one, other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim": {"lr": 0.04}}, "optim.lr: 0.05 -> 0.04"),
        ({"run": {"seed": 3}}, "run.seed: 0 -> 3"),
        ({"student": {"name": "resnet14"}}, "student.name: resnet8 -> resnet14"),
    ],
)
def test_another_recipe_is_refused(changes, message, digits, whole, tmp_path):
    run = cut(whole("torchvision"), tmp_path / "run", 16)
    with pytest.raises(ValueError, match=message):
        train(recipe_of(digits, "torchvision", **changes), run, resume=True)


def test_other_images_are_refused(digits, whole, tmp_path):
    run = cut(whole("torchvision"), tmp_path / "run", 16)
    moved = tmp_path / "digits"
    shutil.copytree(digits, moved)
    min((moved / "train" / "3").iterdir()).unlink()
    with pytest.raises(ValueError, match="training images: [0-9a-f]{64} -> [0-9a-f]{64}"):
        train(recipe_of(moved, "torchvision"), run, resume=True)


@pytest.mark.parametrize("loader", LOADERS)
def test_another_loader_is_refused_and_the_first_one_named(loader, digits, whole, tmp_path):
    """As where data.loader=auto once stood for another one."""
    run = cut(whole(loader), tmp_path / "run", 28)
    named = rf"loader: {loader} -> resident \(data.loader={loader} goes on as it began\)"
    for other in ("auto", "resident"):
        with pytest.raises(ValueError, match=named):
            train(recipe_of(digits, other), run, resume=True)
    (run / "recipe.yaml").write_text(recipe_of(digits, "auto").explain())
    train(recipe_of(digits, loader), run, resume=True)
    assert_same_run(run, whole(loader))


def test_another_teacher_is_refused(digits, whole, tmp_path):
    run = cut(whole("torchvision"), tmp_path / "run", 16)
    torch.save(create("resnet8", 10).state_dict(), tmp_path / "teacher.pt")
    given = {"name": "resnet8", "checkpoint": tmp_path / "teacher.pt"}
    with pytest.raises(ValueError, match="teacher's weights: [0-9a-f]{64} ->"):
        train(recipe_of(digits, "torchvision", teacher=given), run, resume=True)


LARGE_BATCHES = {
    "lamb": {"name": "lamb", "lr": 0.01, "layer_decay": 0.7, "decay": "matrices"},
    "lars": {"name": "lars", "lr": 0.4, "scale": "sqrt", "momentum": 0.8, "nesterov": True},
}


@pytest.mark.parametrize("name", LARGE_BATCHES)
def test_the_optimisers_of_large_batches_go_on_the_same(name, digits, tmp_path):
    pytest.importorskip("timm")
    settings = {"optim": LARGE_BATCHES[name], "student": {"name": "timm:test_convnext"}}
    small = {"data": {"size": 32}, "run": {"epochs": 1}}
    recipe = recipe_of(digits, "torchvision", "ce", **settings, **small)
    whole = train(recipe, tmp_path / "whole")
    run = cut(whole, tmp_path / "run", 4)
    train(recipe, run, resume=True)
    assert_same_run(run, whole, 10)

    start, *_, end = [record for record in records(whole) if record["kind"] in ("start", "epoch")]
    assert start["optimizer"] == f"timm.optim.{name}.{name.capitalize()}"
    given = LARGE_BATCHES[name]["lr"]
    assert Recipe.load(whole / "recipe.yaml").optim.lr == given
    factor = math.sqrt(32 / 256) if name == "lars" else 1.0
    assert end["lr"] == pytest.approx(factor * given * (1 + math.cos(math.pi * 9 / 10)) / 2)

    # Another package's state is not this one's.
    path = cut(whole, tmp_path / "other", 4) / "checkpoints" / "step-00000004"
    state, facts = load(path)
    facts["sources"]["optimizer"] = "apex.optimizers.fused_lamb.FusedLAMB"
    save(path.parent, path.name, state, facts)
    with pytest.raises(ValueError, match=rf"optimizer: apex.*FusedLAMB -> timm.optim.{name}"):
        train(recipe, tmp_path / "other", resume=True)


def test_another_machine_is_noted(digits, whole, tmp_path, capsys):
    run = cut(whole("torchvision"), tmp_path / "run", 28)
    path = run / "checkpoints" / "step-00000028"
    state, facts = load(path)
    facts["machine"]["processes"] = 4
    save(path.parent, path.name, state, facts)
    train(recipe_of(digits, "torchvision"), run, resume=True)
    assert "not bit for bit as it would have been: processes: 4 -> 1" in capsys.readouterr().out
