"""One pass over the validation set: what the kept networks say, and when there is no teacher."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny

from kdfuse.engine.methods.parts.reused import Projector, Reused
from kdfuse.engine.models import Taps, Until, create
from kdfuse.engine.recipe.load import Recipe
from kdfuse.engine.report.pictures import PICTURES
from kdfuse.engine.run.past import read_run
from kdfuse.engine.training.outputs import classifier_input, outputs
from kdfuse.engine.training.start import train

pytestmark = pytest.mark.slow(30)

SLKD = {"name": "slkd", "slts": 2}


@pytest.fixture(scope="module")
def runs(few, tmp_path_factory) -> Path:
    """A teacher, and what learned from it with two SL-Ts."""
    folder = tmp_path_factory.mktemp("runs")
    train(tiny(few), folder / "teacher")
    own = {"name": "resnet8", "checkpoint": folder / "teacher"}
    train(tiny(few, SLKD, teacher=own, run={"eval_every": 1}), folder / "slkd")
    return folder


@pytest.fixture
def slkd(runs: Path, tmp_path: Path) -> Path:
    """A copy of the second run, to be changed."""
    return Path(shutil.copytree(runs / "slkd", tmp_path / "slkd"))


def with_words(run: Path, *words: str) -> None:
    recipe = run / "recipe.yaml"
    recipe.write_text(Recipe.load(recipe, words).explain())


def test_what_networks_say_is_what_the_run_logged(runs: Path):
    found = outputs(runs / "slkd", ["tsne", "correlation"])
    past = read_run(runs / "slkd")
    assert list(found.networks) == ["student", "SL-T 0", "SL-T 1", "teacher"]
    assert found.no_teacher == "" and found.about["step"] == past.best["step"]
    logged = {
        "student": past.best["top1"],
        "SL-T 0": past.best["slt0_top1"],
        "SL-T 1": past.best["slt1_top1"],
        "teacher": read_run(runs / "teacher").best["top1"],
    }
    for name, network in found.networks.items():
        right = 100 * (network.top1 == found.target).mean()
        assert right == pytest.approx(logged[name], abs=1e-9), name
        assert network.features.shape == (40, 64)  # all of 40 images: 10 classes of 4
    assert found.sampled.all() and sorted(found.rows) == list(range(40))
    first = found.image(0)
    assert first is not None and first.mode == "RGB"


def test_logits_and_features_are_those_of_the_images(runs: Path):
    """The teacher once more, image by image as its own code says, in float32."""
    found = outputs(runs / "slkd", ["tsne", "correlation"])
    own = create("resnet8", 10, runs / "teacher").eval()
    recipe = Recipe.load(runs / "slkd" / "recipe.yaml")
    norm = recipe.data.normalize
    mean, std = (torch.tensor(values)[:, None, None] for values in (norm.mean, norm.std))
    rows = []
    for row in found.rows.tolist():
        image = found.image(row).resize((16, 16), 2)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        with torch.no_grad():
            rows.append(own(((pixels - mean) / std)[None])[0].double().numpy())
    expected = np.corrcoef(np.array(rows).T)
    np.testing.assert_allclose(found.networks["teacher"].moments.correlation(), expected, atol=1e-3)


@pytest.mark.parametrize(
    "name",
    ["resnet8", "wrn_16_1", "vgg8", "MobileNetV2", "ShuffleV1", "torchvision:mobilenet_v3_small"],
)
def test_the_classifier_makes_the_logits_of_what_it_reads(name):
    network = create(name, 7).eval()
    check_classifier(network, classifier_input(network, 7))


def check_classifier(network: torch.nn.Module, point: str) -> None:
    taps = Taps(network, [point])
    with torch.no_grad():
        logits = network(torch.randn(3, 3, 32, 32))
    (features,) = taps.take().values()
    layer = network.get_submodule(point.removesuffix(":in"))
    torch.testing.assert_close(features @ layer.weight.T + layer.bias, logits)


def test_of_a_reused_classifier_it_is_that_one():
    """SimKD's student has a classifier of its own, which is not used."""
    teacher, student = create("resnet8x4", 7), create("resnet8", 7)
    maps = torch.Size([1, 64, 8, 8]), torch.Size([1, 256, 8, 8])
    projector = Projector(64, 256, 2, "none", maps[0][2:], maps[1][2:])
    network = Reused(Until(student, "stage3"), projector, teacher.fc).eval()
    assert classifier_input(network, 7) == "classifier:in"
    check_classifier(network, "classifier:in")


def test_a_network_without_such_a_layer_has_no_features():
    assert classifier_input(create("torchvision:squeezenet1_1", 7), 7) == ""


def test_without_a_teacher(slkd: Path, runs: Path, few):
    assert outputs(runs / "teacher", ()).no_teacher == "method ce has no teacher"

    with_words(slkd, "teacher.checkpoint=/nowhere/teacher.pt")
    found = outputs(slkd, ())
    assert "teacher" not in found.networks
    assert "/nowhere/teacher.pt: no such file" in found.no_teacher

    other = train(tiny(few, run={"seed": 1, "epochs": 1}), slkd.parent / "other")
    with_words(slkd, f"teacher.checkpoint={other}")
    assert f"learned from: {other} has other weights" in outputs(slkd, ()).no_teacher

    with_words(slkd, "teacher.checkpoint=null")
    assert "its random weights were not kept" in outputs(slkd, ()).no_teacher

    with_words(slkd, "teacher.cache=/nowhere/cache")
    assert "(teacher.cache = /nowhere/cache)" in outputs(slkd, ()).no_teacher


def test_the_command(kd, slkd: Path, runs: Path):
    done = kd("report", slkd)
    assert done.code == 0 and not (slkd / "pictures").exists()

    done = kd("report", slkd, "--pictures", "all")
    assert done.code == 0, done.err
    names = {path.name for path in (slkd / "pictures").iterdir()}
    assert names == {f"{name}.{end}" for name in PICTURES for end in ("svg", "json")}
    page = (slkd / "report.html").read_text()
    assert page.count('class="card picture"') == len(PICTURES) and len(page) < 5_000_000
    assert not re.search(r'(src|href)="(?!#|data:image/)', page)
    for title in ("student, 64 features", "SL-T 1, 64 features", "teacher, 64 features"):
        assert title in page

    assert kd("report", slkd).code == 0  # those that were drawn
    assert (slkd / "report.html").read_text() == page
    assert kd("report", slkd, "--pictures", "none").code == 0
    assert 'class="card picture"' not in (slkd / "report.html").read_text()

    done = kd("report", slkd, "--pictures", "tsne,heat")
    assert done.code == 2 and "no picture 'heat'" in done.err and "agreement" in done.err
    done = kd("report", slkd, runs / "nowhere", "--pictures", "all")
    assert done.code == 2 and "nowhere is not a run directory" in done.err and not done.out


def test_help_names_every_picture(kd):
    seen = " ".join(re.sub(r"[^\w ]", " ", kd("report", "--help").out).split())
    assert all(name in seen for name in PICTURES) and "Default" in seen
