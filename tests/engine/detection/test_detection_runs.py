"""Runs of detectors have what runs have: bf16, an average, clipping, a page, export, ranks."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import together
from test_detection import (
    NEEDS_COCO,
    SIDE,
    SMALL,
    STUDENT,
    batch_of,
    coco_root,  # noqa: F401 - a fixture
    draw,
    recipe_of,
)

from kdfuse.engine.cli.export import export
from kdfuse.engine.detection.distiller import DetectionDistiller
from kdfuse.engine.detection.evaluate import evaluate
from kdfuse.engine.detection.method import NKD
from kdfuse.engine.detection.networks import create, kept
from kdfuse.engine.detection.recipe import CocoData, DetectionRecipe, Detector
from kdfuse.engine.run.checkpoint import load
from kdfuse.engine.run.log import read
from kdfuse.engine.training.start import train

pytestmark = pytest.mark.slow(25)


@pytest.fixture(scope="module")
def run(coco_root, tmp_path_factory):  # noqa: F811
    """Four steps, with an average of the student."""
    data = CocoData(root=coco_root, min_size=SIDE, max_size=2 * SIDE, workers=1)
    recipe = recipe_of(data, optim={"ema": 0.9}, epochs=1)
    return train(recipe, tmp_path_factory.mktemp("runs") / "run")


@NEEDS_COCO
def test_the_average_is_evaluated_beside_the_student(run):
    state, facts = load(run / "checkpoints/step-00000004")
    assert state["ema"]["updates"] == 4 and facts["classes"] == 2
    name = "roi_heads.box_head.fc6.weight"
    assert not torch.equal(state["ema"]["module"][name], state["student"][name])
    last = [r for r in read(run / "log.jsonl") if r["kind"] == "epoch"][-1]
    assert {"ap", "ap50", "ema_ap", "ema_ap50"} <= last.keys()
    found = evaluate(run, DetectionRecipe.model_validate(facts["recipe"]))
    assert found["last"]["ap"] == last["ap"] and found["last"]["ema_ap"] == last["ema_ap"]


@NEEDS_COCO
def test_its_page_is_written(run):
    page = (run / "report.html").read_text()
    assert "box AP" in page and "top-1" not in page.lower()


@NEEDS_COCO
def test_an_onnx_model_finds_the_same_boxes_in_images_of_any_size(run, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    out = export(run, tmp_path / "detector.onnx", which="last", network="ema")
    assert [path.name for path in tmp_path.iterdir()] == ["detector.onnx"]
    session = runtime.InferenceSession(out, providers=["CPUExecutionProvider"])
    about = json.loads(session.get_modelmeta().custom_metadata_map["kdfuse"])
    assert about["network"] == "ema" and about["step"] == 4
    weights, facts = load(run / "checkpoints/step-00000004")
    distiller = kept(DetectionRecipe.model_validate(facts["recipe"]), 2, torch.device("cpu"))
    distiller.load(weights)
    detector = distiller.evaluated()["ema"].eval()
    for seed, size in enumerate(((64, 80), (96, 64))):
        generator = torch.Generator().manual_seed(seed)
        image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator)
        boxes, labels, scores = session.run(None, {"image": image.numpy()})
        (found,) = distiller.predict(detector, [image.float() / 255])
        best = slice(0, min(5, len(scores)))  # the order of equal scores is nobody's
        np.testing.assert_allclose(scores[best], found["scores"][best].numpy(), atol=1e-4)
        assert len(labels) == len(boxes) == len(found["boxes"])


@NEEDS_COCO
def test_weights_load_into_torchvisions_detector(run, tmp_path):
    out = export(run, tmp_path / "detector.pt", which="last")
    model = create(STUDENT, CocoData(root=tmp_path), 2)
    model.load_state_dict(torch.load(out, weights_only=True)["model"])
    with pytest.raises(ValueError, match=r"write an .onnx or a .pt file"):
        export(run, tmp_path / "detector.pt2")
    with pytest.raises(ValueError, match="network = 'slt0': this run has student, ema"):
        export(run, tmp_path / "detector.pt", network="slt0")
    for words, named in (({"check": 8}, "check = 8"), ({"layout": "timm"}, "layout = 'timm'")):
        with pytest.raises(ValueError, match=f"{named}: .* is a run of a detector; leave it out"):
            export(run, tmp_path / "detector.pt", **words)
    with pytest.raises(ValueError, match="a detector is written as .onnx or .pt"):
        export(run, tmp_path / "detector.safetensors")


def test_bfloat16_gives_the_loss_of_float32_to_its_digits(coco_root):  # noqa: F811
    data = CocoData(root=coco_root, min_size=SIDE // 2, max_size=SIDE, workers=1)
    images, targets = (part[:1] for part in batch_of(data))  # few processors are fast at it
    losses = []
    for amp in (False, True):
        torch.manual_seed(0)
        student, teacher = create(STUDENT, data, 2), create(Detector(**SMALL), data, 2)
        distiller = DetectionDistiller(NKD(), student, teacher, amp=amp).train()
        torch.manual_seed(1)
        loss, _ = distiller({}, images, targets)
        assert loss.dtype == torch.float32
        loss.backward()
        assert all(p.grad.isfinite().all() for p in student.parameters() if p.requires_grad)
        losses.append(loss.item())
    # bfloat16 has 8 bits; another choice of RoIs moves the loss more than its rounding does.
    assert losses[1] == pytest.approx(losses[0], rel=0.1)


@NEEDS_COCO
def test_two_processes_agree_and_go_on_with_the_same_bytes(tmp_path):
    draw(tmp_path / "coco", "train", 9, seed=0)
    draw(tmp_path / "coco", "val", 3, seed=1)  # one process has an image more than the other
    together(2, main, tmp_path)
    final = "checkpoints/step-00000002/state.pt"
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert (whole / final).read_bytes() == (cut / final).read_bytes()
    assert len(load(whole / "checkpoints/step-00000002")[0]["rng"]) == 2
    alone = evaluate(whole, of_ranks(tmp_path))
    last = [r for r in read(whole / "log.jsonl") if r["kind"] == "epoch"][-1]
    assert alone["last"]["ap"] == pytest.approx(last["ap"], abs=1e-6)


def of_ranks(folder: Path) -> DetectionRecipe:
    """Two steps of four images."""
    data = CocoData(root=folder / "coco", min_size=SIDE, max_size=2 * SIDE, workers=1)
    return recipe_of(data, batch=4, epochs=1, checkpoint_every=1, keep=9)


def main(folder: Path) -> None:
    """What each of the two processes does."""
    from kdfuse.engine.training.ranks import join

    train(of_ranks(folder), folder / "whole")
    group = join("cpu")
    if group.first:
        shutil.copytree(folder / "whole", folder / "cut")
        for checkpoint in (folder / "cut/checkpoints").iterdir():
            if checkpoint.name != "step-00000001":
                shutil.rmtree(checkpoint)
    group.wait()
    train(of_ranks(folder), folder / "cut", resume=True)
