"""Packing a folder into tars: the same images, a shuffle by the seed, whole or not there."""

import errno
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kdfuse.engine.data import shard_tars
from kdfuse.engine.data.check import check_folder
from kdfuse.engine.data.loaders import make_loader
from kdfuse.engine.data.plan import permutation
from kdfuse.engine.data.shard import Packing, shard_folder
from kdfuse.engine.data.sources import image_sizes, open_source, tar_index
from kdfuse.engine.recipe.data import Data

pytestmark = pytest.mark.slow(10)

ROOT = Path(__file__).parents[3]
CLASSES = ("ant", "bee", "cat")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path):
    """Three classes of five training and two validation images, of many sizes."""
    rng = np.random.default_rng(4)
    for split, count in (("train", 5), ("val", 2)):
        for at, name in enumerate(CLASSES):
            folder = tmp_path / "set" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (20 + 4 * i, 48 - 8 * at, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.JPEG", format="JPEG", quality=90)
    return tmp_path / "set"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "tars"


def data(root, source="tar", **changes):
    return Data(source=source, root=root, size=16, eval_resize=None, **changes)


def members(out, split):
    """(name, content) of each image, tar by tar in the tars' order."""
    for path in sorted((out / split).glob("*.tar")):
        with tarfile.open(path) as tar:
            for info in tar:
                yield info.name, tar.extractfile(info).read()


def originals(root, split):
    """(name, content) of each image, by class and name."""
    for path in sorted((root / split).rglob("*.*")):
        yield path.relative_to(root / split).as_posix(), path.read_bytes()


def content(out):
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file()
    }


def test_the_tars_hold_the_files_shuffled_by_the_seed(root, out):
    shard_folder(root, out, Packing(shards=2, seed=9))
    for split, n in (("train", 15), ("val", 6)):
        files = list(originals(root, split))
        wanted = [files[row] for row in permutation(9, 0, n)]
        assert list(members(out, split)) == wanted and wanted != files
    assert sorted(content(out)) == [
        f"{split}/{name}"
        for split in ("train", "val")
        for name in ("00000.tar", "00001.tar", "shards.json")
    ]


def test_the_same_settings_give_the_same_bytes_and_another_seed_others(root, out):
    packed = []
    for seed, folder in ((0, "a"), (0, "b"), (1, "c")):
        shard_folder(root, out / folder, Packing(shards=3, seed=seed))
        packed.append(content(out / folder))
    assert packed[0] == packed[1] and packed[0] != packed[2]


@pytest.mark.parametrize("loader", ["torchvision", "resident"])
def test_a_loader_gives_the_images_of_the_folder(root, out, loader):
    shard_folder(root, out, Packing(shards=4))
    found = []
    for place, source in ((root, "folder"), (out, "tar")):
        chosen = data(place, source, loader=loader, augment="none")
        manifest = open_source(chosen, "train")
        made = make_loader(manifest, chosen, 5, seed=3, train=True)
        batches = list(made.epoch(0))
        made.close()
        images = torch.cat([batch.images for batch in batches])
        target = torch.cat([batch.target for batch in batches])
        assert len(images) == 15
        pairs = zip(images, target, strict=True)
        found.append((manifest.digest, Counter((i.numpy().tobytes(), int(t)) for i, t in pairs)))
        assert manifest.classes == list(CLASSES) and not manifest.bad
    assert found[0] == found[1]


def test_a_packed_set_opens_without_reading_its_tars(root, out, monkeypatch):
    shard_folder(root, out, Packing(shards=2))
    monkeypatch.setattr(tar_index, "members", None)
    monkeypatch.setattr(image_sizes, "inspect", None)
    assert len(open_source(data(out), "train").target) == 15


