"""An exported file is run on the run's images, and refused where it is not the run's network."""

import copy
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny
from torch import nn
from torchvision.transforms.v2 import functional as F

from kdfuse.engine.cli import export as exporting
from kdfuse.engine.cli.export import export
from kdfuse.engine.export import formats
from kdfuse.engine.export.check import TOLERANCE, _batches, compare, validation
from kdfuse.engine.export.chosen import choose
from kdfuse.engine.run.past import checkpoints_of, read_run, recipe_of
from kdfuse.engine.training.start import train

pytestmark = pytest.mark.slow(40)


@pytest.fixture(scope="module")
def data(few, tmp_path_factory):
    """40 validation images of 10 digits, as a folder that the tests may take away."""
    return shutil.copytree(few, tmp_path_factory.mktemp("images") / "few")


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "ce"
    optim = {"lr": 0.05, "ema": 0.5}
    recipe = tiny(data, data={"source": "folder", "subset": None}, optim=optim)
    return train(recipe, out)


@pytest.fixture
def copied(run, tmp_path):
    """The run, for a test that changes what it recorded."""
    return shutil.copytree(run, tmp_path / "runs" / "copy")


def chosen(run, which="best", network="student"):
    weights, facts = checkpoints_of(run)[which]
    return choose(read_run(run), recipe_of(run), which, weights, facts, network)


def by_hand(data, own):
    """The validation images as PIL and torchvision see them, and their classes."""
    pixels, target = [], []
    for label, folder in enumerate(sorted((data / "val").iterdir())):
        for path in sorted(folder.iterdir()):
            image = F.resize(Image.open(path).convert("RGB"), [own.recipe.data.size] * 2)
            pixels.append(F.pil_to_tensor(image))
            target.append(label)
    return torch.stack(pixels), torch.tensor(target)


@pytest.mark.parametrize(("network", "which"), [("student", "best"), ("ema", "last")])
def test_all_is_the_accuracy_that_the_run_recorded(run, data, tmp_path, kd, network, which):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    out = tmp_path / "model.onnx"
    words = ("--check", "all", "--network", network, "--which", which)
    result = kd("export", run, out, *words)
    assert result.code == 0, result.err
    past = read_run(run)
    key = "top1" if network == "student" else "ema_top1"
    recorded = getattr(past, which)[key]
    session = runtime.InferenceSession(out, providers=["CPUExecutionProvider"])
    pixels, target = by_hand(data, chosen(run))
    (logits,) = session.run(None, {"images": pixels.numpy()})
    assert 100 * (logits.argmax(1) == target.numpy()).mean() == pytest.approx(recorded)
    told, path = result.out.splitlines()
    assert told.startswith(f"{out}: checked on 40 of 40 validation images: top-1 {recorded:.2f}, ")
    assert told.endswith(f"; the run recorded {recorded:.2f}") and path == str(out)


def test_images_are_spread_over_the_set_and_are_what_an_evaluation_sees(run, data):
    own = chosen(run)
    images = validation(own, 20)
    found = [torch.cat(parts) for parts in zip(*_batches(own, images, 20), strict=True)]
    pixels, target = by_hand(data, own)
    assert torch.equal(found[0], pixels[::2]) and torch.equal(found[1], target[::2])
    more = [len(part) for part, _ in _batches(own, images, 1000)]
    assert sum(more) == 40


def test_a_file_is_run_on_batches_of_two_sizes(run):
    own = chosen(run)
    model = formats.Classifier(own.normalise, own.network)
    for count in (1, 2, 40):
        sizes = []

        def heard(images, sizes=sizes):
            sizes.append(len(images))
            return model(images)

        checked = compare(heard, Path("m.pt2"), own, validation(own, count), count)
        assert len(set(sizes)) == 2 and checked.images == count and checked.difference < 1e-5


class Fixed(nn.Module):
    """The same logits for every image."""

    def __init__(self, logits):
        super().__init__()
        self.register_buffer("logits", torch.tensor(logits))

    def forward(self, images):
        return self.logits.expand(len(images), -1)


def said(run, own, file):
    """What comes of a file with these logits where the run's network has those."""
    fill = [-1.0] * 8
    one = replace(chosen(run), network=Fixed([*own, *fill]))
    return compare(Fixed([*file, *fill]), Path("m.pt2"), one, validation(one, 8), 8)


