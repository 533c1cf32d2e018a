"""The check of a folder: what it names, its summary, its list and what differs from a list."""

import hashlib
import json
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from kdfuse.engine.data.check import check_folder
from kdfuse.engine.data.durable import whole_file
from kdfuse.engine.data.listing import differences, read_listing, write_listing

RNG = np.random.default_rng(3)


def picture(height=12, width=10):
    return Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def root(tmp_path):
    """Two classes in two splits, an image each: widths 10, 11, 12, 13."""
    for i, place in enumerate(("train/ant", "train/bee", "val/ant", "val/bee")):
        (tmp_path / "set" / place).mkdir(parents=True)
        picture(20 - i, 10 + i).save(tmp_path / "set" / place / "0.jpg")
    return tmp_path / "set"


def relative(root, found):
    return {path.relative_to(root).as_posix(): why for path, why in found}


def test_a_clean_folder_has_its_summary(root):
    report = check_folder(root)
    assert report.faults == report.warnings == []
    lengths = sorted(path.stat().st_size for path in root.rglob("*.jpg"))
    assert report.summary() == [
        "4 images of 2 classes: 4 JPEG",
        "width 10 to 13 pixels, median 11.5",
        "height 17 to 20 pixels, median 18.5",
        f"file {lengths[0]} to {lengths[3]} bytes, median {(lengths[1] + lengths[2]) / 2:g}",
    ]
    assert [(image.path, image.width, image.height) for image in report.images] == [
        ("train/ant/0.jpg", 10, 20),
        ("train/bee/0.jpg", 11, 19),
        ("val/ant/0.jpg", 12, 18),
        ("val/bee/0.jpg", 13, 17),
    ]


def test_every_image_is_counted_once_and_progress_says_so(root):
    for i in range(150):  # more than two jobs of the pool
        picture(2, 2).save(root / "train" / "ant" / f"more{i}.png")
    told = []
    report = check_folder(root, lambda done, total: told.append((done, total)))
    assert len(report.images) == len({image.path for image in report.images}) == 154
    assert sum(done for done, _ in told) == 154 and {total for _, total in told} == {154}


def test_damage_is_a_fault(root):
    ant = root / "train" / "ant"
    kinds = {"jpg": "JPEG", "png": "PNG", "bmp": "BMP", "webp": "WEBP"}
    for extension, kind in kinds.items():
        path = ant / f"cut.{extension}"
        picture(40, 40).save(path, kind)
        os.truncate(path, path.stat().st_size - 30)
    (ant / "empty.jpg").write_bytes(b"")
    (ant / "page.jpg").write_bytes(b"<html>")
    report = check_folder(root)
    found = relative(root, report.faults)
    names = sorted([*(f"cut.{extension}" for extension in kinds), "empty.jpg", "page.jpg"])
    assert list(found) == [f"train/ant/{name}" for name in names]
    assert found["train/ant/empty.jpg"] == "the file is empty"
    assert "truncated" in found["train/ant/cut.jpg"]
    assert "not a readable JPEG" in found["train/ant/page.jpg"]
    assert report.warnings == []
    (seen,) = [image for image in report.images if image.path == "train/ant/page.jpg"]
    assert seen[1:] == (6, None, None, None, None, hashlib.sha256(b"<html>").hexdigest())
    assert report.summary()[0] == "10 images of 2 classes: 4 JPEG, 6 unreadable"


def test_what_decoders_differ_in_is_a_warning(root):
    ant = root / "train" / "ant"
    picture().save(ant / "png.JPEG", "PNG")
    picture().save(ant / "jpeg.webp", "JPEG")
    picture().convert("CMYK").save(ant / "cmyk.jpg")
    inks = bytearray((ant / "cmyk.jpg").read_bytes())
    inks[inks.index(b"Adobe") + 11] = 2  # the transform in Adobe's marker: YCCK
    (ant / "ycck.jpg").write_bytes(inks)
    picture().save(ant / "open.png")
    os.truncate(ant / "open.png", (ant / "open.png").stat().st_size - 12)
    picture().save(ant / "two.jpg", "MPO", save_all=True, append_images=[picture()])
    report = check_folder(root)
    assert report.faults == []
    found = relative(root, report.warnings)
    place = "train/ant/"
    assert found == {
        place + "png.JPEG": "holds a PNG, though its name ends in .JPEG; it is read as a PNG",
        place + "jpeg.webp": "holds a JPEG, though its name ends in .webp; it is read as a JPEG",
        place + "cmyk.jpg": "a JPEG of CMYK, whose colours decoders differ in; save it as RGB",
        place + "ycck.jpg": "a JPEG of YCCK, whose colours decoders differ in; save it as RGB",
        place + "open.png": "a PNG without its end, though all of its pixels are there; save it "
        "anew",
    }
    assert report.summary()[0] == "10 images of 2 classes: 7 JPEG, 1 MPO, 2 PNG"


