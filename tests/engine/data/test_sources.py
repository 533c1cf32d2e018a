"""Sources: what they list, what they refuse and with which words; what the folder check finds."""

import dataclasses
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from kdfuse.engine.data.check import check_folder
from kdfuse.engine.data.sources import open_source
from kdfuse.engine.data.sources.digits import write_digits
from kdfuse.engine.data.sources.image_sizes import read_sizes
from kdfuse.engine.recipe.data import Data


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kdfuse"


@pytest.fixture
def root(tmp_path):
    """Three classes of four training and two validation images of different sizes."""
    for split, count in (("train", 4), ("val", 2)):
        for label, name in enumerate(("ant", "bee", "cat")):
            folder = tmp_path / "set" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (20 + i, 10 + label), (80 * label, 40 * i, 0)).save(
                    folder / f"{i}.jpg"
                )
    return tmp_path / "set"


def folder(root, **changes):
    return Data(source="folder", root=root, size=8, **changes)


def test_folder_lists_every_image_sorted(root):
    (root / "train" / "bee" / "notes.txt").write_text("not an image")
    Image.new("L", (5, 6)).save(root / "train" / "bee" / "2b.PNG")
    manifest = open_source(folder(root), "train")
    names = [os.path.relpath(path, root / "train") for path in manifest.content.paths]
    assert names == sorted(names) and len(names) == 13 and "bee/2b.PNG" in names
    assert manifest.classes == ["ant", "bee", "cat"]
    assert manifest.target.tolist() == [0] * 4 + [1] * 5 + [2] * 4
    assert manifest.target.dtype == np.int64 and manifest.sizes.dtype == np.int32
    assert manifest.sizes[5].tolist() == [11, 21] and manifest.sizes[7].tolist() == [6, 5]
    assert manifest.content.lengths[0] == os.path.getsize(manifest.content.paths[0])
    assert manifest.bad == {}
    assert len(open_source(folder(root), "val").target) == 6


def test_exif_orientation_does_not_turn_the_size(root):
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees"
    Image.new("RGB", (30, 12)).save(root / "train" / "ant" / "0.jpg", exif=exif)
    assert open_source(folder(root), "train").sizes[0].tolist() == [12, 30]


def test_subset_keeps_the_first_of_each_training_class(root):
    manifest = open_source(folder(root, subset=2), "train")
    assert [os.path.relpath(path, root / "train") for path in manifest.content.paths] == [
        f"{name}/{i}.jpg" for name in ("ant", "bee", "cat") for i in range(2)
    ]
    assert manifest.target.tolist() == [0, 0, 1, 1, 2, 2]
    assert len(open_source(folder(root, subset=1), "val").target) == 6
    with pytest.raises(ValueError, match="data.subset=5, but class 'ant' has 4"):
        open_source(folder(root, subset=5), "train")


def test_digest_names_the_content_not_the_place(root, tmp_path):
    before = open_source(folder(root), "train")
    shutil.copytree(root, tmp_path / "copy")
    assert open_source(folder(tmp_path / "copy"), "train").digest == before.digest
    assert open_source(folder(root), "val").digest != before.digest
    os.rename(root / "train" / "ant" / "3.jpg", root / "train" / "bee" / "a.jpg")
    assert open_source(folder(root), "train").digest != before.digest
    os.rename(root / "train" / "bee" / "a.jpg", root / "train" / "ant" / "3.jpg")
    assert open_source(folder(root), "train").digest == before.digest
    Image.new("RGB", (50, 50)).save(root / "train" / "ant" / "3.jpg")
    assert open_source(folder(root), "train").digest != before.digest


def test_headers_are_read_once_and_again_when_a_file_changes(root, cache):
    (root / "train" / "ant" / "1.jpg").write_bytes(b"<html>")
    first = open_source(folder(root), "train")
    assert len(list(cache.iterdir())) == 1
    kept = open_source(folder(root), "train")
    assert (kept.sizes == first.sizes).all() and kept.bad == first.bad and list(kept.bad) == [1]
    assert kept.digest == first.digest
    Image.new("RGB", (50, 60)).save(root / "train" / "ant" / "0.jpg")
    assert open_source(folder(root), "train").sizes[0].tolist() == [60, 50]