def test_the_tolerance_is_a_share_of_the_largest_logit(run):
    for scale in (1.0, 50.0):
        checked = said(run, (scale, 0.0), (scale, 0.9 * TOLERANCE * scale))
        assert checked.difference == pytest.approx(0.9 * TOLERANCE * scale, rel=1e-3)
        assert checked.allowed == pytest.approx(TOLERANCE * scale)
        with pytest.raises(ValueError, match=r"m.pt2: not the run's network: .* 0 have another"):
            said(run, (scale, 0.0), (scale, 1.1 * TOLERANCE * scale))
    small = said(run, (0.001, 0.0), (0.001, 0.0005))  # of logits below 1 that share is one of 1
    assert small.allowed == TOLERANCE


def test_a_tie_may_fall_either_way_and_nothing_else_may(run):
    close = said(run, (1.0, 0.9995), (0.9995, 1.0))
    assert close.difference == pytest.approx(5e-4, rel=1e-3)
    assert close.top1 == close.own == 12.5  # of these 8 images one is a 0, one a 1
    with pytest.raises(ValueError, match="and 8 have another class"):
        said(run, (1.0, 0.9985), (0.9991, 0.9994))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_no_number_is_not_near(run, wrong):
    with pytest.raises(ValueError, match="not the run's network"):
        said(run, (1.0, 0.0), (1.0, wrong))


def test_another_number_of_logits_is_named(run):
    own = chosen(run)
    with pytest.raises(ValueError, match=r"gives \(8, 1\), wants logits \(8, 10\)"):
        compare(lambda x: torch.zeros(len(x), 1), Path("m"), own, validation(own, 8), 8)


def spoilt(network):
    other = copy.deepcopy(network)
    with torch.no_grad():
        next(other.parameters()).mul_(1.2)  # of the first convolution
    return other


def of_one_size(monkeypatch):
    monkeypatch.setattr(formats, "BATCH", {})


def of_other_weights(monkeypatch):
    monkeypatch.setattr(formats, "fold_dirac", spoilt)


def of_other_tensors(monkeypatch):
    write = formats.weights

    def wrong(held, *others):
        first = next(iter(held))
        return write({**held, first: 1.2 * held[first]}, *others)

    monkeypatch.setattr(exporting, "weights", wrong)


def without_a_tensor(monkeypatch):
    write = formats.weights
    monkeypatch.setattr(
        exporting, "weights", lambda held, *others: write(dict(list(held.items())[1:]), *others)
    )


NEEDS = {".onnx": ("onnxscript", "onnxruntime"), ".safetensors": ("safetensors",)}
DIFFERS = "not the run's network: on 40 validation images a logit differs by"


@pytest.mark.parametrize(
    ("suffix", "fault", "message"),
    [
        (".pt2", of_other_weights, DIFFERS),
        (".onnx", of_other_weights, DIFFERS),
        (".pt", of_other_tensors, DIFFERS),
        (".safetensors", of_other_tensors, DIFFERS),
        (".pt", without_a_tensor, "the file cannot be loaded: .*Missing key"),
        (".pt2", of_one_size, "the file does not run on 40 images"),
        (".onnx", of_one_size, "the file does not run on 40 images"),
    ],
)
def test_a_file_that_is_not_the_runs_network_leaves_what_was_there(
    run, tmp_path, kd, monkeypatch, suffix, fault, message
):
    for package in NEEDS.get(suffix, ()):
        pytest.importorskip(package)
    out, card = tmp_path / f"model{suffix}", tmp_path / f"model{suffix}.md"
    before = [out, card] if suffix in formats.PROGRAMS else []
    for path in before:
        path.write_text("earlier")
    fault(monkeypatch)
    result = kd("export", run, out)
    assert result.code == 2 and not result.out
    assert re.match(f"error: out = {out}: .*{message}", result.err, re.S), result.err
    assert sorted(tmp_path.iterdir()) == before
    assert all(path.read_text() == "earlier" for path in before)


def records(run, change):
    log = run / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for record in lines:
        if record["kind"] == "epoch":
            change(record)
    log.write_text("".join(json.dumps(record) + "\n" for record in lines))