def test_a_file_that_cannot_be_opened_is_named(root):
    victim = root / "val" / "bee" / "0.jpg"
    victim.unlink()
    victim.symlink_to("nowhere.jpg")
    report = check_folder(root)
    assert relative(root, report.faults) == {"val/bee/0.jpg": "No such file or directory"}
    assert report.images[-1][1:] == (None,) * 6


def test_the_list_holds_each_image_and_reads_back(root, tmp_path):
    with tarfile.open(root / "more.tar", "w") as tar:
        tar.add(root / "train" / "bee" / "0.jpg", "cat/1.jpg")
    report = check_folder(root)
    assert report.classes == 3
    write_listing(report.images, tmp_path / "list.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "list.jsonl").read_text().splitlines()]
    raw = (root / "train" / "bee" / "0.jpg").read_bytes()
    assert lines[0] == {
        "path": "more.tar/cat/1.jpg",
        "bytes": len(raw),
        "format": "JPEG",
        "mode": "RGB",
        "width": 11,
        "height": 19,
        "sha256": hashlib.sha256(raw).hexdigest(),
    }
    assert read_listing(tmp_path / "list.jsonl") == report.images
    assert differences(report.images, check_folder(root).images) == []


def test_missing_new_and_changed_images_are_named(root):
    before = check_folder(root).images
    (root / "train" / "ant" / "0.jpg").rename(root / "train" / "ant" / "1.jpg")
    victim = root / "val" / "ant" / "0.jpg"
    raw = bytearray(victim.read_bytes())
    raw[raw.index(b"JFIF") + 8] ^= 1  # density: decodes to the same pixels, at the same length
    victim.write_bytes(raw)
    (root / "val" / "bee" / "0.jpg").unlink()
    (root / "val" / "bee" / "0.jpg").symlink_to("nowhere.jpg")
    now = check_folder(root).images
    wanted = [
        ("train/ant/0.jpg", "missing"),
        ("train/ant/1.jpg", "new"),
        ("val/ant/0.jpg", "changed"),
        ("val/bee/0.jpg", "changed"),
    ]
    assert differences(before, now) == wanted
    assert differences(now, now) == wanted[3:]  # what cannot be read is never as it was


def test_a_list_of_something_else_is_refused(root, tmp_path):
    write_listing(check_folder(root).images, tmp_path / "list")
    whole = (tmp_path / "list").read_text()
    for text in (whole[:-20], whole + "{}\n", whole + "[1]\n", whole + "\n"):
        (tmp_path / "list").write_text(text)
        with pytest.raises(ValueError, match=r"list line [45] is not of a list that `kdfuse data"):
            read_listing(tmp_path / "list")


def test_a_list_is_there_whole_or_as_it_was(root, tmp_path):
    images = check_folder(root).images
    write_listing(images, tmp_path / "list")
    whole = (tmp_path / "list").read_bytes()
    with pytest.raises(AttributeError):
        write_listing([*images, None], tmp_path / "list")
    assert (tmp_path / "list").read_bytes() == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["list", "set"]


def test_a_full_disk_names_the_file(tmp_path):
    with pytest.raises(OSError, match="No space left on device: '.*/one'"):
        with whole_file(tmp_path / "one", tmp_path / "aside"):
            raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_the_verb_writes_and_compares_lists(root, tmp_path, kd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = kd("data", "check", "set", "--out", "list.jsonl")
    assert done.code == 0 and len(read_listing(tmp_path / "list.jsonl")) == 4
    assert kd("data", "check", "set", "--against", "list.jsonl").code == 0
    (root / "val" / "ant" / "0.jpg").unlink()
    done = kd("data", "check", "set", "--against", "list.jsonl")
    assert done.code == 2 and "set/val/ant/0.jpg: missing\n" in done.out
    assert done.err == "error: 1 images under set are not as in list.jsonl\n"
    picture().save(root / "val" / "ant" / "0.jpg", "PNG")
    done = kd("data", "check", "set")
    assert done.code == 0 and "set/val/ant/0.jpg: warning: holds a PNG" in done.out
    (root / "val" / "ant" / "0.jpg").write_bytes(b"")
    done = kd("data", "check", "set", "--out", "list.jsonl", "--against", "list.jsonl")
    assert done.code == 2 and "set/val/ant/0.jpg: the file is empty\n" in done.out
    assert "1 unreadable images or damaged tars under set" in done.err
    assert "1 images under set are not as in list.jsonl" in done.err
    assert read_listing(tmp_path / "list.jsonl")[2].bytes == 0  # written all the same
    done = kd("data", "check", "set", "--out", "none/list.jsonl")
    assert done.code == 2 and "none is not a folder; make it first" in done.err
