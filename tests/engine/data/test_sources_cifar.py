"""CIFAR from its official files: every layout gives the same set, and damage is named."""

import pickle
import struct
import tarfile
import warnings

import numpy as np
import pytest
import torch

from kdfuse.engine.data.loaders import LOADERS, make_loader
from kdfuse.engine.data.schedule import Schedule
from kdfuse.engine.data.sources import open_source
from kdfuse.engine.data.sources.plain_pickle import load_plain
from kdfuse.engine.recipe.data import Data

COUNTS = {"train": 10, "val": 4}  # images of a file
BATCHES = [f"data_batch_{number}" for number in range(1, 6)]
FOLDERS = {
    "cifar10": ("cifar-10-batches-py", "cifar-10-batches-bin"),
    "cifar100": ("cifar-100-python", "cifar-100-binary"),
}
ARCHIVES = {
    "cifar-10-batches-py": "cifar-10-python.tar.gz",
    "cifar-10-batches-bin": "cifar-10-binary.tar.gz",
    "cifar-100-python": "cifar-100-python.tar.gz",
    "cifar-100-binary": "cifar-100-binary.tar.gz",
}


def python2(value):
    """The opcodes with which Python 2 and NumPy 1 pickled the official files (protocol 2)."""
    if isinstance(value, bytes):
        return b"T" + struct.pack("<i", len(value)) + value
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, list):
        return b"](" + b"".join(map(python2, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(python2(k) + python2(v) for k, v in value.items()) + b"u"
    made = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nJ\0\0\0\0\x85" + python2(b"b")
    shape = python2(value.shape[0]) + python2(value.shape[1])
    kind = b"cnumpy\ndtype\n(" + python2(b"u1") + python2(0) + python2(1) + b"tR("
    kind += python2(3) + python2(b"|") + b"NNN" + python2(-1) * 2 + python2(0) + b"tb"
    return (
        made
        + b"tR("
        + python2(1)
        + b"("
        + shape
        + b"t"
        + kind
        + b"\x89"
        + python2(value.tobytes())
        + b"tb"
    )


def dumped(value):
    return b"\x80\x02" + python2(value) + b"."


def images(source):
    """{file: (images (n, 32, 32, 3), fine labels, coarse labels)} of a small set."""
    rng = np.random.default_rng(len(source))
    train = BATCHES if source == "cifar10" else ["train"]
    test = "test_batch" if source == "cifar10" else "test"
    classes = 10 if source == "cifar10" else 100
    return {
        name: (
            rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8),
            rng.permutation(classes)[:count].tolist(),
            rng.integers(0, 20, count).tolist(),
        )
        for name, count in [(name, COUNTS["train"]) for name in train] + [(test, COUNTS["val"])]
    }


def write(root, source):
    """Both official folders of a set under root."""
    python, binary = (root / folder for folder in FOLDERS[source])
    python.mkdir(parents=True)
    binary.mkdir()
    names = [f"class_{i}" for i in range(10 if source == "cifar10" else 100)]
    for name, (pixels, fine, coarse) in images(source).items():
        planes = pixels.transpose(0, 3, 1, 2).reshape(len(pixels), -1)
        labels = {b"labels": fine}
        columns = [fine]
        if source == "cifar100":
            labels = {b"fine_labels": fine, b"coarse_labels": coarse}
            columns = [coarse, fine]
        entries = {b"data": planes, **labels, b"batch_label": name.encode(), b"filenames": [b"x"]}
        (python / name).write_bytes(dumped(entries))
        table = np.concatenate([np.array(columns, np.uint8).T, planes], axis=1)
        (binary / f"{name}.bin").write_bytes(table.tobytes())
    words = [name.encode() for name in names]
    lines = "".join(f"{name}\n" for name in names)
    if source == "cifar10":
        (python / "batches.meta").write_bytes(dumped({b"label_names": words, b"num_vis": 3072}))
        (binary / "batches.meta.txt").write_text(lines + "\n")
    else:
        meta = {b"fine_label_names": words, b"coarse_label_names": [b"fish"] * 20}
        (python / "meta").write_bytes(dumped(meta))
        (binary / "fine_label_names.txt").write_text(lines)
        (binary / "coarse_label_names.txt").write_text("fish\n" * 20)
    return python, binary


def packed(folder, root):
    """The folder as the official archive of its name, alone under root."""
    root.mkdir()
    with tarfile.open(root / ARCHIVES[folder.name], "w:gz") as tar:
        tar.add(folder, folder.name)
    return root


def cifar(root, source="cifar100", **changes):
    return Data(source=source, root=root, **({"size": 32, "eval_resize": None} | changes))


def read(manifest):
    return np.stack([np.asarray(manifest.read(row)) for row in range(len(manifest.target))])


@pytest.mark.parametrize("source", ["cifar10", "cifar100"])
def test_every_official_layout_gives_the_same_set(tmp_path, source):
    python, binary = write(tmp_path / "both", source)
    places = [python, binary, python.parent]
    places += [packed(python, tmp_path / "a"), packed(binary, tmp_path / "b")]
    parts = list(images(source).values())
    for split, wanted in (("train", parts[:-1]), ("val", parts[-1:])):
        pixels = np.concatenate([part[0] for part in wanted])
        fine = [label for part in wanted for label in part[1]]
        found = [open_source(cifar(place, source), split) for place in places]
        for manifest in found:
            assert (read(manifest) == pixels).all()
            assert manifest.target.tolist() == fine and manifest.target.dtype == np.int64
            assert manifest.classes[7] == "class_7"
            assert len(manifest.classes) == (10 if source == "cifar10" else 100)
            assert (manifest.sizes == 32).all() and manifest.sizes.dtype == np.int32
        assert len({manifest.digest for manifest in found}) == 1
        assert found[0].name(3) == f"{source} {split} image 3"
    train, val = (open_source(cifar(python, source), split) for split in ("train", "val"))
    assert train.digest != val.digest


def test_pickles_of_newer_writers_are_read_too():
    array = np.arange(6, dtype=np.uint8).reshape(2, 3)
    for value in (array, np.asfortranarray(array)):
        again = load_plain(pickle.dumps({"data": value, b"n": [1, (2, None)]}, protocol=4))
        assert (again["data"] == array).all() and again[b"n"] == [1, (2, None)]


class Attack:
    def __reduce__(self):
        return (eval, ("open('owned', 'w').write('x')",))


@pytest.mark.parametrize(
    "evil",
    [
        pickle.dumps({"data": Attack()}, protocol=2),
        b"cos\nsystem\n(S'touch owned'\ntR.",
        b"(S'touch owned'\nios\nsystem\n.",
        b"\x80\x04\x8c\x08builtins\x8c\x04exec\x93\x8c\x0craise Exit()\x85R.",
        pickle.dumps(np.array([Attack()], dtype=object), protocol=2),
        pickle.dumps(np.zeros(3), protocol=4),
    ],
)
def test_a_pickle_that_names_anything_else_is_refused(tmp_path, monkeypatch, evil):
    monkeypatch.chdir(tmp_path)
    python, _ = write(tmp_path / "set", "cifar100")
    (python / "test").write_bytes(evil)
    with pytest.raises(ValueError, match="cifar-100-python/test: (the pickle names|an array of)"):
        open_source(cifar(python), "val")
    assert not (tmp_path / "owned").exists()


def test_what_was_looked_for_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder.*cifar-100-python"):
        open_source(cifar(tmp_path / "nowhere"), "train")
    with pytest.raises(FileNotFoundError, match="no cifar100: looked for") as error:
        open_source(cifar(tmp_path), "train")
    for word in ("cifar-100-python/", "train.bin", "cifar-100-binary.tar.gz"):
        assert word in str(error.value)
    python, binary = write(tmp_path / "set", "cifar10")
    (python / "data_batch_3").unlink()
    with pytest.raises(FileNotFoundError, match="data_batch_3 is missing; unpack"):
        open_source(cifar(python, "cifar10"), "train")
    root = packed(python, tmp_path / "packed")
    with pytest.raises(
        FileNotFoundError, match="gz does not hold cifar-10-batches-py/data_batch_3"
    ):
        open_source(cifar(root, "cifar10"), "train")


def test_damaged_files_are_named(tmp_path):
    python, binary = write(tmp_path / "set", "cifar100")
    raw = (binary / "train.bin").read_bytes()
    (binary / "train.bin").write_bytes(raw[:-1])
    with pytest.raises(ValueError, match="train.bin: 30739 bytes, wants a multiple of 3074"):
        open_source(cifar(binary), "train")
    (binary / "train.bin").write_bytes(raw[:1] + b"\xc8" + raw[2:])  # a label of 200
    with pytest.raises(ValueError, match="train.bin: labels . to 200 of 100 classes"):
        open_source(cifar(binary), "train")
    whole = (python / "train").read_bytes()
    (python / "train").write_bytes(whole[:-400])
    with pytest.raises(ValueError, match="python/train: pickle data was truncated; unpack"):
        open_source(cifar(python), "train")
    (python / "train").write_bytes(dumped({b"data": np.zeros((2, 3072), np.uint8)}))
    with pytest.raises(ValueError, match="python/train: 'fine_labels' is not a list"):
        open_source(cifar(python), "train")
    short = {b"data": np.zeros((2, 3072), np.uint8), b"fine_labels": [1]}
    (python / "train").write_bytes(dumped(short))
    with pytest.raises(ValueError, match="2 images with 1 labels"):
        open_source(cifar(python), "train")
    narrow = {b"data": np.zeros((2, 3071), np.uint8), b"fine_labels": [1, 2]}
    (python / "train").write_bytes(dumped(narrow))
    with pytest.raises(ValueError, match="'data' is not an array of 3072 bytes"):
        open_source(cifar(python), "train")
    root = packed(binary, tmp_path / "packed")
    archive = root / "cifar-100-binary.tar.gz"
    archive.write_bytes(archive.read_bytes()[:-5000])
    with pytest.raises(ValueError, match="binary.tar.gz is damaged .*download it again"):
        open_source(cifar(root), "train")


def test_subset_keeps_the_first_of_each_class_in_order(tmp_path):
    _, binary = write(tmp_path, "cifar10")
    every = open_source(cifar(binary, "cifar10"), "train")
    few = open_source(cifar(binary, "cifar10", subset=2), "train")
    rows = sorted(row for c in range(10) for row in np.flatnonzero(every.target == c)[:2])
    assert few.target.tolist() == every.target[rows].tolist() and len(rows) == 20
    assert (read(few) == read(every)[rows]).all() and few.digest != every.digest
    with pytest.raises(ValueError, match="data.subset=6, but class 'class_0' has 5"):
        open_source(cifar(binary, "cifar10", subset=6), "train")


@pytest.mark.parametrize("augment", ["pad_crop", "none", "random_resized_crop"])
def test_loaders_agree_on_images_in_memory(tmp_path, augment):
    """The gathers of the resident loader against PIL's crops, and what "auto" takes."""
    _, binary = write(tmp_path, "cifar10")
    batches = {}
    for loader in ("auto", "resident", "torchvision"):
        data = cifar(binary, "cifar10", augment=augment, loader=loader)
        manifest = open_source(data, "train")
        made = make_loader(manifest, data, 10, seed=1, train=True)
        batches[made.name, loader] = list(made.epoch(2))
        made.close()
    first, *others = (batches["resident", "auto"], *batches.values())
    assert len(first) == 5
    bound = 1 if augment == "random_resized_crop" else 0  # two resizers
    for other in others:
        for one, two in zip(first, other, strict=True):
            assert torch.equal(one.index, two.index) and torch.equal(one.target, two.target)
            apart = (one.images.float() - two.images.float()).abs()
            assert apart.max() <= bound


def test_dali_refuses_images_in_memory(tmp_path):
    _, binary = write(tmp_path, "cifar10")
    data = cifar(binary, "cifar10")
    schedule = Schedule(open_source(data, "val"), data, 2, seed=0, train=False)
    with pytest.raises(ValueError, match="dali reads files and data.source=cifar10 has none"):
        LOADERS["dali"](schedule, torch.device("cpu"))
    with pytest.raises(ValueError, match="dali reads files and source cifar100 has none; use auto"):
        cifar(tmp_path, loader="dali")
    with pytest.raises(ValueError, match="data.classes: the cifar100 have 100 classes, got 10"):
        cifar(tmp_path, classes=10)


def test_reading_warns_of_nothing(tmp_path):
    """NumPy 2 warns of the module that the official pickles name."""
    python, _ = write(tmp_path, "cifar100")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_source(cifar(python), "train")