def test_another_recorded_accuracy_is_refused(copied, tmp_path):
    records(copied, lambda record: record.update(top1=record["top1"] + 5))
    with pytest.raises(ValueError, match=r"its top-1 is .*, and the run recorded .*; of 40 images"):
        export(copied, tmp_path / "model.pt", check="all")
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    records(copied, lambda record: record.pop("top1"))
    with pytest.raises(ValueError, match=r"check = 'all': .* recorded no accuracy of student at"):
        export(copied, tmp_path / "model.pt", check="all")
    assert export(copied, tmp_path / "model.pt", check=4).is_file()


def test_bfloat16_recorded_what_the_file_has_but_for_close_images(data, tmp_path, capsys):
    recipe = tiny(data, data={"source": "folder", "subset": None}, run={"amp": "bf16"})
    out = export(train(recipe, tmp_path / "run"), tmp_path / "model.pt", check="all")
    assert out.is_file() and "the run recorded" in capsys.readouterr().out


def test_images_that_are_gone_name_the_way_without(run, data, tmp_path, kd):
    aside = data.rename(data.with_name("aside"))
    try:
        result = kd("export", run, tmp_path / "model.pt2")
        assert result.code == 2 and not list(tmp_path.iterdir())
        assert str(data) in result.err
        assert "--check 0 writes it without" in " ".join(result.err.split())
        result = kd("export", run, tmp_path / "model.pt2", "--check", "0")
        assert (result.code, result.out) == (0, f"{tmp_path / 'model.pt2'}\n")
    finally:
        aside.rename(data)
    found = torch.export.load(tmp_path / "model.pt2").module()
    own = chosen(run)
    pixels, _ = by_hand(data, own)
    wanted = formats.Classifier(own.normalise, own.network)(pixels)
    torch.testing.assert_close(found(pixels), wanted, rtol=1e-4, atol=1e-4)


def test_other_images_than_the_runs_are_named(run, data, tmp_path):
    more = data / "val" / "0" / "more.jpg"
    shutil.copy(next(more.parent.iterdir()), more)
    try:
        with pytest.raises(ValueError, match="images are others than the run's.*--check 0"):
            export(run, tmp_path / "model.pt")
    finally:
        more.unlink()


@pytest.mark.parametrize("check", ["few", "-1", "1.5", ""])
def test_what_is_no_number_of_images_is_refused(run, tmp_path, check):
    with pytest.raises(ValueError, match=f"check = '{check}': on how many validation images"):
        export(run, tmp_path / "model.pt", check=check)


@pytest.mark.parametrize(
    ("name", "suffix", "cure"),
    [
        ("safetensors", ".safetensors", "pip install safetensors"),
        ("onnxscript", ".onnx", "pip install onnx onnxscript"),
        ("onnxruntime", ".onnx", "pip install onnxruntime, or --check 0 to write it without"),
    ],
)
def test_a_missing_package_is_named_with_its_cure(run, tmp_path, monkeypatch, name, suffix, cure):
    if name != "onnxruntime" and suffix == ".onnx":
        pytest.importorskip("onnx")
    if name == "onnxruntime":
        pytest.importorskip("onnxscript")
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=f"model{suffix}: needs {name} .*: {cure}$"):
        export(run, tmp_path / f"model{suffix}")
    assert not list(tmp_path.iterdir())


def test_a_program_says_what_it_is_made_for(run, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    out = export(run, tmp_path / "model.onnx", check=4)
    (held,) = (one.value for one in onnx.load(out).metadata_props if one.key == "kdfuse")
    extra = {"kdfuse.json": ""}
    torch.export.load(export(run, tmp_path / "model.pt2", check=4), extra_files=extra)
    assert held == extra["kdfuse.json"]
    about = json.loads(held)
    assert about["class_names"] == [str(digit) for digit in range(10)]
    normalize = recipe_of(run).data.normalize
    assert about["preprocessing"] == {
        "colour": "RGB",
        "resize": None,
        "interpolation": "bilinear, antialiased",
        "crop": None,
        "size": 16,
        "mean": list(normalize.mean),
        "std": list(normalize.std),
    }
    image = np.random.default_rng(0).integers(0, 256, (1, 3, 16, 16), np.uint8)
    own = chosen(run)
    mean, std = (np.array(about["preprocessing"][k]).reshape(3, 1, 1) for k in ("mean", "std"))
    floats = torch.from_numpy((image / 255 - mean) / std).float()
    found = torch.export.load(tmp_path / "model.pt2").module()(torch.from_numpy(image))
    torch.testing.assert_close(found, own.network(floats), rtol=1e-4, atol=1e-4)
