"""The card beside an exported file: its numbers are the run's, and its lines load the file."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from tiny import tiny

from kdfuse.engine.cli.export import export
from kdfuse.engine.export.card import without_folders
from kdfuse.engine.export.chosen import choose
from kdfuse.engine.export.formats import Classifier
from kdfuse.engine.recipe.load import load
from kdfuse.engine.run.past import checkpoints_of, read_run, recipe_of
from kdfuse.engine.training.start import train

pytestmark = pytest.mark.slow(40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("here")


@pytest.fixture(scope="module")
def run(few, folder):
    """A student whose teacher is another run, by a path of this machine."""
    data = {"source": "folder", "subset": None, "eval_resize": 20}
    short = {"epochs": 3, "seed": 7}
    teacher = train(tiny(few, data=data, run=short), folder / "teacher")
    recipe = tiny(
        few,
        "kd",
        data=data,
        teacher={"name": f"run:{teacher}"},
        student={"name": "torchvision:shufflenet_v2_x0_5"},
        run=short,
    )
    return train(recipe, folder / "student")


def card(out):
    return out.with_name(f"{out.name}.md").read_text()


def header(text):
    return yaml.safe_load(text.split("---\n")[1])


def block(text, language):
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)
    return found


def test_the_header_is_what_the_hub_reads(run, tmp_path):
    text = card(export(run, tmp_path / "student.pt", which="last"))
    assert text.startswith("---\nlicense: unknown  # not set: yours to choose")
    found = header(text)
    assert found["license"] == "unknown" and found["pipeline_tag"] == "image-classification"
    assert found["library_name"] == "kdfuse" and found["datasets"] == ["few"]
    assert found["metrics"] == ["accuracy"] and "knowledge-distillation" in found["tags"]
    ((result,),) = (model["results"] for model in found["model-index"])
    ((metric,), task) = result["metrics"], result["task"]
    last = read_run(run).last
    assert metric["type"] == "accuracy" and task == {"type": "image-classification"}
    assert metric["value"] == pytest.approx(last["top1"], abs=1e-4)


def test_its_numbers_are_those_of_the_run(run, folder, tmp_path, capsys):
    past, out = read_run(run), tmp_path / "student.pt"
    text = card(export(run, out, which="last", check=16))
    assert f"- last epoch (3): {past.last['top1']:.2f}\n" in text
    best = past.best
    assert f"- best epoch of the student ({best['epoch']:g}): {best['top1']:.2f}\n" in text
    step = past.last["step"]
    assert f"- these weights (last, step {step}): {past.last['top1']:.2f}\n" in text
    told = capsys.readouterr().out.splitlines()[-1].removeprefix(f"{out}: ")
    assert told.startswith("checked on 16 of 40 ") and f"- this file: {told}\n" in text
    teacher = read_run(folder / "teacher").best["top1"]
    assert f"from the teacher run:teacher (top-1 {teacher:.2f} on the same" in text
    assert "Seed 7, epochs 3" in text
    assert "the short side is resized to 20 pixels, then the centre of 16 x 16" in text
    assert json.loads(block(text, "json")) == [str(digit) for digit in range(10)]
    environment = past.environment
    for name in ("commit", "torch", "python"):
        assert f"{name} {environment[name]}" in text


def test_it_names_no_folder_of_the_machine_and_no_moment(run, few, folder, tmp_path):
    out = tmp_path / "student.pt"
    first = card(export(run, out))
    for path in (folder, few.parent, tmp_path, Path.home(), Path.cwd()):
        assert str(path) not in first
    assert not re.search(r"20\d\d-\d\d-\d\d|\d\d:\d\d", first)
    assert card(export(run, out)) == first


def test_the_recipe_in_it_is_the_runs(run, few, folder, tmp_path):
    text = card(export(run, tmp_path / "student.pt", check=0))
    again = tmp_path / "again.yaml"
    again.write_text(block(text, "yaml"))
    words = [f"data.root={few}", f"teacher.name=run:{folder / 'teacher'}"]
    assert load(again, words) == load(run / "recipe.yaml")


def test_a_file_that_was_not_run_says_so(run, tmp_path):
    text = card(export(run, tmp_path / "student.pt", check=0))
    assert "- this file: it was not run on images\n" in text
    assert "10; their names were not at hand." in text
    assert header(text)["model-index"]  # of the run's own evaluation


FILES = [
    ("student.pt2", None, ()),
    ("student.onnx", None, ("onnxscript", "onnxruntime")),
    ("student.pt", None, ()),
    ("student.safetensors", None, ("safetensors",)),
    ("student.pt", "torchvision", ()),
    ("student.safetensors", "torchvision", ("safetensors",)),
]


@pytest.mark.parametrize(("name", "layout", "needs"), FILES)
def test_its_lines_load_the_file(run, tmp_path, monkeypatch, name, layout, needs):
    for package in needs:
        pytest.importorskip(package)
    text = card(export(run, tmp_path / name, check=8, layout=layout))
    assert_loads(text, run, tmp_path, monkeypatch)
    library = {".pt2": "pytorch", ".onnx": "onnx"}.get(f".{name.partition('.')[2]}", "kdfuse")
    assert header(text)["library_name"] == (layout or library)


def assert_loads(text, run, folder, monkeypatch):
    weights, facts = checkpoints_of(run)["best"]
    own = choose(read_run(run), recipe_of(run), "best", weights, facts, "student")
    monkeypatch.chdir(folder)
    space = {}
    exec(block(text, "python"), space)
    side = own.recipe.data.size
    images = torch.zeros(1, 3, side, side, dtype=torch.uint8)
    assert torch.equal(torch.as_tensor(space["images"]), images)
    wanted = Classifier(own.normalise, own.network)(images)
    torch.testing.assert_close(torch.as_tensor(space["logits"]), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_timms_lines_load_the_file(few, tmp_path, monkeypatch, suffix):
    pytest.importorskip("timm")
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    data = {"source": "folder", "size": 32, "subset": 8}
    recipe = tiny(few, data=data, student={"name": "MobileNetV1"}, run={"epochs": 1})
    run = train(recipe, tmp_path / "run")
    text = card(export(run, tmp_path / f"student{suffix}", check=8, layout="timm"))
    assert 'act_layer="relu"' in text and header(text)["library_name"] == "timm"
    assert_loads(text, run, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("/data/sets/imagenet", "imagenet"),
        ("run:/runs/teacher", "run:teacher"),
        ("data.root=/data/cifar", "data.root=cifar"),
        ("teacher.name=run:/runs/a", "teacher.name=run:a"),
        ("runs/teacher", "runs/teacher"),
        ("https://example.org/paper", "https://example.org/paper"),
        ("1/2", "1/2"),
        ({"a": ["/x/y", 1, None]}, {"a": ["y", 1, None]}),
    ],
)
def test_of_a_whole_path_the_last_name_is_left(written, said):
    assert without_folders(written) == said
