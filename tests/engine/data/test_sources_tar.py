"""Images in tars: every layout is the image folder with the same images, in the same order."""

import io
import os
import subprocess
import tarfile
import warnings
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image

from kdfuse.engine.data import plan as sampler
from kdfuse.engine.data.check import check_folder
from kdfuse.engine.data.images import UnreadableError
from kdfuse.engine.data.loaders import make_loader
from kdfuse.engine.data.schedule import share
from kdfuse.engine.data.sources import open_source
from kdfuse.engine.data.sources import tar_index as tars
from kdfuse.engine.recipe.data import Data

CLASSES = ("ant", "bee", "cat")
DALI = pytest.param(
    "dali", marks=pytest.mark.skipif(find_spec("nvidia.dali") is None, reason="needs NVIDIA DALI")
)
EVERY = [DALI, "torchvision", "resident"]
HTML = b"<html><body>404 Not Found</body></html>"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kdfuse"


@pytest.fixture
def root(tmp_path):
    """Three classes of six training and two validation images, all 40 x 36."""
    rng = np.random.default_rng(4)
    for split, count in (("train", 6), ("val", 2)):
        for name in CLASSES:
            folder = tmp_path / "set" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (5, 4, 3), dtype=np.uint8)
                image = Image.fromarray(pixels).resize((36, 40), Image.Resampling.BICUBIC)
                image.save(folder / f"{name}_{i}.JPEG", format="JPEG", quality=90)
    return tmp_path / "set"


