"""Data files that are damaged or mean harm: one error that names the file, and no memory for it."""

import gzip
import os
import pickle
import struct
import tarfile

import numpy as np
import pytest
from damaged import frugal, survives
from PIL import Image
from test_sources_cifar import ARCHIVES, cifar, packed, write
from test_sources_tar import data, made

from kdfuse.engine.data.check import Image as Listed
from kdfuse.engine.data.check import check_folder
from kdfuse.engine.data.images import UnreadableError, decode, examine, inspect, opener_of
from kdfuse.engine.data.listing import differences, read_listing, write_listing
from kdfuse.engine.data.shard import Packing, shard_folder
from kdfuse.engine.data.shard_record import FORMAT, faults_of, read_record, to_json
from kdfuse.engine.data.sources import open_source, plain_pickle
from kdfuse.engine.data.sources.glyphs import read_glyphs, write_glyphs
from kdfuse.engine.data.sources.header_cache import keep, kept
from kdfuse.engine.data.sources.plain_pickle import UnpicklingError, load_plain
from kdfuse.engine.data.sources.tar_index import members

pytestmark = pytest.mark.slow(12)

GB = 1 << 30


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def picture(path, side=8):
    pixels = np.random.default_rng(side).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path.read_bytes()


# --- CIFAR's archives


@pytest.mark.parametrize(
    "label", [10**400, -1, 2**63, 1 << 40], ids=lambda x: f"2^{x.bit_length()}"
)
def test_a_label_that_is_no_class_is_named(label, tmp_path):
    python, _ = write(tmp_path / "set", "cifar100")
    entries = {b"data": np.zeros((1, 3072), np.uint8), b"fine_labels": [label]}
    (python / "train").write_bytes(pickle.dumps(entries, protocol=4))
    with pytest.raises(ValueError, match="python/train: 'fine_labels' is not a list of classes"):
        open_source(cifar(python), "train")


@pytest.mark.parametrize(
    "raw",
    [
        b"\x80\x02}r\xff\xff\xff\x0f.",  # the memo's 268 millionth entry: room for all before it
        b"\x80\x02}p4000000000\n.",
        b"\x80\x05\x96" + struct.pack("<Q", 8 * GB) + b".",  # an array of bytes
        b"\x80\x04\x8e" + struct.pack("<Q", 8 * GB) + b".",  # bytes
        b"\x80\x02T" + struct.pack("<I", 2**31 - 1) + b"x.",
        b"\x80\x02\x8b" + struct.pack("<I", 2**31 - 1) + b"\1.",  # a number
        b"\x80\x02" + b"]" * 5000 + b".",  # 56 bytes of memory for one of the file
    ],
    ids=["memo", "text memo", "array", "bytes", "text", "number", "lists"],
)
def test_a_pickle_asks_for_no_more_memory_than_it_fills(raw, monkeypatch):
    monkeypatch.setattr(plain_pickle, "MOST", 4000)
    with frugal(), pytest.raises(UnpicklingError):
        load_plain(raw)


