"""The glyphs: the same everywhere but for the rasteriser, written once, refused when damaged."""

from concurrent.futures import ThreadPoolExecutor

import matplotlib
import numpy as np
import pytest
from matplotlib.ft2font import FT2Font
from processes import together

from kdfuse.engine.cli import main as cli
from kdfuse.engine.data.loaders import make_loader
from kdfuse.engine.data.sources import glyphs, open_source
from kdfuse.engine.data.sources.glyphs import write_glyphs
from kdfuse.engine.recipe.data import Data

pytestmark = pytest.mark.slow(10)

PINNED = [0.128743, 0.277559, 0.515293]  # draws of the first training image: font, turn, slant


def data(root, **changes):
    fixed = {"size": 32, "eval_resize": None, "augment": "none", "images": 300}
    return Data(source="glyphs", root=root, **(fixed | changes))


def test_there_are_100_characters_and_every_font_has_them():
    assert len(set(glyphs.CHARACTERS)) == len(glyphs.CHARACTERS) == 100
    folder = f"{matplotlib.get_data_path()}/fonts/ttf"
    for name in glyphs.FONTS:
        held = FT2Font(f"{folder}/{name}.ttf").get_charmap()
        assert [c for c in glyphs.CHARACTERS if ord(c) not in held] == []


def test_no_glyph_leaves_its_cell_and_no_two_are_the_same():
    for font in glyphs._atlas():
        cells = np.stack([np.asarray(image) for image in font])
        edge = np.concatenate([cells[:, 0], cells[:, -1], cells[:, :, 0], cells[:, :, -1]], axis=1)
        assert edge.max() == 0 and (cells.max(axis=(1, 2)) > 200).all()
        assert len({cell.tobytes() for cell in cells}) == 100


def draw_elsewhere(path, rows):
    np.save(path, glyphs.draw("train", rows))


def test_an_image_is_a_function_of_split_and_row(tmp_path):
    """Drawn alone, among others, in another order, and by another process."""
    rows = np.array([7, 1234, 49_999])
    images = glyphs.draw("train", rows)
    assert images.shape == (3, 32, 32, 3) and images.dtype == np.uint8
    assert (glyphs.draw("train", rows[::-1])[::-1] == images).all()
    assert (glyphs.draw("train", np.arange(1200, 1300))[34] == images[1]).all()
    assert (glyphs.draw("val", rows) != images).mean() > 0.9
    together(1, draw_elsewhere, tmp_path / "drawn.npy", rows)
    assert (np.load(tmp_path / "drawn.npy") == images).all()


def test_draws_and_labels_are_pinned(tmp_path):
    """Pixels vary with the FreeType and Pillow versions; labels, counts and draws may not."""
    train, val = (open_source(data(tmp_path), split) for split in ("train", "val"))
    assert (len(train.target), len(val.target)) == (300, 100)
    assert (train.sizes == 32).all() and train.classes == list(glyphs.CHARACTERS)
    assert train.target.tolist() == [*range(100)] * 3
    assert glyphs._count(50_000, "val") == 10_000 and glyphs.IMAGES == 50_000
    stream = glyphs.key(glyphs.STREAM, 0)
    assert glyphs.uniforms(stream, np.arange(3)).round(6).tolist() == PINNED


def test_the_set_is_written_once_and_by_many_at_once(tmp_path):
    with ThreadPoolExecutor(3) as pool:
        (path,) = set(pool.map(write_glyphs, [tmp_path / "new"] * 3, [300] * 3))
    assert [p.name for p in path.parent.iterdir()] == ["glyphs-1-300.npz"]
    time = path.stat().st_mtime_ns
    manifest = open_source(data(tmp_path / "new"), "train")
    assert write_glyphs(tmp_path / "new", 300) == path and path.stat().st_mtime_ns == time
    pixels = np.stack([np.asarray(manifest.read(row)) for row in range(300)])
    assert (pixels == glyphs.draw("train", np.arange(300))).all()
    other = open_source(data(tmp_path / "new", images=200), "train")
    assert len(other.target) == 200 and (np.asarray(other.read(9)) == pixels[9]).all()
    few = open_source(data(tmp_path / "new", subset=2), "train")
    assert np.bincount(few.target).tolist() == [2] * 100 and few.digest != manifest.digest


