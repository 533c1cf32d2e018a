"""Exact resume: a run that goes on ends with the bytes of one left alone, or says why not."""

import math
import shutil
from importlib.util import find_spec

import pytest
import torch
from same import assert_same, assert_same_run, records
from tiny import tiny

from kdfuse.engine.models import create
from kdfuse.engine.recipe.load import Recipe
from kdfuse.engine.run.checkpoint import load, save
from kdfuse.engine.training.start import train

pytestmark = pytest.mark.slow(20)

STEPS = 30
LOADERS = [
    "torchvision",
    pytest.param(
        "dali", marks=pytest.mark.skipif(find_spec("nvidia.dali") is None, reason="needs DALI")
    ),
]


def recipe_of(root, loader, method="slkd", **changes):
    """Three epochs of ten steps; checkpoints and records fall inside the epochs."""
    run = {"epochs": 3, "batch": 16, "log_every": 3, "checkpoint_every": 4, "keep": 9}
    data = {"subset": 16, "loader": loader, **changes.pop("data", {})}
    optim = {"lr": 0.05, "ema": 0.9, "schedule": "cosine", **changes.pop("optim", {})}
    run |= changes.pop("run", {})
    return tiny(root, method, data=data, optim=optim, run=run, **changes)


@pytest.fixture(scope="module")
def whole(few, tmp_path_factory):
    """The finished run that nothing happened to, by loader."""
    made = {}

    def run(loader):
        if loader not in made:
            out = tmp_path_factory.mktemp("whole") / "run"
            made[loader] = train(recipe_of(few, loader), out)
        return made[loader]

    return run


def cut(whole, out, step):
    """A copy of a run as it was after `step`: later checkpoints never came."""
    shutil.copytree(whole, out)
    for path in (out / "checkpoints").glob("step-*"):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    return out


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_a_damaged_checkpoint_is_named_and_passed_over(few, whole, tmp_path, capsys):
    run = cut(whole("torchvision"), tmp_path / "run", 16)
    flip(run / "checkpoints" / "step-00000016" / "state.pt")
    train(recipe_of(few, "torchvision"), run, resume=True)
    printed = capsys.readouterr().out
    assert "damaged" in printed and "step-00000016: state.pt" in printed
    assert "resumed from step-00000012" in printed
    assert_same_run(run, whole("torchvision"), STEPS)


def test_a_finished_run_stays_as_it_is(few, whole, tmp_path):
    run = cut(whole("torchvision"), tmp_path / "run", STEPS)
    train(recipe_of(few, "torchvision"), run, resume=True)
    assert_same_run(run, whole("torchvision"), STEPS)


def test_settings_that_change_no_number_may_change(few, whole, tmp_path):
    run = cut(whole("torchvision"), tmp_path / "run", 28)
    moved = tmp_path / "elsewhere"
    shutil.copytree(few, moved)
    changes = {"data": {"workers": 2, "prefetch": 3}, "run": {"keep": 1}, "name": "other"}
    train(recipe_of(moved, "torchvision", **changes), run, resume=True)
    one, other = (load(r / "checkpoints" / "step-00000030")[0] for r in (run, whole("torchvision")))
    assert_same(one, other)


def test_more_or_fewer_records_and_checkpoints_change_nothing_that_is_trained(few, whole, tmp_path):
    run = cut(whole("torchvision"), tmp_path / "run", 16)
    changes = {"log_every": 4, "eval_batch": 37, "checkpoint_every": 5, "time_limit": 1e6}
    train(recipe_of(few, "torchvision", run=changes), run, resume=True)
    one, other = (load(r / "checkpoints" / "step-00000030")[0] for r in (run, whole("torchvision")))
    assert_same(one, other)
    steps = [record["step"] for record in records(run) if record["kind"] == "step"]
    assert steps == [3, 6, 9, 10, 12, 15, 20, 24, 28, 30]
    runs = (run, whole("torchvision"))
    means = [[r for r in records(one) if r.pop("kind") == "epoch"] for one in runs]
    for mine, theirs in zip(*means, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim": {"lr": 0.04}}, "optim.lr: 0.05 -> 0.04"),
        ({"run": {"seed": 3}}, "run.seed: 0 -> 3"),
        ({"student": {"name": "resnet14"}}, "student.name: resnet8 -> resnet14"),
    ],
)
def test_another_recipe_is_refused(changes, message, few, whole, tmp_path):
    run = cut(whole("torchvision"), tmp_path / "run", 16)
    with pytest.raises(ValueError, match=message):
        train(recipe_of(few, "torchvision", **changes), run, resume=True)