def test_sizes_are_checked_before_memory_is_asked_for(tmp_path):
    python, binary = write(tmp_path / "set", "cifar100")
    os.truncate(binary / "train.bin", 3074 * GB // 1000)  # all holes
    with frugal(), pytest.raises(ValueError, match=r"train.bin: \d+ bytes, the official files"):
        open_source(cifar(binary), "train")
    root = tmp_path / "packed"
    root.mkdir()
    with gzip.open(root / ARCHIVES[python.name], "wb", 1) as file:
        info = tarfile.TarInfo(f"{python.name}/train")
        info.size = 700 * GB
        file.write(info.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    with frugal(), pytest.raises(ValueError, match=rf"train: {700 * GB} bytes, the official"):
        open_source(cifar(root), "train")


@pytest.mark.parametrize("source", ["cifar10", "cifar100"])
def test_damaged_cifar(source, tmp_path):
    for folder in write(tmp_path / "set", source):
        for path in sorted(folder.iterdir()):
            split = "val" if path.name.startswith("test") else "train"
            if path.name.startswith("data_batch") and "_1" not in path.name:
                continue
            if path.name.startswith("coarse"):
                continue  # is not read

            def read(folder=folder, split=split):
                open_source(cifar(folder, source), split)

            # Of names that are too few, the file of labels is named.
            refused = survives(read, path, 80, ValueError, told=f"{folder.name}/")
            assert 10 < refused < 80, path


@pytest.mark.parametrize("inside", [False, True])
def test_a_damaged_archive(inside, tmp_path):
    python, _ = write(tmp_path / "set", "cifar100")
    archive = packed(python, tmp_path / "packed") / ARCHIVES[python.name]
    through = {"pack": lambda raw: gzip.compress(raw, 1), "unpack": gzip.decompress}

    def read():
        open_source(cifar(archive.parent), "val")

    allowed = (ValueError, FileNotFoundError)
    told = f"{python.name}/"
    assert survives(read, archive, 60, *allowed, told=told, **(through if inside else {})) > 10


# --- tars


def header(name, size, kind=tarfile.REGTYPE):
    """A block for a member, whatever its size, with the checksum that fits."""
    info = tarfile.TarInfo(name)
    info.type = kind
    raw = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    raw[124:136] = (size % 2**95 | 1 << 95).to_bytes(12, "big") if size >> 33 else b"%011o\0" % size
    if size < 0:
        raw[124:136] = (size % 2**96).to_bytes(12, "big")
    return summed(raw)


def summed(raw):
    raw = bytearray(raw)
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw[:512])
    return bytes(raw)


def attributes(**values):
    """A PAX header, which overrides what the header of the next member says."""
    lines = b""
    for name, value in values.items():
        line = b" %s=%s\n" % (name.encode(), value)
        length = len(line) + len(str(len(line) + 2))
        lines += b"%d%s" % (length, line)
    return header("pax", len(lines), tarfile.XHDTYPE) + lines + bytes(-len(lines) % 512)


END = bytes(1024)


@pytest.mark.parametrize(
    "raw",
    [
        header("a.jpg", 745 * GB) + END,
        header("a.jpg", -512) + END,
        header("a.jpg", -1024) + END,
        header("a.jpg", 512) + bytes(512) + header("b.jpg", -1536) + END,
        header("a.jpg", 2**90) + END,
        header("a.cls", 745 * GB) + END,
        header("x", 3 * GB, tarfile.GNUTYPE_LONGNAME) + END,
        header("x", -1, tarfile.GNUTYPE_LONGNAME) + END,
        header("x", -4096, tarfile.GNUTYPE_LONGNAME) + END,
        header("x", 3 * GB, tarfile.XHDTYPE) + END,
        header("x", -4096, tarfile.XHDTYPE) + END,
        attributes(size=b"-4096") + header("a.jpg", 0) + END,
        attributes(size=b"9" * 400) + header("a.jpg", 0) + END,
        attributes(**{"GNU.sparse.major": b"1", "GNU.sparse.minor": b"0"})
        + header("a.jpg", 0)
        + END,
        attributes(path=b"a\0b.jpg") + header("a.jpg", 0) + END,
        header("x", 0, tarfile.XHDTYPE) * 3000 + END,
        header("x", 1, tarfile.GNUTYPE_LONGNAME) + END,
        b"",
        END,
    ],
)
def test_a_tar_with_sizes_that_cannot_be(raw, tmp_path):
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "x.tar").write_bytes(raw)
    with frugal(), pytest.raises(ValueError, match=r"train/x.tar: |train hold no image"):
        open_source(data(tmp_path), "train")
    assert "\n" not in str(pytest.raises(ValueError, open_source, data(tmp_path), "train").value)