def test_one_split_at_a_time(root, out):
    (record,) = shard_folder(root, out, Packing(shards=1), ("train",))
    assert record["plan"]["split"] == "train" and not (out / "val").exists()
    with pytest.raises(FileNotFoundError, match="no folder 'val'"):
        open_source(data(out), "train")
    first = content(out)
    shard_folder(root, out, Packing(shards=1), ("val",))
    assert first.items() < content(out).items()
    assert len(open_source(data(out), "val").target) == 6


def test_the_record_says_what_is_there(root, out):
    told = []
    train, _ = shard_folder(root, out, Packing(shards=4), told=lambda *now: told.append(now))
    assert sum(done for done, _ in told) == 21 and {total for _, total in told} == {21}
    assert train == json.loads((out / "train" / "shards.json").read_text())
    assert train["plan"] == {
        "split": "train",
        "source": open_source(data(root, "folder"), "train").digest,
        "images": 15,
        "shards": 4,
        "seed": 0,
        "short_side": None,
        "quality": None,
    }
    assert (train["images"], train["resized"], train["skipped"]) == (15, 0, {})
    assert [shard["images"] for shard in train["shards"]] == [4, 4, 4, 3]
    for shard in train["shards"]:
        raw = (out / "train" / shard["name"]).read_bytes()
        assert shard["bytes"] == len(raw)
        assert shard["sha256"] == hashlib.sha256(raw).hexdigest()


def test_the_number_of_tars_follows_from_their_size(root, out):
    total = sum(len(raw) for _, raw in originals(root, "train"))
    for parts in (1, 3):
        megabytes = total / parts / 1e6
        (record,) = shard_folder(root, out / str(parts), Packing(shard_mb=megabytes), ("train",))
        assert len(record["shards"]) == parts
    (record,) = shard_folder(root, out / "default", Packing(), ("train",))
    assert len(record["shards"]) == 1  # far below 256 MB
    (record,) = shard_folder(root, out / "least", Packing(shard_mb=1e-6), ("train",))
    assert len(record["shards"]) == 15  # no tar without an image