def test_what_the_cache_holds_is_what_is_used(root, cache):
    """The sizes come from the cache, not from the files, so a start reads no headers."""
    path = root / "train" / "ant" / "0.jpg"
    stats = [(str(path), path.stat().st_mtime_ns, path.stat().st_size)]
    assert read_sizes(stats)[0].tolist() == [[10, 20]]
    path.unlink()
    assert read_sizes(stats)[0].tolist() == [[10, 20]]
    (kept,) = cache.iterdir()
    kept.write_bytes(kept.read_bytes()[:-4])  # a torn file is not trusted
    sizes, bad = read_sizes(stats)
    assert sizes.tolist() == [[0, 0]] and bad == {0: "No such file or directory"}
    Image.new("RGB", (20, 10)).save(path)  # a fault may pass, so it is not kept
    assert read_sizes(stats)[0].tolist() == [[10, 20]]


def test_a_cache_that_cannot_be_written_is_said(root, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="set XDG_CACHE_HOME"):
        assert len(open_source(folder(root), "val").target) == 6


def test_unreadable_files_are_found_by_their_headers_and_ends(root):
    ant = root / "train" / "ant"
    whole = (ant / "3.jpg").read_bytes()
    (ant / "0.jpg").write_bytes(whole[: len(whole) // 2])
    (ant / "1.jpg").write_bytes(b"")
    (ant / "2.jpg").write_bytes(whole[:-2])  # only the end marker is missing
    (ant / "3.jpg").write_bytes(whole + b"trailing bytes")  # readable
    Image.new("I;16", (9, 9)).save(root / "train" / "bee" / "0.jpg", format="PNG")
    Image.new("P", (9, 9)).save(root / "train" / "bee" / "1.jpg", format="GIF")
    bad = open_source(folder(root), "train").bad
    assert sorted(bad) == [0, 1, 2, 4, 5]
    assert "truncated" in bad[0].lower() and "truncated" in bad[2] and "empty" in bad[1]
    assert "8 bits" in bad[4] and "not a readable JPEG, PNG" in bad[5]


def test_missing_folders_are_named_with_the_cure(root, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data.root=.*nowhere is not a folder; expected"):
        open_source(folder(tmp_path / "nowhere"), "train")
    os.rename(root / "val", root / "valid")
    for split in ("train", "val"):
        with pytest.raises(FileNotFoundError, match="has no folder 'val'; expected ROOT/train/"):
            open_source(folder(root), split)
    os.rename(root / "valid", root / "val")
    os.rename(root / "train", root / "training")
    with pytest.raises(FileNotFoundError, match="has no folder 'train'"):
        open_source(folder(root), "train")


def test_validation_images_without_class_folders_are_refused(root):
    for path in (root / "val").glob("*/*.jpg"):
        os.rename(path, root / "val" / f"{path.parent.name}{path.name}")
    for path in (root / "val").iterdir():
        if path.is_dir():
            path.rmdir()
    with pytest.raises(ValueError, match="holds no class folders.*folder of its class"):
        open_source(folder(root), "val")


def test_an_empty_class_is_named(root):
    shutil.rmtree(root / "train" / "bee")
    (root / "train" / "bee").mkdir()
    with pytest.raises(ValueError, match="bee holds no image .*remove the folder"):
        open_source(folder(root), "train")


def test_classes_that_differ_are_named(root):
    os.rename(root / "val" / "bee", root / "val" / "wasp")
    for split in ("train", "val"):
        with pytest.raises(ValueError, match="different classes") as error:
            open_source(folder(root), split)
        assert "only in train: bee" in str(error.value)
        assert "only in val: wasp" in str(error.value)


def test_number_of_classes_is_asserted(root):
    assert len(open_source(folder(root, classes=3), "val").classes) == 3
    with pytest.raises(ValueError, match="data.classes=10, but .* holds 3 class folders"):
        open_source(folder(root, classes=10), "train")


def test_digits_are_written_once_with_a_fixed_split(tmp_path):
    target = tmp_path / "new" / "digits"
    data = Data(source="digits", root=target, size=32)
    train, val = open_source(data, "train"), open_source(data, "val")
    assert len(train.content.paths) + len(val.content.paths) == 1797
    assert train.classes == val.classes == [str(digit) for digit in range(10)]
    for label in range(10):
        total = (train.target == label).sum() + (val.target == label).sum()
        assert (val.target == label).sum() == total // 5
    assert (train.sizes == 32).all() and not train.bad
    assert Image.open(train.content.paths[0]).format == "JPEG"
    times = {path: path.stat().st_mtime_ns for path in target.rglob("*.jpg")}
    write_digits(target)
    assert times == {path: path.stat().st_mtime_ns for path in target.rglob("*.jpg")}
    write_digits(tmp_path / "again")
    for path in times:
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(target)).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "cache") == ["again", "new"]
    few = open_source(data.model_copy(update={"subset": 3}), "train")
    assert np.bincount(few.target).tolist() == [3] * 10


def test_digits_show_their_digit(tmp_path):
    """Nearest mean image of the training digits tells the validation digits."""
    write_digits(tmp_path / "digits")
    data = Data(source="digits", root=tmp_path / "digits", size=32, subset=30)
    train, val = open_source(data, "train"), open_source(data, "val")
    pixels = np.stack([np.asarray(train.read(row), np.float32) for row in range(300)])
    means = np.stack([pixels[train.target == label].mean(axis=0) for label in range(10)])
    rows = range(0, len(val.content.paths), 3)
    shown = np.stack([np.asarray(val.read(row), np.float32) for row in rows])
    nearest = ((shown[:, None] - means) ** 2).sum(axis=(2, 3, 4)).argmin(axis=1)
    assert (nearest == val.target[list(rows)]).mean() > 0.8


def test_digits_written_by_many_at_once(tmp_path):
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(write_digits, [tmp_path / "digits"] * 3))
    assert len(list((tmp_path / "digits").rglob("*.jpg"))) == 1797
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_digits_leave_other_folders_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="holds other files"):
        write_digits(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def synthetic(**changes):
    return Data(source="synthetic", **({"classes": 10, "size": 16, "images": 200} | changes))


def test_synthetic_images_are_a_function_of_seed_and_row():
    train, again = (open_source(synthetic(), "train") for _ in range(2))
    val = open_source(synthetic(), "val")
    assert len(train.target) == 200 and len(val.target) == 50
    assert np.bincount(train.target).tolist() == [20] * 10
    assert train.digest == again.digest != val.digest
    image = np.asarray(train.read(11))
    assert image.shape == (16, 16, 3) and image.dtype == np.uint8
    assert (image == np.asarray(again.read(11))).all()
    assert (image != np.asarray(train.read(21))).mean() > 0.5  # the same class, another row
    assert (image != np.asarray(val.read(11))).mean() > 0.5
    moved = dataclasses.replace(train.content, stream=train.content.stream + 1)
    assert (image != np.asarray(moved.read(11))).mean() > 0.5


def test_synthetic_images_can_be_learned():
    train, val = open_source(synthetic(), "train"), open_source(synthetic(), "val")
    means = np.zeros((10, 3))
    for row, label in enumerate(train.target):
        means[label] += np.asarray(train.read(row)).mean(axis=(0, 1)) / 20
    seen = np.stack([np.asarray(val.read(row)).mean(axis=(0, 1)) for row in range(50)])
    nearest = ((seen[:, None] - means) ** 2).sum(axis=2).argmin(axis=1)
    assert (nearest == val.target).mean() > 0.9


def test_synthetic_subset():
    manifest = open_source(synthetic(subset=4), "train")
    assert np.bincount(manifest.target).tolist() == [4] * 10
    with pytest.raises(ValueError, match="data.subset=21"):
        open_source(synthetic(subset=21), "train")


def test_check_folder_lists_bad_files(root):
    whole = (root / "train" / "cat" / "0.jpg").read_bytes()
    (root / "train" / "cat" / "0.jpg").write_bytes(whole[:-40])
    (root / "val" / "ant" / "1.jpg").write_bytes(b"<html>")
    found = check_folder(root).faults
    assert [path.relative_to(root).as_posix() for path, _ in found] == [
        "train/cat/0.jpg",
        "val/ant/1.jpg",
    ]
    assert "truncated" in found[0][1].lower() and "not a readable JPEG" in found[1][1]
    assert check_folder(root / "train" / "ant").faults == []
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        check_folder(root / "nowhere")
    (root / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no image"):
        check_folder(root / "empty")
