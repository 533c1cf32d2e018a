"""Two processes against one: the same gradients, sums and counts, one set of files."""

import json
import shutil
from contextlib import closing

import pytest
import torch
from processes import together
from steps import tensors
from tiny import tiny

from kdfuse.engine.run.checkpoint import load
from kdfuse.engine.run.log import read
from kdfuse.engine.training.build import build
from kdfuse.engine.training.classification import Classification
from kdfuse.engine.training.evaluate import evaluate
from kdfuse.engine.training.meters import Meters
from kdfuse.engine.training.ranks import Group, join
from kdfuse.engine.training.start import train
from kdfuse.engine.training.step import Step

pytestmark = pytest.mark.slow(20)

CLOCK = ("time", "images_per_s", "data_wait")


def one_step(group, parts=1):
    """A step on this process's share of a fixed batch of eight, and what came of it."""
    data = {"source": "synthetic", "classes": 10, "subset": None}
    recipe = tiny(None, "slkd", data=data, run={"accumulate": parts})
    torch.manual_seed(0)
    distiller = build(recipe, 10, group.device, torch.arange(8))
    distiller.prepare(())
    distiller.eval()  # in training, BatchNorm's statistics are those of each process's own images
    images = torch.randint(
        0, 256, (8, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    share = slice(group.rank * 8 // group.world, (group.rank + 1) * 8 // group.world)
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1)
    meters, labels = Meters(group), torch.arange(8)
    step = Step(group.wrap(distiller, recipe.run), [optimizer], meters, parts=parts)
    now = tensors(distiller.schedule(0.0) | {"step": 1})
    step(now, images[share], labels[share], labels[share])
    norm = distiller.main.student.bn1
    norm.running_mean.fill_(float(group.rank))
    group.average_batchnorm(distiller.modules())
    return {
        "gradients": {name: p.grad.clone() for name, p in distiller.named_parameters()},
        "values": meters.read(),
        "running mean": float(norm.running_mean[0]),
        "ranks": group.all(group.rank),
    }


def recipe_of(folder):
    run = {"batch": 32, "checkpoint_every": 3, "keep": 9}
    optim = {"lr": 0.05, "ema": 0.9}
    return tiny(folder / "digits", "slkd", data={"subset": 16}, run=run, optim=optim)


def main(folder):
    """What each of the two processes does."""
    group = join("cpu")
    torch.save(one_step(group), folder / f"step-{group.rank}.pt")
    torch.save(one_step(group, parts=2), folder / f"parts-{group.rank}.pt")
    train(recipe_of(folder), folder / "whole")
    group = join("cpu")
    if group.first:
        shutil.copytree(folder / "whole", folder / "resumed")
        for checkpoint in ("step-00000006", "step-00000009", "step-00000010"):
            shutil.rmtree(folder / "resumed" / "checkpoints" / checkpoint)
    group.wait()
    train(recipe_of(folder), folder / "resumed", resume=True)


@pytest.fixture(scope="module")
def folder(few, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    (folder / "digits").symlink_to(few)
    together(2, main, folder)
    return folder


@pytest.mark.parametrize("kind", ["step", "parts"])
def test_gradients_are_those_of_one_process(folder, kind):
    group = join("cpu")
    alone = one_step(group)
    both = [torch.load(folder / f"{kind}-{rank}.pt", weights_only=True) for rank in (0, 1)]
    for name, expected in alone["gradients"].items():
        assert torch.equal(both[0]["gradients"][name], both[1]["gradients"][name])
        torch.testing.assert_close(both[0]["gradients"][name], expected, rtol=1e-4, atol=1e-6)
    for rank in (0, 1):
        assert both[rank]["values"] == pytest.approx(alone["values"], rel=1e-5)
        assert both[rank]["running mean"] == 0.5
        assert both[rank]["ranks"] == [0, 1]


def test_a_run_of_two_processes(folder):
    records = read(folder / "whole" / "log.jsonl")
    kinds = [record["kind"] for record in records]
    assert kinds == ["start", *["step"] * 3, "epoch", *["step"] * 3, "epoch", "end"]
    assert json.loads((folder / "whole" / "environment.json").read_text())["processes"] == 2
    # Evaluated again by one process: every image counted once, whoever counted it.
    again = evaluate(folder / "whole")["last"]
    for name in ("top1", "top5", "slt0_top1", "slt1_top1", "ema_top1"):
        assert records[-2][name] == pytest.approx(again[name], abs=1e-9)
    with closing(Classification(recipe_of(folder), join("cpu"))) as task:  # the same random teacher
        assert records[-2]["entropy_teacher"] == pytest.approx(task.evaluate()["entropy_teacher"])


def test_two_processes_resume_exactly(folder):
    whole, resumed = (
        load(folder / name / "checkpoints" / "step-00000010")[0] for name in ("whole", "resumed")
    )
    assert whole["student"].keys() == resumed["student"].keys()
    for part in ("student", "ema"):
        one, other = (s[part].get("module", s[part]) for s in (whole, resumed))
        assert all(torch.equal(one[key], other[key]) for key in one)
    lines = [
        [{k: v for k, v in r.items() if k not in CLOCK} for r in read(folder / name / "log.jsonl")]
        for name in ("whole", "resumed")
    ]
    assert lines[0] == [record for record in lines[1] if record["kind"] != "note"]


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="run.batch = 65 does not divide over 2 processes"):
        Group(0, 2, torch.device("cpu")).share(65, "run.batch")