@pytest.mark.parametrize(
    ("label", "why"),
    [
        (b"-1", "member k.cls holds b'-1', wants the number of a class"),
        (b"100000000000", "x.tar/k.jpg: its KEY.cls holds 100000000000, and there are 1 images"),
        (b"9" * 18, "x.tar/k.jpg: its KEY.cls holds 999999999999999999, and there are 1 images"),
        (b"9" * 19, "x.tar: member k.cls holds b'9*', wants the number"),
        (b"9" * 5000, "x.tar: member k.cls holds b'9*', wants the number"),
        (b"\xd9\xa3", "x.tar: member k.cls holds"),  # an Arabic three
        (b"", "x.tar: member k.cls holds b'', wants the number"),
    ],
)
def test_a_label_in_a_tar_that_is_no_class_is_named(label, why, tmp_path):
    image = picture(tmp_path / "a.jpg")
    for split in ("train", "val"):
        made(tmp_path / split / "x.tar", ("k.jpg", image), ("k.cls", label))
    with frugal(), pytest.raises(ValueError, match=why):
        open_source(data(tmp_path), "train")


def test_names_of_members_lead_nowhere(tmp_path):
    """They are names alone: nothing is written, and links are refused."""
    image = picture(tmp_path / "a.jpg")
    names = ("/etc/x/a.jpg", "../../x/b.jpg", "x/../x/c.jpg")
    for split in ("train", "val"):
        made(tmp_path / "set" / split / "x.tar", *((name, image) for name in names))
    manifest = open_source(data(tmp_path / "set"), "train")
    assert manifest.classes == ["x"] and not manifest.bad
    assert all(manifest.read(row).size == (8, 8) for row in range(3))
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
        with tarfile.open(tmp_path / "link.tar", "w") as tar:
            info = tarfile.TarInfo("l.jpg")
            info.type, info.linkname = kind, "../../../etc/passwd"
            tar.addfile(info)
        with pytest.raises(UnreadableError, match="member l.jpg is "):
            members(str(tmp_path / "link.tar"))


def test_what_is_no_file_is_not_waited_for(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split / "ant").mkdir(parents=True)
        picture(tmp_path / split / "ant" / "a.jpg")
        os.mkfifo(tmp_path / split / "ant" / "pipe.jpg")
        os.symlink("/dev/zero", tmp_path / split / "ant" / "zero.jpg")
        os.symlink("nowhere", tmp_path / split / "ant" / "gone.jpg")
    manifest = open_source(data(tmp_path, "folder"), "train")
    assert manifest.bad == {
        1: "No such file or directory",
        2: "not a regular file",
        3: "not a regular file",
    }
    faults = check_folder(tmp_path).faults
    assert sorted(why for _, why in faults) == sorted(2 * list(manifest.bad.values()))
    os.mkfifo(tmp_path / "train" / "x.tar")
    with pytest.raises(ValueError, match="train/x.tar is no file"):
        open_source(data(tmp_path), "train")


@pytest.mark.parametrize("sums", [False, True])  # are the headers' checksums those of the damage
def test_damaged_tars(sums, tmp_path):
    image = picture(tmp_path / "a.jpg")
    for split in ("train", "val"):
        words = (("0.jpg", image), ("0.cls", b"0"), ("1.jpg", image), ("1.cls", b"1"))
        made(tmp_path / split / "x.tar", *words)

    def again(raw):
        blocks = [raw[at : at + 512] for at in range(0, len(raw), 512)]
        return b"".join(summed(b) if b"ustar" in b and len(b) == 512 else b for b in blocks)

    def read():
        open_source(data(tmp_path), "train")

    path = tmp_path / "train" / "x.tar"
    told = f"data.root={tmp_path}: train and val"
    assert survives(read, path, 250, ValueError, told=told, pack=again if sums else bytes) > 40


# --- images, drawings, what was kept


@pytest.mark.parametrize("kind", ["jpg", "png", "bmp", "webp"])
@pytest.mark.parametrize("reads", [inspect, decode, examine])
def test_damaged_images(kind, reads, tmp_path):
    picture(path := tmp_path / f"a.{kind}", 16)

    def read():
        try:
            reads(opener_of(str(path)))
        except UnreadableError as error:
            assert str(error)
            raise ValueError(path.name) from error

    assert survives(read, path, 120, ValueError) > 20