def test_a_damaged_or_other_file_is_refused(tmp_path):
    path = write_glyphs(tmp_path, 100)
    whole = path.read_bytes()
    with np.load(path) as kept:
        arrays = dict(kept)
    flipped = arrays["train"].copy()
    flipped[50, 3, 3, 0] ^= 1
    bad = [
        ("", lambda: path.write_bytes(whole[:-1000])),
        ("", lambda: path.write_bytes(whole[:5000] + b"\0\1\2" + whole[5003:])),
        ("", lambda: path.write_bytes(b"")),
        ("do not match their digest", lambda: np.savez(path, **(arrays | {"train": flipped}))),
        ("train is uint8 .99, 32", lambda: np.savez(path, **(arrays | {"train": flipped[1:]}))),
        ("train_sha256", lambda: np.savez(path, train=flipped)),
    ]
    for why, damage in bad:
        damage()
        with pytest.raises(ValueError, match=rf"glyphs-1-100.npz is not what .*{why}.*delete it"):
            open_source(data(tmp_path, images=100), "train")
        with pytest.raises(ValueError, match="delete it"):
            write_glyphs(tmp_path, 100)
    path.unlink()
    assert len(open_source(data(tmp_path, images=100), "train").target) == 100


def test_the_verb_writes_the_set_and_the_mistakes_exit_with_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["kdfuse", "data", "glyphs", str(tmp_path), "--images", "100"])
    with pytest.raises(SystemExit) as leaving:
        cli.main()
    path = tmp_path / "glyphs-1-100.npz"
    assert not leaving.value.code and capsys.readouterr().out == f"{path}\n"
    path.write_bytes(b"other")
    with pytest.raises(SystemExit) as leaving:
        cli.main()
    assert leaving.value.code == 2 and "delete it" in capsys.readouterr().err


def test_a_missing_font_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no DejaVuSans.ttf; install matplotlib"):
        glyphs._fonts(tmp_path)


def test_auto_is_the_resident_loader(tmp_path):
    chosen = data(tmp_path, augment="pad_crop", flip=False)
    for split in ("train", "val"):
        train = split == "train"
        loader = make_loader(open_source(chosen, split), chosen, 50, seed=0, train=train)
        batch = next(loader.epoch(0))
        assert loader.name == "resident" and batch.images.shape == (50, 3, 32, 32)
        assert (batch.target == batch.index % 100).all()
        loader.close()


def test_auto_crops_on_the_cpu_where_more_follows(tmp_path):
    for settings in ({"erase": 0.5}, {"randaugment": {}}):
        options = data(tmp_path, **settings)
        for split, name in (("train", "torchvision"), ("val", "resident")):
            train = split == "train"
            loader = make_loader(open_source(options, split), options, 50, seed=0, train=train)
            assert loader.name == name
            loader.close()


def test_classes_can_be_told_apart_but_not_by_templates():
    """The mean of each class's distance to the colour of the paper, blurred."""

    def shapes(split, count):
        images = glyphs.draw(split, np.arange(count)).astype(np.float32)
        away = images - np.median(images, axis=(1, 2), keepdims=True)
        away = sum(np.roll(away, (i, j), (1, 2)) for i in (-1, 0, 1) for j in (-1, 0, 1))
        flat = np.linalg.norm(away, axis=3)[:, 4:-4, 4:-4].reshape(count, -1)
        return (flat - flat.mean(axis=1, keepdims=True)) / flat.std(axis=1, keepdims=True)

    seen, new = shapes("train", 5000), shapes("val", 3000)
    means = seen.reshape(50, 100, -1).mean(axis=0)
    nearest = (new @ (means - means.mean(axis=0)).T).argmax(axis=1)
    right = (nearest == np.arange(3000) % 100).mean()
    assert 0.015 < right < 0.3  # chance is 0.01, with a standard deviation of 0.002