def add(tar, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def files(root, split):
    """(class, name, content) of each image, class by class."""
    for folder in sorted((root / split).iterdir()):
        for path in sorted(folder.iterdir()):
            yield folder.name, path.name, path.read_bytes()


def one_a_class(root, out):
    for split in ("train", "val"):
        (out / split).mkdir(parents=True)
        for name in CLASSES:
            with tarfile.open(out / split / f"{name}.tar", "w") as tar:
                for owner, file, content in reversed(list(files(root, split))):
                    if owner == name:
                        add(tar, file, content)


def class_folders(root, out):
    """Two shards with every second image, in the order in which `tar` finds them, with folders."""
    for split in ("train", "val"):
        (out / split).mkdir(parents=True)
        every = list(files(root, split))
        for number in (0, 1):
            with tarfile.open(
                out / split / f"{number:04d}.tar", "w", format=tarfile.PAX_FORMAT
            ) as tar:
                tar.add(root / split / "ant", "./ant", recursive=False)
                for owner, file, content in every[number::2][::-1]:
                    add(tar, f"./{owner}/{file}", content)


def numbered(root, out):
    """KEY.jpg, KEY.cls and KEY.json, three shards, as webdataset writes them."""
    for split in ("train", "val"):
        (out / split).mkdir(parents=True)
        every = list(files(root, split))
        for number in range(3):
            with tarfile.open(
                out / split / f"set-{number}.tar", "w", format=tarfile.GNU_FORMAT
            ) as tar:
                for owner, file, content in every[number::3]:
                    stem = file.removesuffix(".JPEG")
                    add(tar, f"{stem}.jpg", content)
                    add(tar, f"{stem}.json", b"{}")
                    add(tar, f"{stem}.cls", b"%d\n" % CLASSES.index(owner))


LAYOUTS = [one_a_class, class_folders, numbered]


def data(root, source="tar", **changes):
    return Data(source=source, root=root, **({"size": 32, "eval_resize": None} | changes))


def loaded(chosen, split="train", batch=3, rank=0, world=1, **changes):
    """For a process that takes `batch` images of each step."""
    whole = batch * world
    fixed = {"seed": 5, "train": split == "train", "part": share(whole, rank, world)}
    return make_loader(open_source(chosen, split), chosen, whole, **(fixed | changes))


def collect(loader, epoch=0, start=0):
    batches = list(loader.epoch(epoch, start))
    loader.close()
    return tuple(torch.cat([getattr(b, f) for b in batches]) for f in ("images", "target", "index"))


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_lists_what_the_folder_lists(root, tmp_path, layout):
    layout(root, tmp_path / "tars")
    for split in ("train", "val"):
        files, shards = (
            open_source(data(place, source), split)
            for place, source in ((root, "folder"), (tmp_path / "tars", "tar"))
        )
        assert shards.target.tolist() == files.target.tolist()
        assert (shards.sizes == files.sizes).all() and not shards.bad
        for row in range(len(files.target)):
            with files.content.open(row) as one, shards.content.open(row) as other:
                assert one.read() == other.read()
        if layout is numbered:
            assert shards.classes == ["0", "1", "2"]
        else:
            assert shards.classes == files.classes and shards.digest == files.digest
    assert shards.name(0).startswith(str(tmp_path / "tars" / "val"))
    few = open_source(data(tmp_path / "tars", subset=2), "train")
    assert few.target.tolist() == [0, 0, 1, 1, 2, 2]
    assert few.content.names[2].endswith("bee_0.jpg" if layout is numbered else "bee_0.JPEG")


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loaders_give_what_they_give_of_the_folder(root, tmp_path, layout, name):
    """To the last bit, from any step of an epoch on, and over two processes."""
    layout(root, tmp_path / "tars")
    chosen = data(tmp_path / "tars", loader=name, augment="pad_crop", size=40)
    plain = data(root, "folder", loader=name, augment="pad_crop", size=40)
    whole = collect(loaded(chosen), epoch=2)
    assert same(whole, collect(loaded(plain), epoch=2))
    order = sampler.permutation(5, 2, 18)
    assert whole[2].tolist() == order.tolist()
    assert same(collect(loaded(chosen), 2, start=4), tuple(part[12:] for part in whole))
    ranks = [loaded(chosen, batch=3, rank=rank, world=2) for rank in (0, 1)]
    of_two = [collect(loader, 2)[2].reshape(-1, 3) for loader in ranks]
    assert torch.stack(of_two, dim=1).flatten().tolist() == order.tolist()
    assert same(collect(loaded(chosen, "val")), collect(loaded(plain, "val")))


@pytest.mark.parametrize("name", [DALI, "torchvision"])
def test_random_crops_are_those_of_the_folder(root, tmp_path, name):
    class_folders(root, tmp_path / "tars")
    ours = collect(loaded(data(tmp_path / "tars", loader=name)), epoch=1)
    assert same(ours, collect(loaded(data(root, "folder", loader=name)), epoch=1))


def test_auto_takes_dali_for_tars_whose_crops_are_changed(root, tmp_path):
    one_a_class(root, tmp_path / "tars")
    best = "torchvision" if find_spec("nvidia.dali") is None else "dali"
    for changes, name in (({}, "resident"), ({"erase": 0.5}, best)):
        loader = loaded(data(tmp_path / "tars", **changes))
        assert loader.name == name
        loader.close()


def broken(root):
    ant = root / "train" / "ant"
    (ant / "ant_1.JPEG").write_bytes(HTML)
    (ant / "ant_2.JPEG").write_bytes(b"")
    cat = root / "train" / "cat" / "cat_5.JPEG"
    cat.write_bytes(cat.read_bytes()[:-30])
    return {1: 3, 2: 3, 17: 12}  # row: the row that takes its place


@pytest.mark.parametrize("name", EVERY)
def test_bad_images_in_tars_are_replaced_as_files_are(root, tmp_path, name):
    replaced = broken(root)
    one_a_class(root, tmp_path / "tars")
    chosen = data(tmp_path / "tars", loader=name, augment="pad_crop")
    with pytest.warns(UserWarning, match="unreadable image") as told:
        loader = loaded(chosen)
    assert "train/ant.tar/ant_1.JPEG (not a readable JPEG" in str(told[0].message)
    assert loader.quarantine.bad.keys() == replaced.keys()
    index = collect(loader)[2].tolist()
    wanted = sampler.permutation(5, 0, 18).tolist()
    assert index == [replaced.get(row, row) for row in wanted]
    with pytest.raises(RuntimeError, match="3 unreadable images, data.bad_images=2"):
        loaded(data(tmp_path / "tars", loader=name, bad_images=2))


@pytest.mark.parametrize("name", EVERY)
def test_a_tar_that_changed_since_it_was_indexed_is_not_read(root, tmp_path, name):
    one_a_class(root, tmp_path / "tars")
    chosen = data(tmp_path / "tars", loader=name, augment="pad_crop", bad_images=5)
    manifest = open_source(chosen, "train")
    tar = tmp_path / "tars" / "train" / "bee.tar"
    size = tar.stat().st_size
    os.truncate(tar, 2000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(
            RuntimeError, match=f"bee.tar/bee_.: 2000 bytes, was {size} when|is left"
        ):
            loader = make_loader(manifest, chosen, 3, seed=5, train=True)
            list(loader.epoch(0))


def test_an_image_damaged_in_place_is_found_while_training(root, tmp_path):
    """The tar's length stays, so only decoding tells."""
    one_a_class(root, tmp_path / "tars")
    for name in ["torchvision"] + ["dali"] * (find_spec("nvidia.dali") is not None):
        chosen = data(tmp_path / "tars", loader=name, augment="pad_crop")
        manifest = open_source(chosen, "train")
        content = manifest.content
        tar = tmp_path / "tars" / "train" / "bee.tar"
        whole = tar.read_bytes()
        start = int(content.offset[8])
        tar.write_bytes(whole[:start] + HTML + whole[start + len(HTML) :])
        loader = make_loader(manifest, chosen, 3, seed=5, train=True)
        with pytest.warns(UserWarning, match="bee.tar/bee_2.JPEG"):
            index = collect(loader)[2].tolist()
        assert list(loader.quarantine.bad) == [8] and 8 not in index and index.count(9) == 2
        tar.write_bytes(whole)


def test_the_index_is_read_once_and_again_when_a_tar_changes(root, tmp_path, cache, monkeypatch):
    class_folders(root, tmp_path / "tars")
    first = open_source(data(tmp_path / "tars"), "train")
    monkeypatch.setattr(tars, "members", None)  # the cache must do
    again = open_source(data(tmp_path / "tars"), "train")
    assert again.digest == first.digest and again.content.names == first.content.names
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent))
    for kept in cache.glob("tars-*"):
        kept.write_bytes(kept.read_bytes()[:90])  # a torn file is not trusted
    assert open_source(data(tmp_path / "tars"), "train").digest == first.digest
    with tarfile.open(tmp_path / "tars" / "train" / "0000.tar", "a") as tar:
        add(tar, "ant/ant_9.JPEG", (root / "train" / "ant" / "ant_0.JPEG").read_bytes())
    more = open_source(data(tmp_path / "tars"), "train")
    assert len(more.target) == 19 and more.digest != first.digest