def test_other_images_are_refused(few, whole, tmp_path):
    run = cut(whole("torchvision"), tmp_path / "run", 16)
    moved = tmp_path / "digits"
    shutil.copytree(few, moved)
    min((moved / "train" / "3").iterdir()).unlink()
    with pytest.raises(ValueError, match="training images: [0-9a-f]{12} -> [0-9a-f]{12}"):
        train(recipe_of(moved, "torchvision"), run, resume=True)


@pytest.mark.parametrize("loader", LOADERS)
def test_another_loader_is_refused_and_the_first_one_named(loader, few, whole, tmp_path):
    """As where data.loader=auto once stood for another one."""
    run = cut(whole(loader), tmp_path / "run", 28)
    named = rf"loader: {loader} -> resident \(data.loader={loader} goes on as it began\)"
    for other in ("auto", "resident"):
        with pytest.raises(ValueError, match=named):
            train(recipe_of(few, other), run, resume=True)
    (run / "recipe.yaml").write_text(recipe_of(few, "auto").explain())
    train(recipe_of(few, loader), run, resume=True)
    assert_same_run(run, whole(loader), STEPS)


def test_another_teacher_is_refused(few, whole, tmp_path):
    run = cut(whole("torchvision"), tmp_path / "run", 16)
    torch.save(create("resnet8", 10).state_dict(), tmp_path / "teacher.pt")
    given = {"name": "resnet8", "checkpoint": tmp_path / "teacher.pt"}
    with pytest.raises(ValueError, match="teacher's weights: [0-9a-f]{12} ->"):
        train(recipe_of(few, "torchvision", teacher=given), run, resume=True)


LARGE_BATCHES = {
    "lamb": {"name": "lamb", "lr": 0.01, "layer_decay": 0.7, "decay": "matrices"},
    "lars": {"name": "lars", "lr": 0.4, "scale": "sqrt", "momentum": 0.8, "nesterov": True},
}


@pytest.mark.parametrize("name", LARGE_BATCHES)
def test_the_optimisers_of_large_batches_go_on_the_same(name, few, tmp_path):
    pytest.importorskip("timm")
    settings = {"optim": LARGE_BATCHES[name], "student": {"name": "timm:test_convnext"}}
    small = {"data": {"size": 32}, "run": {"epochs": 1}}
    recipe = recipe_of(few, "torchvision", "ce", **settings, **small)
    whole = train(recipe, tmp_path / "whole")
    run = cut(whole, tmp_path / "run", 4)
    train(recipe, run, resume=True)
    assert_same_run(run, whole, 10)

    start, *_, end = [record for record in records(whole) if record["kind"] in ("start", "epoch")]
    assert start["optimizer"] == f"timm.optim.{name}.{name.capitalize()}"
    given = LARGE_BATCHES[name]["lr"]
    assert Recipe.load(whole / "recipe.yaml").optim.lr == given
    factor = math.sqrt(16 / 256) if name == "lars" else 1.0
    assert end["lr"] == pytest.approx(factor * given * (1 + math.cos(math.pi * 9 / 10)) / 2)

    # Another package's state is not this one's.
    path = cut(whole, tmp_path / "other", 4) / "checkpoints" / "step-00000004"
    state, facts = load(path)
    facts["sources"]["optimizer"] = "apex.optimizers.fused_lamb.FusedLAMB"
    save(path.parent, path.name, state, facts)
    with pytest.raises(ValueError, match=rf"optimizer: apex.*FusedLAMB -> timm.optim.{name}"):
        train(recipe, tmp_path / "other", resume=True)


def test_another_machine_is_noted(few, whole, tmp_path, capsys):
    run = cut(whole("torchvision"), tmp_path / "run", 28)
    path = run / "checkpoints" / "step-00000028"
    state, facts = load(path)
    facts["machine"]["processes"] = 4
    save(path.parent, path.name, state, facts)
    train(recipe_of(few, "torchvision"), run, resume=True)
    assert "not bit for bit as it would have been: processes: 4 -> 1" in capsys.readouterr().out