def test_large_images_are_made_smaller_and_no_other_changes(root, out):
    Image.open(root / "train" / "ant" / "4.JPEG").save(root / "train" / "ant" / "5.png")
    Image.new("L", (24, 24), 7).save(root / "train" / "ant" / "6.png")
    train, val = shard_folder(root, out, Packing(short_side=24, quality=70))
    assert train["plan"]["short_side"] == 24 and train["plan"]["quality"] == 70
    made, resized = dict(members(out, "train")), 0
    for name, raw in originals(root, "train"):
        image = Image.open(io.BytesIO(raw))
        if min(image.size) <= 24:
            assert made.pop(name) == raw
            continue
        resized += 1
        small = Image.open(io.BytesIO(made.pop(name + ".jpg" * name.endswith("png"))))
        assert small.format == "JPEG" and min(small.size) == 24
        scale = 24 / min(image.size)
        assert max(small.size) == int(max(image.size) * scale + 1e-9)
        wanted = image.convert("RGB").resize(small.size, Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        wanted.save(buffer, "JPEG", quality=70)
        assert (np.asarray(small) == np.asarray(Image.open(buffer))).all()
    assert made == {} and train["resized"] == resized and 0 < resized < 17
    assert check_folder(out).faults == check_folder(out).warnings == []
    (default, _) = shard_folder(root, out / "default", Packing(short_side=24))
    assert default["plan"]["quality"] == 90
    best, worst = (
        sum(len(raw) for _, raw in members(at, "train")) for at in (out / "default", out)
    )
    assert best > worst


def test_a_name_that_a_neighbour_gets_is_refused(root, out):
    Image.new("RGB", (50, 50)).save(root / "train" / "ant" / "a.png")
    Image.new("RGB", (50, 50)).save(root / "train" / "ant" / "a.png.jpg")
    with pytest.raises(ValueError, match="train/ant/a.png.jpg has the name that its neighbour"):
        shard_folder(root, out, Packing(short_side=24))
    shard_folder(root, out, Packing())


def spoil(root):
    """One that its head shows, and one that only decoding it does; their names and reasons."""
    (root / "train" / "ant" / "1.JPEG").write_bytes(b"")
    path = root / "val" / "cat" / "0.JPEG"
    Image.open(path).save(path, "PNG")
    raw = path.read_bytes()
    middle = len(raw) // 2
    path.write_bytes(raw[:middle] + bytes(20) + raw[middle + 20 :])
    return {"train": {"ant/1.JPEG": "the file is empty"}, "val": {"cat/0.JPEG": "broken"}}


def test_bad_images_are_named_and_nothing_is_put_into_place(root, out):
    spoil(root)
    assert len(open_source(data(root, "folder"), "val").bad) == 0
    with pytest.raises(ValueError, match="^1 unreadable images in .*set/train; repair") as told:
        shard_folder(root, out, Packing(shards=2))
    assert f"\n{root}/train/ant/1.JPEG: the file is empty\n1 unreadable images" in str(told.value)
    assert f"\n{root}/val/cat/0.JPEG: broken" in str(told.value)
    assert str(told.value).endswith("\nnothing was put into place")
    with pytest.raises(ValueError, match="val/cat/0.JPEG: .*broken"):
        shard_folder(root, out, Packing(shards=2), ("val",))
    assert not (out / "train").exists() and not (out / "val").exists()


def test_of_many_bad_images_the_first_are_named(root, out):
    for at in range(30):
        (root / "train" / "ant" / f"bad{at:02d}.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="^30 unreadable images") as told:
        shard_folder(root, out, Packing(shards=2))
    lines = str(told.value).splitlines()
    assert [line.split("/")[-1][:5] for line in lines[1:21]] == [f"bad{at:02d}" for at in range(20)]
    assert lines[21:] == ["and 10 more", "nothing was put into place"]


def test_bad_images_can_be_left_out(root, out, monkeypatch):
    bad = spoil(root)
    with pytest.raises(ValueError, match="--skip-bad"):
        shard_folder(root, out, Packing(shards=3))
    made = []
    real = shard_tars._image
    monkeypatch.setattr(
        shard_tars, "_image", lambda work, row: made.append(work.name(row)) or real(work, row)
    )
    records = shard_folder(root, out, Packing(shards=3, skip_bad=True))
    assert len(made) == 7 and {"ant/1.JPEG", "cat/0.JPEG"} < set(made)  # of the other tars none
    for record, split in zip(records, ("train", "val"), strict=True):
        ((name, why),) = record["skipped"].items()
        assert bad[split][name] in why
        assert record["images"] == record["plan"]["images"] - 1
        left = dict(members(out, split))
        assert left == {n: raw for n, raw in originals(root, split) if n != name}
    assert check_folder(out).faults == [] and not list(out.glob(".*"))
    assert shard_folder(root, out, Packing(shards=3, skip_bad=True)) == records
    with pytest.raises(ValueError, match="1 images left out, now --skip-bad is not given"):
        shard_folder(root, out, Packing(shards=3))


def test_a_class_of_which_none_is_left_is_refused(root, out):
    for path in (root / "val" / "bee").iterdir():
        path.write_bytes(b"<html>")
    with pytest.raises(ValueError, match="no image of class 'bee' in .*set/val can be read"):
        shard_folder(root, out, Packing(skip_bad=True))
    assert not (out / "train").exists() and not (out / "val").exists()


def test_a_file_that_is_cut_while_packing_is_bad(root, out, monkeypatch):
    real = shard_tars.pack

    def cut(work, told):
        os.truncate(root / "train" / "bee" / "2.JPEG", 100)
        return real(work, told)

    monkeypatch.setattr("kdfuse.engine.data.shard.pack", cut)
    with pytest.raises(ValueError, match="bee/2.JPEG: 100 bytes, was .* when indexed"):
        shard_folder(root, out, Packing())


def test_what_is_there_stays_and_other_content_is_refused(root, out):
    first = shard_folder(root, out, Packing(shards=2))
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert shard_folder(root, out, Packing(shards=2)) == first
    assert times == {path: path.stat().st_mtime_ns for path in out.rglob("*")}

    def refused(why, **changes):
        with pytest.raises(ValueError, match=why):
            shard_folder(root, out, Packing(**{"shards": 2, **changes}))
        assert sorted(path.name for path in out.iterdir()) == ["train", "val"]

    refused("train was packed otherwise .seed 0, now 7.; name a new folder or remove it", seed=7)
    refused("shards 2, now 3", shards=3)
    refused("short_side None, now 24; quality None, now 90", short_side=24)
    os.truncate(out / "val" / "00001.tar", 512)
    refused("val was packed otherwise .00001.tar: 512 bytes, shards.json says 10240.")
    (out / "val" / "00001.tar").unlink()
    refused("00001.tar: missing")
    (out / "val" / "shards.json").write_text('{"format"')
    refused("val/shards.json is no record of .*pack the set again")
    (out / "val" / "shards.json").write_text('{"format": "another"}')
    refused("shards.json is no record of kdfuse-shards-1 .format: ")
    (out / "val" / "shards.json").unlink()
    refused("val holds other files; name a new folder")
    shutil.rmtree(out / "val")
    (out / "val").write_text("a file")
    with pytest.raises(NotADirectoryError, match="val"):
        shard_folder(root, out, Packing(shards=2))
    (out / "val").unlink()
    (out / "val").mkdir()  # nothing is lost with an empty one
    shard_folder(root, out, Packing(shards=2))
    (root / "train" / "ant" / "0.JPEG").unlink()
    refused("train was packed otherwise .source .*images 15, now 14")


def test_settings_that_contradict_themselves_are_refused(root, out):
    with pytest.raises(ValueError, match="--shards 2 and --shard-mb 5 both set the number"):
        Packing(shards=2, shard_mb=5.0)
    with pytest.raises(ValueError, match="--quality 80: images are copied as they are without"):
        Packing(quality=80)
    with pytest.raises(ValueError, match="--shards: 7 tars of the 6 images in .*/val, at most 6"):
        shard_folder(root, out, Packing(shards=7))
    with pytest.raises(ValueError, match="set/tars lies in the source .*/set; name a folder out"):
        shard_folder(root, root / "tars", Packing())
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder; expected ROOT/train/"):
        shard_folder(root / "nowhere", out, Packing())
    assert not out.exists() and sorted(os.listdir(root)) == ["train", "val"]
    out.write_text("")
    with pytest.raises(ValueError, match="is a file; name a new folder"):
        shard_folder(root, out, Packing())


def test_two_at_a_time_are_refused(root, out):
    import fcntl

    (out / ".val.part").mkdir(parents=True)
    with open(out / ".val.part" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=".val.part is in use by another `kdfuse data shard`"):
            shard_folder(root, out, Packing())
    shard_folder(root, out, Packing())
    assert check_folder(out).faults == []


def test_a_full_disk_names_the_file_and_the_next_run_ends_it(root, out, monkeypatch):
    real, left = os.fsync, [4]

    def full(descriptor):
        left[0] -= 1
        if left[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device: '.*/tars/.train.part/"):
        shard_folder(root, out, Packing(shards=3))
    assert not (out / "train").exists()
    monkeypatch.undo()
    shard_folder(root, out, Packing(shards=3))
    shard_folder(root, out.with_name("other"), Packing(shards=3))
    assert content(out) == content(out.with_name("other"))


def test_check_finds_what_is_not_as_the_record_says(root, out):
    shard_folder(root, out, Packing(shards=2))
    tar = out / "train" / "00001.tar"
    whole = tar.read_bytes()

    def found():
        return {path.relative_to(out).as_posix(): why for path, why in check_folder(out).faults}

    (where,) = [m.offset for m in tar_index.members(str(tar))][:1]
    start = whole.index(b"JFIF", where) + 8  # density: the image decodes as it did
    tar.write_bytes(whole[:start] + bytes([whole[start] ^ 1]) + whole[start + 1 :])
    assert found() == {"train/00001.tar": "its bytes are not those that shards.json has the "
                       "checksum of"}  # fmt: skip
    tar.write_bytes(whole + bytes(512))
    length = len(whole)
    assert found() == {"train/00001.tar": f"{length + 512} bytes, shards.json says {length}"}
    tar.unlink()
    assert "missing, though shards.json lists it" in found()["train/00001.tar"]
    tar.write_bytes(whole)
    (out / "train" / "more.tar").write_bytes(whole)
    assert found() == {"train/more.tar": "not in shards.json, so not part of the packed set"}
    (out / "train" / "more.tar").unlink()
    (out / "val" / "shards.json").write_text("[]")
    assert "no record of" in found()["val/shards.json"]
    shard_folder(root, out.with_name("again"), Packing())
    assert check_folder(out.with_name("again")).faults == []


def test_check_names_what_a_killed_run_left(root, out):
    shard_folder(root, out, Packing())
    (out / ".val.part" / "whole").mkdir(parents=True)
    (out / ".val.part" / "whole" / "00000.tar").write_bytes(b"half")
    report = check_folder(out)
    assert report.faults == [] and len(report.images) == 21
    ((path, why),) = report.warnings
    assert path == out / ".val.part" and "did not end; run it again" in why


def test_the_verb(root, out, kd, monkeypatch):
    monkeypatch.chdir(root.parent)
    done = kd("data", "shard", "set", "tars", "--shards", 2, "--short-side", 24, "--seed", 5)
    assert done.code == 0, done.err
    assert done.out == (
        "tars/train: 15 images in 2 tars, 9 made smaller\n"
        "tars/val: 6 images in 2 tars, 0 made smaller\n"
    )
    assert json.loads((out / "train" / "shards.json").read_text())["plan"]["seed"] == 5
    assert kd("data", "check", "tars").out.endswith("tars: every image can be read\n")
    spoil(root)
    done = kd("data", "shard", "set", "few", "--split", "train")
    assert done.code == 2 and "set/train/ant/1.JPEG: the file is empty" in done.err
    done = kd("data", "shard", "set", "few", "--split", "train", "--skip-bad")
    assert done.out == (
        "set/train/ant/1.JPEG: left out: the file is empty\nfew/train: 14 images in 1 tars\n"
    )
    assert not (out.with_name("few") / "val").exists()
    for words in (["--split", "test"], ["--shards", "0"], ["--quality", "101", "--short-side", 9]):
        assert kd("data", "shard", "set", "none", *words).code == 2
    done = kd("data", "shard", "set", "none", "--shards", 2, "--shard-mb", 1)
    assert done.code == 2 and "leave one out" in done.err and not Path("none").exists()


# Forks packers that are killed, each one call later than the last; fork, because imports take long.
PACKER = """
import os, signal, sys
from pathlib import Path
from kdfuse.engine.data.shard import Packing, shard_folder

source, folder = Path(sys.argv[1]), Path(sys.argv[2])
packing = Packing(shards=2)

def pack(target):
    shard_folder(source, target, packing, ("train",))

def deadly(n):
    left = [n]
    def armed(call):
        def inner(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)
        return inner
    for name in ("fsync", "rename", "replace", "mkdir", "rmdir", "unlink"):
        setattr(os, name, armed(getattr(os, name)))

def packed(target, n):
    '''Whether a packer that dies at its n-th call came to its end.'''
    pid = os.fork()
    if pid == 0:
        deadly(n)
        pack(target)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or status == 0, status
    return status == 0

def content(target):
    return {path.name: path.read_bytes() for path in (target / "train").iterdir()}

pack(folder / "good")
good = content(folder / "good")
n, done = 0, False
while not done:
    n += 1
    target = folder / str(n)
    done = packed(target, n)
    assert not (target / "train").exists() or content(target) == good
    if n % 5 == 0:  # killed once more, elsewhere
        packed(target, n // 2)
    pack(target)
    assert content(target) == good and os.listdir(target) == ["train"], os.listdir(target)
print("calls", n)
"""


def test_kill_9_leaves_no_half_split_and_the_next_run_ends_it(root, tmp_path):
    command = [sys.executable, "-c", PACKER, str(root), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[1]) > 25  # calls of a run that nobody kills


def test_an_end_between_the_splits_is_gone_on_with(root, out, monkeypatch):
    real = os.rename

    def failing(source, target):
        if Path(target).name == "val":
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", failing)
        with pytest.raises(KeyboardInterrupt):
            shard_folder(root, out, Packing(shards=2))
    assert (out / "train").is_dir() and not (out / "val").exists()
    with pytest.raises(FileNotFoundError, match="no folder 'val'"):
        open_source(data(out), "train")
    shard_folder(root, out, Packing(shards=2))
    shard_folder(root, out.with_name("good"), Packing(shards=2))
    assert content(out) == content(out.with_name("good"))


def test_a_killed_run_is_gone_on_with(root, out, monkeypatch):
    """The tars that have a record are not made again; those of other settings are."""
    real, dead = shard_tars._image, []

    def failing(work, row):
        if work.name(row) in dead:
            raise OSError("killed here")
        made.append(work.name(row))
        return real(work, row)

    monkeypatch.setattr(shard_tars, "_image", failing)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    order = permutation(0, 0, 15)
    names = [name for name, _ in originals(root, "train")]
    dead.append(names[order[12]])  # in the last of three tars
    made = []
    with pytest.raises(OSError, match="killed here"):
        shard_folder(root, out, Packing(shards=3), ("train",))
    assert sorted(p.name for p in (out / ".train.part" / "whole").iterdir()) == [
        "00000.tar",
        "00001.tar",
    ]
    dead.clear()
    made.clear()
    shard_folder(root, out, Packing(shards=3), ("train",))
    assert sorted(made) == sorted(names[row] for row in order[10:])
    dead.append(names[order[12]])
    with pytest.raises(OSError):
        shard_folder(root, out / "new", Packing(shards=3), ("train",))
    dead.clear()
    made.clear()
    shard_folder(root, out / "new", Packing(shards=3, short_side=24), ("train",))
    assert len(made) == 15


def test_an_end_while_another_plan_is_cleared_away_is_gone_on_with(root, out, monkeypatch):
    """What is left of the first plan's tars is taken for none of it."""

    def dying(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", dying)
        with pytest.raises(KeyboardInterrupt):
            shard_folder(root, out, Packing(shards=2), ("train",))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path: dying(os.rename(path, out / "gone")))
        with pytest.raises(KeyboardInterrupt):
            shard_folder(root, out, Packing(shards=2, seed=1), ("train",))
    shutil.rmtree(out / "gone")
    for target in (out, out.with_name("good")):
        shard_folder(root, target, Packing(shards=2), ("train",))
    assert content(out) == content(out.with_name("good"))


def test_long_names_and_those_beyond_ascii_stay(root, out):
    old = root / "train" / "ant"
    (old / "0.JPEG").rename(old / f"caf\u00e9 {'x' * 180}.jpg")
    for split in ("train", "val"):
        (root / split / "bee").rename(root / split / "b\u00ea")
    shard_folder(root, out, Packing(shards=2))
    folder, tars = open_source(data(root, "folder"), "train"), open_source(data(out), "train")
    assert tars.classes == folder.classes and tars.digest == folder.digest
    assert check_folder(out).faults == []


def test_what_a_killed_run_left_is_named_where_nothing_else_is(tmp_path):
    (tmp_path / ".train.part").mkdir()
    with pytest.raises(ValueError, match=r"holds no image.*\.train\.part: left by a `kdfuse data"):
        check_folder(tmp_path)
