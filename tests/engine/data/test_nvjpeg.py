"""JPEGs to batches with data.decode=gpu, by the same code on the CPU: which files the device is
given, and what becomes of those that it refuses."""

import io
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from test_loaders import (  # noqa: F401 - fixtures
    by_hand,
    cache,
    collect,
    damage_later,
    few,
    field,
    folder,
    loaded,
    made,
    photos,
)

from kdfuse.engine.data import plan as sampler
from kdfuse.engine.data.loaders import jpegs, make_loader
from kdfuse.engine.data.loaders.jpegs import Jpeg, batch_of, check_decoder, decoded, read
from kdfuse.engine.data.sources import open_source

pytestmark = pytest.mark.slow(5)

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
HTML = b"<html><body>404 Not Found</body></html>"
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="looks at a missing GPU")


def tensor(data):
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def jpeg(height, width, **options):
    file = io.BytesIO()
    pixels = field(np.random.default_rng(height), height, width)
    Image.fromarray(pixels).save(file, "JPEG", **options)
    return file.getvalue()


def without_huffman_codes(data):
    """The same length, header and end; a table says that it has 255 codes of a single bit."""
    at = data.index(b"\xff\xc4") + 5  # marker, length, number of the table
    return data[:at] + b"\xff" * 16 + data[at + 16 :]


def test_the_device_is_given_whole_jpegs_of_grey_or_ycbcr(photos, tmp_path):  # noqa: F811
    root = tmp_path / "kinds"
    shutil.copytree(photos / "train", root / "train")
    shutil.copytree(root / "train", root / "val")
    one = root / "train" / "one"
    (one / "12.jpg").write_bytes(jpeg(40, 50, keep_rgb=True))  # its channels are RGB
    (one / "13.jpg").write_bytes(jpeg(40, 50) + b"12345")
    frames = [Image.fromarray(field(np.random.default_rng(i), 30, 40)) for i in range(2)]
    frames[0].save(one / "14.jpg", "MPO", save_all=True, append_images=frames[1:])
    data = folder(root, loader="nvjpeg", augment="none")
    manifest = open_source(data, "train")
    plan = sampler.eval_plan(data, manifest.sizes, np.arange(15))
    files = [read(manifest, plan, i, data.size, ()) for i in range(15)]
    given = [i for i, file in enumerate(files) if isinstance(file, Jpeg)]
    assert given == [0, 1, 2, 3, 4, 5, 6, 8]  # not CMYK, PNG, WebP, nor those above
    for i in given:
        assert files[i].data.numpy().tobytes() == (one / f"{i:02d}.jpg").read_bytes()
    assert isinstance(read(manifest, plan, 0, data.size, {0}), torch.Tensor)

    images, lacking = batch_of(files, plan, data.size, CPU)
    assert lacking == [] and images.shape == (15, 32, 32, 3) and images.dtype == torch.uint8
    far = images.permute(0, 3, 1, 2).int() - by_hand(manifest, plan, data.size).int()
    assert far.abs().max() <= 1


def test_one_call_decodes_and_names_what_it_cannot():
    whole = [jpeg(41, 30), jpeg(64, 48, progressive=True), jpeg(17, 90, subsampling=0)]
    want = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in whole]
    files = [whole[0], HTML, whole[1], without_huffman_codes(whole[0]), whole[2]]
    found = decoded([tensor(data) for data in files], CPU)
    assert found[1] is None and found[3] is None
    for image, pixels in zip([found[0], found[2], found[4]], want, strict=True):
        assert np.array_equal(image.permute(1, 2, 0), pixels)
    assert decoded([], CPU) == []


