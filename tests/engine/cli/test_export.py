"""Export: what a run keeps gives equal outputs as a program, as ONNX and as weights."""

import json

import numpy as np
import pytest
import torch
from disks import fill, mount, small_disk
from tiny import tiny

from kdfuse.engine.cli import export as exporting
from kdfuse.engine.cli.export import SUFFIXES, export
from kdfuse.engine.models import create
from kdfuse.engine.run.past import checkpoints_of, recipe_of
from kdfuse.engine.training.build import build
from kdfuse.engine.training.start import train

pytestmark = pytest.mark.slow(15)

CPU = torch.device("cpu")


def images(n=3, side=16):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of each kind of kept network: plain, with projector and classifier, with Dirac."""
    folder = tmp_path_factory.mktemp("runs")
    short = {"epochs": 1}
    made = {}
    for name, recipe in {
        "ce": tiny(folder / "d", "ce", run=short, optim={"lr": 0.05, "ema": 0.5}),
        "simkd": tiny(folder / "d", "simkd", run=short),
        "dirac": tiny(
            folder / "d", "ce", student={"name": "plain18_dirac"}, data={"subset": 7}, run=short
        ),
        "slkd": tiny(folder / "d", {"name": "slkd", "slts": 1}, run=short),
    }.items():
        made[name] = train(recipe, folder / name)
    return made


def expected(run, network="student", which="best"):
    distiller = build(recipe_of(run), 10, CPU)
    distiller.load(checkpoints_of(run)[which][0])
    chosen, inputs = distiller.evaluated()[network]
    chosen.eval()
    return distiller.predict(chosen, inputs, images())


@pytest.mark.parametrize(
    ("name", "network"),
    [
        ("ce", "student"),
        ("ce", "ema"),
        ("simkd", "student"),
        ("dirac", "student"),
        ("slkd", "slt0"),
    ],
)
def test_a_program_gives_the_same_logits_for_any_batch(runs, tmp_path, name, network):
    out = export(runs[name], tmp_path / "model.pt2", network=network)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt2", "model.pt2.md"]
    extra = {"kdfuse.json": ""}
    program = torch.export.load(out, extra_files=extra)
    found = program.module()(images())
    torch.testing.assert_close(found, expected(runs[name], network), rtol=1e-4, atol=1e-4)
    assert program.module()(images(7)).shape == (7, 10)
    about = json.loads(extra["kdfuse.json"])
    assert (about["network"], about["classes"], about["size"]) == (network, 10, 16)
    if name == "dirac":
        assert not any("alpha" in key for key in program.state_dict)


def test_onnx_gives_the_same_logits(runs, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    out = export(runs["simkd"], tmp_path / "model.onnx")
    session = runtime.InferenceSession(out, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"images": images().numpy()})
    np.testing.assert_allclose(found, expected(runs["simkd"]).numpy(), rtol=1e-3, atol=1e-3)
    (more,) = session.run(None, {"images": images(5).numpy()})
    assert more.shape == (5, 10)


def test_weights_load_as_a_published_checkpoint_does(runs, tmp_path):
    out = export(runs["ce"], tmp_path / "student.pt", which="last")
    distiller = build(recipe_of(runs["ce"]), 10, CPU)
    distiller.load(checkpoints_of(runs["ce"])["last"][0])
    loaded = create("resnet8", 10, checkpoint=out)
    for key, value in distiller.main.student.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    with pytest.raises(ValueError, match="more than the network of one name"):
        export(runs["simkd"], tmp_path / "student.pt")


def test_a_runs_result_is_a_teacher_of_another(runs, tmp_path):
    recipe = tiny(
        runs["simkd"].parent / "d",
        "kd",
        teacher={"name": f"run:{runs['simkd']}"},
        run={"epochs": 1},
    )
    distiller = build(recipe, 10, CPU, torch.zeros(8, dtype=torch.int64))
    distiller.prepare(())
    distiller.eval()
    target = torch.zeros(3, dtype=torch.int64)
    out = distiller.outputs(images(), target, target)["main"]
    torch.testing.assert_close(out.teacher, expected(runs["simkd"]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"out": "model.bin"}, "model.bin: write one of .pt2"),
        ({"which": "first"}, "which = 'first': best or last"),
        ({"network": "slt7"}, "network = 'slt7': this run has student, ema"),
    ],
)
def test_refusals_name_what_there_is(runs, tmp_path, words, message):
    given = {"out": "model.pt2", **words}
    with pytest.raises(ValueError, match=message):
        export(runs["ce"], tmp_path / given.pop("out"), **given)
    assert not list(tmp_path.iterdir())


def test_a_missing_folder_is_named(runs, tmp_path):
    for suffix in SUFFIXES:
        with pytest.raises(FileNotFoundError, match="there is no folder .*nowhere; make it first"):
            export(runs["ce"], tmp_path / "nowhere" / f"model{suffix}")


def test_a_folder_is_no_file(runs, tmp_path, kd):
    (tmp_path / "models.pt2").mkdir()
    for out in (tmp_path, tmp_path / "models.pt2"):
        result = kd("export", runs["ce"], out)
        assert result.code == 2 and not result.out
        wanted = f"error: out = {out}: a folder; name a file, as {out}/student.pt2\n"
        assert result.err == wanted
    assert not list((tmp_path / "models.pt2").iterdir())


def test_a_full_disk_leaves_the_file_before(runs, tmp_path, kd):
    with small_disk(tmp_path / "disk", 8 << 20) as disk:
        out = export(runs["ce"], disk / "model.pt")
        before = out.read_bytes()
        fill(disk, 8192)
        result = kd("export", runs["ce"], out, "--network", "ema")
        told = f"error: [Errno 28] No space left on device; it takes {len(before):,} bytes, "
        told += f"the disk has 8,192 free, {len(before) - 8192:,} too few: '{out}'\n"
        assert (result.code, result.err) == (2, told)
        assert out.read_bytes() == before
        mount("-o", "remount,ro", str(disk))
        result = kd("export", runs["ce"], out)
        assert result.err == f"error: [Errno 30] Read-only file system: '{out}'\n"
        there = sorted(path.name for path in disk.iterdir())
        assert there == ["filler", "model.pt", "model.pt.md"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_cannot_be_read_again_does_not_replace_the_file_before(
    suffix, runs, tmp_path, monkeypatch
):
    needed = {".onnx": ("onnxscript", "onnxruntime"), ".safetensors": ("safetensors",)}
    for package in needed.get(suffix, ()):
        pytest.importorskip(package)
    out = tmp_path / f"model{suffix}"
    out.write_text("earlier")
    for writes in ("program", "weights"):
        monkeypatch.setattr(exporting, writes, lambda *given: bytes(1000))
    with pytest.raises(ValueError, match=f"model{suffix}: the file cannot be read again: "):
        export(runs["ce"], out)
    assert out.read_text() == "earlier" and list(tmp_path.iterdir()) == [out]


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a run"):
        export(tmp_path, tmp_path / "model.pt2")
