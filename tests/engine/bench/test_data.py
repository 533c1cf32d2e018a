"""The benchmark of the input path: what it records is what was done, for loaders and peer alike."""

import ast
import json
import os
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import kdfuse
from kdfuse.engine.bench.data import sides as data_sides
from kdfuse.engine.bench.data.measure import MOST, block, measure
from kdfuse.engine.bench.data.photos import CLASSES, HEIGHTS, WIDTHS, write_photos
from kdfuse.engine.data.contents import Files
from kdfuse.engine.data.sources import open_source
from kdfuse.engine.recipe.data import Data

pytestmark = pytest.mark.slow(20)

BENCH = ("bench", "data")
IMAGES = 60
FOLDER = Path(kdfuse.__file__).parent / "engine/bench/data"
LOADERS = ["dali", "torchvision"] if find_spec("nvidia.dali") else ["torchvision", "resident"]
WORDS = ["data.size=64", "data.eval_resize=72", "data.prefetch=2"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("made") / "photos"
    write_photos(root, IMAGES)
    return root


def section(root, **changes):
    fixed = {"size": 64, "eval_resize": 72, "workers": 2, "loader": "torchvision"}
    return Data(source="folder", root=root, **(fixed | changes))


def sides(root, mode, loaders, **changes):
    data = section(root, **changes)
    manifest = open_source(data, data_sides.SPLITS[mode])
    rows = np.arange(len(manifest.target))
    return data_sides.sides_of(manifest, rows, data, 10, mode, loaders)


def test_the_peer_shares_no_code_with_the_engine():
    tree = ast.parse((FOLDER / "plain.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert not [name.name for name in node.names if name.name.startswith("kdfuse")]
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 and not (node.module or "").startswith("kdfuse"), node.module


def test_made_images_are_jpegs_of_the_stated_size(photos):
    files = sorted((photos / "train").rglob("*.jpg"))
    assert len(files) == IMAGES and len({file.parent for file in files}) == CLASSES
    sizes = []
    for file in files:
        with Image.open(file) as image:
            assert image.format == "JPEG" and image.mode == "RGB"
            image.load()
            sizes.append(image.size)
    assert 95_000 < np.mean([file.stat().st_size for file in files]) < 120_000
    width, height = np.mean(sizes, axis=0)
    assert abs(width - np.mean(WIDTHS)) < 25 and abs(height - np.mean(HEIGHTS)) < 20
    assert len({file.read_bytes() for file in files}) == IMAGES


def test_made_images_are_the_same_every_time(photos, tmp_path):
    write_photos(tmp_path / "again", CLASSES)
    for file in (tmp_path / "again/train").rglob("*.jpg"):
        same = photos / file.relative_to(tmp_path / "again")
        assert file.read_bytes() == same.read_bytes()


def test_records_of_a_whole_run(photos, tmp_path, kd):
    out = tmp_path / "data.jsonl"
    words = ["--images", IMAGES, "--loaders", *LOADERS, "--batch", 10, "--workers", 1]
    code, shown, told = kd(*BENCH, *words, *WORDS, "--seconds", 0.2, "--out", out)
    assert code == 0, told
    opening, *records = [json.loads(line) for line in out.read_text().splitlines()]
    assert opening["kind"] == "facts" and opening["made_images"] == IMAGES
    assert opening["usable_cores"] == len(os.sched_getaffinity(0))
    assert opening["data"]["size"] == 64 and "root" not in opening["data"]
    assert len(opening["pillow"]) and len(opening["torchvision"])
    measured = {(r["mode"], r["loader"]): r for r in records if r["kind"] == "loader"}
    absent = {(r["mode"], r["loader"]): r for r in records if r["kind"] == "absent"}
    every = {(mode, name) for mode in ("train", "eval") for name in (*LOADERS, "ImageFolder")}
    assert measured.keys() | absent.keys() == every and not measured.keys() & absent.keys()
    # Made images differ in size, which the training crops of resident cannot have.
    assert absent.keys() == ({("train", "resident")} & every)
    for (mode, name), r in measured.items():
        assert (r["workers"], r["prefetch"], r["batch"], r["size"]) == (1, 2, 10, 64)
        assert r["images"] <= r["blocks"] * r["steps_per_block"] * 10 and r["blocks"] >= 3
        if name != "resident":  # its last batch of an epoch may be filled up
            assert r["images"] == r["blocks"] * r["steps_per_block"] * 10
        assert r["images_per_s_per_core"] * r["cores"] == pytest.approx(r["images_per_s"])
        assert 0 < r["p20_images_per_s"] <= r["images_per_s"] <= r["p80_images_per_s"]
        assert r["images_per_cpu_s"] > 0 and r["decode"]
        assert r["resident_bytes_first"] > 1e8 and r["resident_bytes_last"] > 1e8
        peer = measured[mode, "ImageFolder"]["images_per_s"]
        assert r["times_peer"] == pytest.approx(r["images_per_s"] / peer)
        assert r["set_images"] == IMAGES and 95_000 < r["mean_bytes"] < 120_000
        assert 475 < r["mean_width"] < 525 and 355 < r["mean_height"] < 395
        assert name in shown

    code, again, told = kd(*BENCH, "--from", out)
    assert code == 0 and again.strip() == shown[shown.index("\n\n") :].strip()
    code, table, told = kd(*BENCH, "--from", out, "--markdown")
    heads = table[table.index("| mode") :].splitlines()
    assert code == 0 and len(heads) == 2 + len(measured) and heads[1].startswith("|---|")


@pytest.mark.parametrize("key", ["erase", "randaugment"])
def test_a_peer_that_changes_no_crops_is_left_out(photos, key):
    settings = {"erase": 0.5} if key == "erase" else {"randaugment": {}}
    found, lost = sides(photos, "train", ["torchvision", "resident"], **settings)
    assert [side.name for side in found] == ["torchvision"]
    assert lost["ImageFolder"] == f"its transforms have no data.{key}"
    assert lost["resident"] == f"data.loader=resident cannot do data.{key}; use auto"
    found[0].close()
    (peer,), lost = sides(photos, "eval", [], **settings)
    assert peer.name == "ImageFolder" and not lost


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_blocks_see_every_image_equally_often(photos, mode):
    found, lost = sides(photos, mode, ["torchvision"])
    peer, ours = found
    assert not lost and peer.name == "ImageFolder"
    seen = np.zeros(IMAGES, int)
    epochs = ours._loader.epoch

    def counted(epoch):
        for batch in epochs(epoch):
            np.add.at(seen, batch.index.numpy() % IMAGES, 1)
            yield batch

    ours._loader.epoch = counted
    # What is ahead, uncounted, completes the first pass.
    done = block(ours, 12 - ours.ahead)
    assert done.images == 10 * (12 - ours.ahead) and seen.sum() == 120
    if mode == "eval":
        assert set(seen) == {2}
    else:
        assert np.count_nonzero(seen) > IMAGES * 0.7  # of a long order, each image once a copy
    assert block(peer, 4).images == 40
    ours.close()


def test_the_peer_goes_over_the_same_images(photos):
    """Also where the recipe keeps a part of them; in evaluation in the manifest's order."""
    rows = np.arange(3 * CLASSES)
    for mode in ("train", "eval"):
        data = section(photos, subset=3 if mode == "train" else None)
        manifest = open_source(data, data_sides.SPLITS[mode])
        (peer,), _ = data_sides.sides_of(manifest, rows, data, len(rows), mode, [])
        batches = iter(peer._loader)
        for _ in range(2):
            images, labels = next(batches)
            assert sorted(labels.tolist()) == manifest.target[rows].tolist()
            assert (labels.tolist() == sorted(labels.tolist())) == (mode == "eval")
        assert images.shape == (len(rows), 3, 64, 64)
        assert abs(images.mean()) < 2 and images.std() > 0.3  # normalised


def test_rows_may_be_named_more_than_once(photos):
    manifest = open_source(section(photos), "train")
    chosen = data_sides.chosen_rows(manifest, np.array([5, 0, 5]))
    assert isinstance(chosen.content, Files) and len(chosen.target) == 3
    assert chosen.name(0) == chosen.name(2) == manifest.name(5)
    assert chosen.sizes[1].tolist() == manifest.sizes[0].tolist()
    assert chosen.read(2).size == manifest.read(5).size and MOST > IMAGES


def test_images_in_memory_have_no_peer():
    data = Data(source="synthetic", classes=4, size=16, images=64, eval_resize=None, workers=1)
    records = []
    measure(data, 16, ["train"], ["dali", "torchvision", "resident"], 0.05, records.append)
    by = {r["loader"]: r for r in records}
    assert "data.source=synthetic" in by["ImageFolder"]["why_not"]
    assert "data.loader=dali" in by["dali"]["why_not"]
    for name in ("torchvision", "resident"):
        assert by[name]["times_peer"] is None and by[name]["mean_bytes"] is None
    with pytest.raises(ValueError, match="--loaders dali: none can read these images"):
        measure(data, 16, ["train"], ["dali"], 0.05, records.append)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--images", "3"], "--images: got 3, wants a whole number, 4 or more"),
        (["data.root=x", "--images", "9"], "--images 9 and data.root=x: images are made or read"),
        (["--images", "many"], "--images: got many, wants a whole number"),
        (["--batch", "0"], "--batch: got 0, wants a whole number, 1 or more"),
        (["--workers", "-1"], "--workers: got -1, wants a whole number, 1 or more"),
        (["--seconds", "nan"], "--seconds: got nan, wants a time in seconds"),
        (["--loaders", "ffcv"], "--loaders: invalid choice: 'ffcv'"),
        (["--modes", "test"], "--modes: invalid choice: 'test'"),
        (["--out", "nowhere/x.jsonl"], "--out nowhere/x.jsonl: its folder is not there"),
        (["--from", "none.jsonl"], "--from none.jsonl: there is no such file"),
        (["--from", "empty.jsonl", "--batch", "2"], "--batch 2: goes with measuring"),
        (
            ["imagenet/kd", "--from", "empty.jsonl"],
            "imagenet/kd: goes with measuring, and --from measures nothing",
        ),
        (["--from", "empty.jsonl"], "--from empty.jsonl: holds no record of kdfuse bench data"),
        (["--from", "other.jsonl"], "other.jsonl:1 is not a record of a benchmark"),
        (["imagenet/kd:resnet34-resnet18"], "data.root=data/imagenet is not a folder"),
        (["data.sise=3"], "data.sise"),
        (["coco/kd:nothing"], "no row nothing"),
    ],
)
def test_a_mistake_is_one_message(kd, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").write_text("")
    Path("other.jsonl").write_text("[1]\n")
    code, _, told = kd(*BENCH, *words)
    assert code == 2 and message in " ".join(told.split())


def test_a_detection_recipe_is_refused(kd):
    name = "coco/kd:resnet101-resnet50"
    code, _, told = kd(*BENCH, name)
    assert code == 2 and f"{name}: its images are for detection" in " ".join(told.split())
