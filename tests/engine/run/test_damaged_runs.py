"""Run folders that were damaged: the file is named, in one error, and nothing else happens."""

import json
import shutil

import pytest
from damaged import frugal, survives
from tiny import tiny

from kdfuse.engine.recipe import yamlfile
from kdfuse.engine.recipe.load import load
from kdfuse.engine.recipe.schema import RecipeError
from kdfuse.engine.report import curves
from kdfuse.engine.report.page import report
from kdfuse.engine.report.tables import counted
from kdfuse.engine.run import log
from kdfuse.engine.run.log import RunLog
from kdfuse.engine.run.past import across_seeds, any_recipe_of, read_run
from kdfuse.engine.training.start import train

pytestmark = pytest.mark.slow(15)

WRITTEN = load("digits/kd:resnet20-resnet8", ["data.root=digits"])


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A finished run, whose curves nobody draws, with a recipe that is read quickly."""
    monkeypatch.setattr(curves, "_draw", lambda chart: "")  # most of the time of a page
    (folder := tmp_path / "run").mkdir()
    short = f"name: {WRITTEN.name}\nmethod: {{name: kd}}\nrun: {{seed: 3}}\nexpect: {{top1: 71}}\n"
    (folder / "recipe.yaml").write_text(short)
    facts = {"torch": "2.11", "gpus": ["H100"], "packages": {"timm": None}, "threads": 2}
    (folder / "environment.json").write_text(json.dumps(facts, indent=1))
    with RunLog(folder, 8, 2, facts={"images": 64, "optimizer": "SGD"}) as records:
        records.note("loader: torchvision")
        for step in (2, 4, 6, 8):
            records.step(step, step / 4, {"loss": 1 / step, "kd": 0.5}, 100.0 * step, 0.25)
            if step % 4 == 0:
                records.epoch(step // 4, {"top1": 50.0 + step, "top5": 90.0, "lr": 0.1})
        records.end({"best_top1": 58.0})
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    return folder


def use(folder):
    """All that is done with past runs."""
    past = read_run(folder)
    across_seeds([past])
    counted(WRITTEN, [past])
    report([folder], folder / "report.html")


def test_damaged_logs(run):
    path = run / "log.jsonl"
    assert survives(lambda: log.read(path), path, 400, ValueError) > 200
    assert survives(lambda: use(run), path, 60, ValueError) > 20
    assert survives(lambda: RunLog(run, 8, 2, resume_step=4).close(), path, 30, ValueError) > 10


@pytest.mark.parametrize("tail", [b'{"kind": "st', b"\0" * 700, b"\xff\xfe{", b"[" * 5000, b"3"])
def test_a_torn_end_of_a_log_is_dropped(tail, run):
    path = run / "log.jsonl"
    whole = log.read(path)
    path.write_bytes(path.read_bytes() + tail)
    assert log.read(path) == whole
    RunLog(run, 8, 2, resume_step=8).close()
    assert log.read(path) == [record for record in whole if record["kind"] != "end"]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("3", "it has no kind"),
        ('{"kind": []}', "it has no kind"),
        ('{"kind": "step", "epoch": 1.0}', "step is None, wants a number"),
        ('{"kind": "note", "step": 1, "epoch": 1.0}', "a note without text"),
        ('{"kind": "epoch", "step": 1, "epoch": 1, "top1": "x"}', "top1 is x, wants a number"),
        ('{"kind": "epoch", "step": 1, "epoch": 1, "top1": true}', "top1 is True, wants a number"),
        ('{"kind": "step", "step": 1, "epoch": NaN}', "epoch is nan, wants a number"),
        ('{"kind": "step", "step": 1, "epoch": 1, "loss": 1e999}', "loss is inf, wants a number"),
        ("[" * 5000, "recursion"),
        ("", None),
    ],
)
def test_a_line_that_is_no_record_is_named(line, why, run):
    path = run / "log.jsonl"
    first, rest = path.read_text().split("\n", 1)
    path.write_text(f"{first}\n{line}\n{rest}")
    if why is None:
        use(run)
        return
    with pytest.raises(ValueError, match=f"line 2 is no record: .*{why}.*; remove that line"):
        use(run)


def test_damaged_facts_of_a_machine(run):
    path = run / "environment.json"
    assert survives(lambda: use(run), path, 60, ValueError) > 20
    path.write_text('{"torch": "\\ud800"}')  # half a character, which no file can hold
    use(run)
    assert "\\ud800" in (run / "report.html").read_text()


def test_damaged_recipes(run):
    path = run / "recipe.yaml"
    assert survives(lambda: read_run(run), path, 60, ValueError) > 20
    path.write_text("".join(WRITTEN.explain().splitlines(keepends=True)[:40]))
    assert survives(lambda: any_recipe_of(run), path, 50, ValueError) > 30


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("- " * 900 + "1", "more than 100 lists or sections within each other"),
        ("[" * 500, "more than 100 lists or sections within each other"),
        ("a: " + "9" * 5000, "not valid YAML"),
        ('a: !!int ""', "not valid YAML"),
        ("a: !!bool maybe", "not valid YAML"),
        ("a: !!timestamp 2001-01-01", "tag"),
        ("a: !!binary aGVsbG8=", "tag"),
        ("a: !!set {x}", "tag"),
        ("a: &a [*a]", "more than 100000 values"),
        (
            "a0: &a0 [1, 1]\n"
            + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)),
            "more than 100000 values",
        ),
    ],
)
def test_yaml_that_means_harm(text, why, run):
    path = run / "recipe.yaml"
    path.write_text(text)
    for reads in (yamlfile.read, load):
        with frugal(), pytest.raises(RecipeError, match=f"recipe.yaml: .*{why}"):
            reads(path)
    with pytest.raises(ValueError, match="recipe.yaml"):
        read_run(run)


@pytest.mark.parametrize("text", ["run: 3", "run:", "method: [kd]", "expect: 71", "name: [x]"])
def test_a_recipe_of_another_shape_is_named(text, run):
    (run / "recipe.yaml").write_text(text)
    with pytest.raises(
        ValueError, match=r"run/recipe.yaml is damaged \((run|method|expect|name): "
    ):
        read_run(run)


def test_resuming_names_the_damaged_recipe(digits, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("name: x\nrun: {epochs: 1, batch: -3}\n")
    with pytest.raises(RecipeError, match="run/recipe.yaml: run.batch: got -3") as error:
        train(tiny(digits), tmp_path / "run", resume=True)
    assert all("recipe.yaml: " in line for line in str(error.value).splitlines())