def test_damaged_glyphs(tmp_path):
    path = write_glyphs(tmp_path, 100)
    assert survives(lambda: read_glyphs(tmp_path, 100, "val"), path, 40, ValueError) > 10


@pytest.mark.parametrize("shape", [(10**12, 32, 32, 3), (100, 32, 32, -3), (0,)])
def test_drawings_of_another_size_are_refused_before_they_are_read(shape, tmp_path):
    path = write_glyphs(tmp_path, 100)
    raw = path.read_bytes()
    at = raw.index(b"{", raw.index(b"val.npy"))
    end = raw.index(b"\n", at)
    text = repr({"descr": "|u1", "fortran_order": False, "shape": shape}).encode()
    path.write_bytes(raw[:at] + text.ljust(end - at) + raw[end:])
    with frugal(), pytest.raises(ValueError, match="glyphs-1-100.npz is not what"):
        read_glyphs(tmp_path, 100, "val")


def test_what_was_kept_is_taken_whole_or_not_at_all(tmp_path):
    path, data = tmp_path / "kept", bytes(range(200))
    keep(path, data, "numbers")
    found = []
    survives(lambda: found.append(kept(path)), path, 200)
    assert set(found) <= {None, data} and found.count(None) > 150


# --- lists and records


def test_damaged_lists_of_images(tmp_path):
    path = tmp_path / "list.jsonl"
    known = (100, "JPEG", "RGB", 10, 12, "ab" * 32)
    images = [Listed(f"train/ant/{i}.jpg", *known) for i in range(4)]
    images.append(Listed("train/ant/\udcff.jpg", *6 * [None]))  # a name that is no UTF-8
    write_listing(images, path)
    assert read_listing(path) == images
    assert survives(lambda: differences(images, read_listing(path)), path, 600, ValueError) > 300


RECORDED = {
    "format": FORMAT,
    "plan": {"split": "train", "source": "ab", "images": 3, "shards": 1, "seed": 0},
    "images": 3,
    "resized": 0,
    "skipped": {"ant/1.jpg": "the file is empty"},
    "shards": [{"name": "00000.tar", "images": 3, "bytes": 100, "sha256": "ab" * 32}],
}


def test_damaged_records_of_packed_splits(tmp_path):
    path = tmp_path / "shards.json"
    path.write_bytes(to_json(RECORDED))
    assert read_record(tmp_path) == RECORDED
    assert survives(lambda: read_record(tmp_path), path, 600, ValueError) > 300
    assert survives(lambda: faults_of(tmp_path), path, 300) == 0  # told, not raised


@pytest.mark.parametrize("name", ["../00000.tar", "/etc/passwd", "00000.tar/..", "x.tar", 3, None])
def test_a_record_names_tars_beside_it_alone(name, tmp_path):
    shard = {**RECORDED["shards"][0], "name": name}
    (tmp_path / "shards.json").write_bytes(to_json({**RECORDED, "shards": [shard]}))
    with pytest.raises(ValueError, match="shards.json is no record of kdfuse-shards-1 .shards.0.n"):
        read_record(tmp_path)


def test_a_tar_whose_record_is_damaged_is_packed_again(tmp_path):
    for split in ("train", "val"):
        (tmp_path / "set" / split / "ant").mkdir(parents=True)
        picture(tmp_path / "set" / split / "ant" / "a.png")
    (tmp_path / "set" / "val" / "ant" / "b.png").write_bytes(b"")
    with pytest.raises(ValueError, match="ant/b.png: the file is empty"):
        shard_folder(tmp_path / "set", tmp_path / "tars", Packing())
    part = tmp_path / "tars" / ".train.part"
    (part / "00000.json").write_text('{"name": "00000.tar"}')
    shard_folder(tmp_path / "set", tmp_path / "tars", Packing(skip_bad=True))
    assert check_folder(tmp_path / "tars").faults == []
