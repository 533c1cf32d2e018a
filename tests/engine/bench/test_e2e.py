"""The benchmark of training from files: its sides do what they say, its records obey their laws."""

import json
import time
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from kdfuse.engine.bench.data.measure import BLOCKS, block
from kdfuse.engine.bench.data.photos import write_photos
from kdfuse.engine.bench.data.sides import Ours, peer_loader
from kdfuse.engine.bench.e2e import run as e2e
from kdfuse.engine.bench.e2e.sides import Alone, Both, Plain
from kdfuse.engine.bench.step import peer, plain
from kdfuse.engine.bench.step.cases import chosen
from kdfuse.engine.bench.step.ours import Images, Step
from kdfuse.engine.data.sources import open_source
from kdfuse.engine.recipe.data import Data

pytestmark = pytest.mark.slow(20)

PAIR = "cifar100/kd:resnet56-resnet20"
LOADER = "dali" if find_spec("nvidia.dali") else "torchvision"
SMALL = ["student.name=resnet8", "teacher.name=resnet8", "data.size=16"]
WORDS = [
    *SMALL,
    "run.threads=1",
    "--device",
    "cpu",
    "--batch",
    "4",
    "--images",
    "24",
    "--loader",
    LOADER,
]
SHORT = ["--workers", "1", "--seconds", "0"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """The file of a short run of three cases, one of which has no peer."""
    path = tmp_path_factory.mktemp("bench") / "e2e.jsonl"
    cases = ["student", "kd", "cifar100/dkd:resnet56-resnet20"]
    e2e.main([*WORDS, *SHORT, "--out", str(path), "--cases", *cases])
    return path


def test_records_hold_what_was_measured(recorded):
    facts, *records = [json.loads(line) for line in recorded.read_text().splitlines()]
    assert facts["kind"] == "facts" and facts["benchmark"] == "e2e" and facts["made_images"] == 24
    assert facts["words"][:2] == SMALL[:2] and "root" not in facts["data"]
    assert [r["case"].split(":")[0] for r in records] == ["student", "kd", "cifar100/dkd"]
    for r in records:
        assert r["kind"] == "e2e" and (r["batch"], r["size"], r["classes"]) == (4, 16, 100)
        assert (r["loader"], r["workers"], r["set_images"]) == (LOADER, 1, 24)
        assert r["mean_width"] == r["mean_height"] == 16  # what is padded and cropped is as small
        assert r["images"] == r["blocks"] * r["steps_per_block"] * 4 and r["blocks"] == BLOCKS
        both, step, data = (r[f"{of}images_per_s"] for of in ("", "step_", "input_"))
        assert r["p20_images_per_s"] <= both <= r["p80_images_per_s"]
        assert r["of_slower"] == pytest.approx(both / min(step, data))
        assert r["of_sum"] == pytest.approx(both / step + both / data)
        assert 0 <= r["waiting"] < 1
        assert ("times_peer" in r) == (r["case"] in ("student", "kd"))
        if "times_peer" in r:
            assert r["times_peer"] == pytest.approx(both / r["peer_images_per_s"])
            assert 0 < r["peer_waiting"] < 1
    assert records[2]["peer_absent"] == "the plain loop knows no method dkd"


def test_a_peer_that_changes_no_crops_is_left_out(tmp_path):
    path = tmp_path / "e2e.jsonl"
    changed = ["data.erase=0.5", "data.loader=auto"]
    e2e.main([*WORDS, *changed, *SHORT, "--out", str(path), "--cases", "student"])
    _, record = [json.loads(line) for line in path.read_text().splitlines()]
    assert record["peer_absent"] == "the plain loader knows no data.erase"
    assert record["loader"] == LOADER and "times_peer" not in record


def test_made_squares_are_decoded_once(tmp_path):
    """What data.loader=auto is for them, unless one is named."""
    path = tmp_path / "e2e.jsonl"
    words = [word for word in WORDS if word not in ("--loader", LOADER)]
    e2e.main([*words, *SHORT, "--peer", "none", "--out", str(path), "--cases", "student"])
    _, record = [json.loads(line) for line in path.read_text().splitlines()]
    assert (record["loader"], record["set_images"]) == ("resident", 24)


def test_recorded_files_show_the_table_again(recorded, kd):
    code, out, _ = kd("bench", "e2e", "--from", recorded)
    assert code == 0
    assert f"{PAIR}: cpu, batch 4, 16 x 16, float32, eager" in out
    assert "24 images of 16 x 16 pixels, " in out and f"; loader {LOADER}" in out
    assert "the plain loop knows no method dkd" in out
    lines = "\n".join(map(str, e2e.main(["--markdown", "--from", str(recorded)]))).splitlines()
    heads = [line for line in lines if line.startswith("| case")]
    rows = [line for line in lines if line.startswith(("| student |", "| kd |", "| cifar100"))]
    assert len(heads) == 2 and len(rows) == 3  # a table for each recipe


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """By name, of one case, with the loader's images."""
    root = tmp_path_factory.mktemp("made") / "photos"
    write_photos(root, 24, side=16)
    (case,) = chosen(None, [*SMALL, "run.batch=6", "optim.lr=0.01"], ["kd"], "cpu")
    section = case.recipe.data.model_dump(exclude={"classes"}) | {"workers": 1, "loader": LOADER}
    data = Data.model_validate(section | {"source": "folder", "root": root})
    manifest = open_source(data, "train")
    loader, step = Ours(manifest, data, 6, "train"), Step(case, Images(CPU))
    files = peer_loader(manifest, np.arange(24), data, 6, "train")
    loop = peer.loop_of(case, plain.Batches(files), CPU, bf16=False)
    yield {"step": Alone(step), "both": Both(step, loader, CPU), "peer": Plain(loop, 6)}
    loader.close()


@pytest.mark.parametrize("name", ["step", "both", "peer"])
def test_every_batch_that_is_counted_was_a_step(sides, name):
    side = sides[name]
    own = side.loop.seen // 6 if name == "peer" else side.step.state.done
    assert block(side, 3).images == 18
    now = side.loop.seen // 6 if name == "peer" else side.step.state.done
    assert now - own == side.ahead + 3
    if name != "step":
        assert len(side.waits) == 1 and 0 <= side.waits[0] < 1


def test_the_step_sees_the_images_of_the_loader(sides):
    both, seen = sides["both"], []
    step = both.step.step

    def record(now, images, target, index):
        seen.append((images.clone(), index.clone()))
        return step(now, images, target, index)

    both.step.step = record
    try:
        block(both, 2)
    finally:
        both.step.step = step
    assert len(seen) == both.ahead + 2
    first = [index.tolist() for _, index in seen[:4]]
    assert sorted(sum(first, [])) == list(range(24))  # an epoch
    assert all(images.shape == (6, 3, 16, 16) for images, _ in seen)


def test_waiting_is_what_a_slow_loader_takes(sides, monkeypatch):
    """With a loader that sleeps, nearly all of the time is waited for."""
    both = sides["both"]
    taken = both.loader.taken

    def slow():
        for batch in taken():
            time.sleep(2)
            yield batch

    monkeypatch.setattr(both.loader, "taken", slow)
    monkeypatch.setattr(both, "ahead", 1)
    done = block(both, 1)
    assert done.seconds > 2 and both.waits[-1] * done.seconds > 1.9


@pytest.mark.parametrize(
    "words, message",
    [
        (["--cases", "teacher"], "--cases teacher: it trains nothing"),
        (["--images", "3"], "got 3, wants a whole number, 4 or more"),
        (["run.batch=8", "--batch", "4"], "--batch 4 and run.batch=8: give one of them"),
        (["data.root=nowhere"], "--images 500 makes one"),
        (["data.root=x", "--images", "9"], "--images 9 and data.root=x: images are made or read"),
        (["--out", "nowhere/x.jsonl"], "nowhere/x.jsonl: its folder is not there"),
        (["--from", "empty.jsonl"], "holds no record of kdfuse bench e2e"),
        (["--from", "empty.jsonl", "--images", "9"], "--images 9: goes with measuring"),
        (["--loader", "ffcv"], "invalid choice: 'ffcv'"),
        (["--loader", "dali"], "source cifar100 has none; use auto"),
        (["coco/kd:resnet101-resnet50"], "a recipe of detection"),
        (["--workers", "0"], "got 0, wants a whole number, 1 or more"),
    ],
)
def test_a_mistake_is_one_message(tmp_path, monkeypatch, kd, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").write_text("")
    code, _, told = kd("bench", "e2e", *words)
    assert code == 2 and message in " ".join(told.split())


def test_images_of_more_classes_than_the_networks_have_are_refused():
    words = ["data.source=synthetic", "data.root=null", "data.classes=2"]
    with pytest.raises(ValueError, match="data.classes=2 of kd: its images are of 4 classes"):
        e2e.main([*SMALL, *words, "--device", "cpu", "--images", "8", *SHORT])