def test_members_beyond_what_ustar_holds(root, tmp_path):
    """Long and non-ASCII names, as GNU tar and Python's PAX write them."""
    content = (root / "train" / "ant" / "ant_0.JPEG").read_bytes()
    long = "caf\u00e9/" + "x" * 180 + ".jpg"
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / "long.tar"
        with tarfile.open(path, "w", format=kind) as tar:
            add(tar, long, content)
        (member,) = tars.members(str(path))
        assert member.name == long
        assert path.read_bytes()[member.offset :][: member.length] == content


def made(path, *members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            add(tar, name, content)
    return path.read_bytes()


def test_tars_that_cannot_be_read_in_place_are_named(root, tmp_path):
    one_a_class(root, tmp_path / "tars")
    path = tmp_path / "tars" / "train" / "bee.tar"
    whole = path.read_bytes()
    image = (root / "train" / "bee" / "bee_0.JPEG").read_bytes()

    def refused(why):
        with pytest.raises(ValueError, match=why):
            open_source(data(tmp_path / "tars"), "train")

    for length in (512 + 700, 300):  # amid an image, amid a header
        path.write_bytes(whole[:length])
        refused("bee.tar: (not a whole tar|truncated)")
    *_, last = tars_of(whole, tmp_path)
    path.write_bytes(whole[: last.offset - 512])  # cut between two members
    refused(f"bee.tar: truncated or damaged after byte {last.offset - 512}")
    path.write_bytes(whole[: last.offset - 512] + b"\1" * 512 + whole[last.offset :])
    refused("bee.tar: truncated or damaged after byte")
    path.write_bytes(HTML * 40)
    refused("bee.tar: not a whole tar")
    subprocess.run(["gzip", "-k", "-c", str(path)], check=True, stdout=path.open("r+b"))
    refused("bee.tar: compressed.*gunzip")
    made(path, ("a.jpg.gz", b"x"))
    refused("bee.tar: member a.jpg.gz is gzipped")
    made(path, ("a.jpg", image), ("./a.jpg", image))
    refused("bee.tar: member a.jpg is there twice")
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("b.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "a.jpg"
        tar.addfile(link)
    refused("member b.jpg is a link; make the tar with --dereference")
    made(path, ("a.txt", b"x"))
    refused("different classes .only in val: bee.; both need a tar of each class")
    path.write_bytes(whole)
    (path.parent / "more.tar.gz").write_bytes(b"")
    refused("more.tar.gz is compressed")


def tars_of(whole, tmp_path):
    (tmp_path / "copy.tar").write_bytes(whole)
    return tars.members(str(tmp_path / "copy.tar"))


@pytest.mark.skipif(os.system("tar --version >/dev/null 2>&1") != 0, reason="needs GNU tar")
def test_a_sparse_member_is_named(tmp_path):
    with open(tmp_path / "hole.jpg", "wb") as file:
        file.truncate(1 << 20)
        file.write(b"x")
    command = ["tar", "--sparse", "-cf", "sparse.tar", "hole.jpg"]
    subprocess.run(command, check=True, cwd=tmp_path)
    with pytest.raises(UnreadableError, match="hole.jpg is sparse; make the tar without --sparse"):
        tars.members(str(tmp_path / "sparse.tar"))


def test_layouts_that_contradict_themselves_are_named(root, tmp_path):
    image = (root / "train" / "bee" / "bee_0.JPEG").read_bytes()
    out = tmp_path / "tars"

    def refused(why, *members):
        for split in ("train", "val"):
            made(out / split / "0.tar", *members)
        with pytest.raises(ValueError, match=why):
            open_source(data(out), "train")

    refused("0.tar/b.jpg in none; give every image", ("ant/a.jpg", image), ("b.jpg", image))
    refused("0.tar/b.jpg has no KEY.cls", ("a.jpg", image), ("a.cls", b"0"), ("b.jpg", image))
    refused("member a.cls holds b'ant', wants the number", ("a.jpg", image), ("a.cls", b"ant"))
    gap = [("a.jpg", image), ("a.cls", b"0"), ("b.jpg", image), ("b.cls", b"2")]
    gap += [("c.jpg", image), ("c.cls", b"2")]
    refused("go up to 2, but none is 1; number the classes from 0", *gap)
    refused("hold no image .*where they hold tars, unpack those", ("n01440764.tar", b""))
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder; expected ROOT/train/"):
        open_source(data(tmp_path / "nowhere"), "train")
    with pytest.raises(ValueError, match="set/train holds no .tar; expected ROOT/train/"):
        open_source(data(root), "train")


def test_check_looks_into_tars(root, tmp_path):
    one_a_class(root, tmp_path / "good")
    good = check_folder(tmp_path / "good")
    assert good.faults == good.warnings == [] and good.classes == 3 and len(good.images) == 24
    broken(root)
    class_folders(root, tmp_path / "tars")
    os.truncate(tmp_path / "tars" / "val" / "0001.tar", 700)
    found = {
        path.relative_to(tmp_path / "tars").as_posix(): why
        for path, why in check_folder(tmp_path / "tars").faults
    }
    assert sorted(found) == [
        "train/0000.tar/ant/ant_2.JPEG",
        "train/0001.tar/ant/ant_1.JPEG",
        "train/0001.tar/cat/cat_5.JPEG",
        "val/0001.tar",
    ]
    assert "empty" in found["train/0000.tar/ant/ant_2.JPEG"]
    assert "tar" in found["val/0001.tar"]