def test_a_call_that_fails_for_no_file_is_an_error(monkeypatch):
    decode = jpegs._decode

    def short_of_memory(files, device):
        if len(files) > 2:
            raise RuntimeError("out of memory")
        return decode(files, device)

    monkeypatch.setattr(jpegs, "_decode", short_of_memory)
    files = [tensor(jpeg(20, 20))] * 3
    assert len(decoded(files[:2], CPU)) == 2
    with pytest.raises(
        RuntimeError, match="3 JPEGs on cpu in one call, though each alone; lower r"
    ):
        decoded(files, CPU)


def test_bad_files_have_the_reasons_of_the_cpu(few):  # noqa: F811
    """Among them one whose header and length are right, which the decoder alone finds."""
    manifest = open_source(folder(few), "train")
    path = few / "train" / "cat" / "07.jpg"
    path.write_bytes(without_huffman_codes(path.read_bytes()))
    rows = {*damage_later(few, manifest), 7}
    reasons, shown = [], []
    for name in ("torchvision", "nvjpeg"):
        loader = made(manifest, folder(few, loader=name), 4, seed=7, train=True)
        with pytest.warns(UserWarning, match="unreadable image"):
            shown.append([batch.index.tolist() for batch in loader.epoch(0)])
        loader.close()
        reasons.append(loader.quarantine.bad)
    assert reasons[0] == reasons[1] and reasons[0].keys() == rows
    assert shown[0] == shown[1] and "broken data stream" in reasons[1][7]


def test_what_the_device_alone_refuses_is_pils(few, monkeypatch):  # noqa: F811
    """Named once, in its place in the batch, and not given to the device again."""
    refused = {(few / "train" / "dog" / f"{i:02d}.jpg").read_bytes() for i in (2, 5)}
    decode, calls = jpegs._decode, []

    def picky(files, device):
        calls.append(len(files))
        if any(file.numpy().tobytes() in refused for file in files):
            raise RuntimeError("unknown chroma subsampling")
        return decode(files, device)

    monkeypatch.setattr(jpegs, "_decode", picky)
    data = folder(few, loader="nvjpeg")
    loader = loaded(data)
    manifest = open_source(data, "train")
    with pytest.warns(UserWarning, match="cpu does not decode .*dog/0[25].jpg, though PIL") as told:
        first = torch.cat([batch.images for batch in loader.epoch(0)])
    assert [w.category for w in told].count(UserWarning) == 1 and not loader.quarantine.bad
    before = len(calls)
    second = torch.cat([batch.images for batch in loader.epoch(1)])
    assert len(calls) == before + loader.steps  # a call a step, none failed
    loader.close()
    for epoch, images in enumerate((first, second)):
        plan = sampler.plan(data, manifest.sizes, 7, epoch, np.arange(24))
        assert (images.int() - by_hand(manifest, plan, data.size).int()).abs().max() <= 1


@needs_no_gpu
def test_a_device_without_a_decoder_is_refused_when_the_loader_is_made(few, monkeypatch):  # noqa: F811
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    data = folder(few, loader="nvjpeg")
    message = "torchvision cannot decode a JPEG on cuda:0 .*; install a torchvision with nvJPEG"
    with pytest.raises(ValueError, match=message) as error:
        make_loader(open_source(data, "train"), data, 4, seed=7, train=True, device=GPU)
    assert "\n" not in str(error.value)


def test_a_torchvision_without_decode_jpeg_is_refused(monkeypatch):
    check_decoder(CPU)
    monkeypatch.delattr("torchvision.io.decode_jpeg")
    with pytest.raises(ValueError, match="cannot import name 'decode_jpeg'.*data.loader=dali or"):
        check_decoder(CPU)


def test_a_loader_says_how_it_decodes(few):  # noqa: F811
    loader = loaded(folder(few, loader="nvjpeg"))
    loader.close()
    assert (loader.name, loader.mode) == ("torchvision", "gpu")
    assert loader.decode.startswith("nvJPEG on the GPU, whole image, resized there")
    images, _, _ = collect(loaded(folder(few, loader="nvjpeg"), "val"))
    assert images.is_contiguous(memory_format=torch.channels_last)
