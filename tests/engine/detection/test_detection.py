"""Detection: COCO's layout, the distilled logits of the RoIs, training, resume and AP."""

import contextlib
import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, ImageDraw
from torch import nn
from torchvision.models.detection import fasterrcnn_resnet50_fpn

from kdfuse.engine.detection import evaluate
from kdfuse.engine.detection.coco import check_same_categories, read_coco
from kdfuse.engine.detection.distiller import DetectionDistiller
from kdfuse.engine.detection.loader import Loader
from kdfuse.engine.detection.method import DKD, KD, NKD, Baseline
from kdfuse.engine.detection.networks import create
from kdfuse.engine.detection.recipe import CocoData, DetectionRecipe, Detector, Student
from kdfuse.engine.recipe.load import Recipe, recipes
from kdfuse.engine.recipe.schema import RecipeError
from kdfuse.engine.run import log
from kdfuse.engine.run.checkpoint import load as load_checkpoint
from kdfuse.engine.run.past import mean_and_spread, read_run
from kdfuse.engine.training.frozen import digest
from kdfuse.engine.training.ranks import Group
from kdfuse.engine.training.start import train

pytestmark = pytest.mark.slow(40)

RESNET18 = "torchvision:fasterrcnn_resnet18_fpn"
SIDE = 64
RED, BLUE = 3, 7  # ids of categories; with a gap, as COCO's have
COLOURS = {RED: (220, 30, 30), BLUE: (30, 30, 220)}
CPU = Group(0, 1, torch.device("cpu"))
NEEDS_COCO = pytest.mark.skipif(find_spec("pycocotools") is None, reason="needs pycocotools")


def draw(root: Path, split: str, images: int, seed: int) -> None:
    """Images of one or two rectangles, the last image without any."""
    chance = np.random.default_rng(seed)
    (root / f"{split}2017").mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    listed, boxes = [], []
    for i in range(1, images + 1):
        image = Image.new("RGB", (SIDE + 16, SIDE), (120, 130, 120))
        for half in range(0 if i == images else 1 + i % 2):
            category = (RED, BLUE)[int(chance.integers(2))]
            left, top = 40 * half + int(chance.integers(8)), int(chance.integers(20))
            width, height = (int(side) for side in chance.integers(22, 30, 2))
            corners = [left, top, left + width - 1, top + height - 1]
            ImageDraw.Draw(image).rectangle(corners, fill=COLOURS[category])
            box = {"id": len(boxes) + 1, "image_id": i, "category_id": category, "iscrowd": 0}
            boxes.append({**box, "bbox": [left, top, width, height], "area": width * height})
        name = f"{i:012d}.png"
        image.save(root / f"{split}2017" / name)
        listed.append({"id": i, "file_name": name, "height": SIDE, "width": SIDE + 16})
    names = [{"id": BLUE, "name": "blue"}, {"id": RED, "name": "red"}]
    write(root, split, {"images": listed, "annotations": boxes, "categories": names})


def write(root: Path, split: str, held: object) -> None:
    (root / f"annotations/instances_{split}2017.json").write_text(json.dumps(held))


def held_by(root: Path, split: str) -> dict:
    return json.loads((root / f"annotations/instances_{split}2017.json").read_text())


@pytest.fixture(scope="module")
def coco_root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("coco")
    draw(root, "train", 9, seed=0)
    draw(root, "val", 4, seed=1)
    return root


@pytest.fixture(scope="module")
def data(coco_root) -> CocoData:
    return CocoData(root=coco_root, min_size=SIDE, max_size=2 * SIDE, workers=1, val=False)


SMALL = {"name": RESNET18, "hidden": 32}
STUDENT = Student(**SMALL, trained_stages=5, proposals=64, rois=24)


def recipe_of(data: CocoData, method: str = "nkd", *, optim=None, **run) -> DetectionRecipe:
    """Two epochs of four steps of two images."""
    settings = {"epochs": 2, "batch": 2, "device": "cpu", "threads": 1, "log_every": 1}
    settings |= {"eval_batch": 2, "teacher_at_chance": "allow", **run}
    return DetectionRecipe.model_validate(
        {
            "name": "tiny",
            "method": {"name": method},
            "data": data.model_dump(),
            "student": STUDENT.model_dump(),
            "teacher": None if method == "baseline" else SMALL,
            "optim": {"lr": 0.01, "schedule": "constant", "weight_decay": 1e-4, **(optim or {})},
            "run": settings,
        }
    )


def test_boxes_and_labels_are_those_of_the_file(tmp_path):
    draw(tmp_path, "train", 4, seed=2)
    held = held_by(tmp_path, "train")
    held["images"].reverse()  # ids decide the order, not the file
    held["annotations"] = [
        {"id": 1, "image_id": 2, "category_id": BLUE, "bbox": [70, -4, 20, 10.5], "iscrowd": 0},
        {"id": 2, "image_id": 2, "category_id": RED, "bbox": [1, 2, 30, 40]},
        {"id": 3, "image_id": 1, "category_id": RED, "bbox": [0, 0, 9, 9], "iscrowd": 1},
        {"id": 4, "image_id": 3, "category_id": RED, "bbox": [5, 5, 9, 0.5], "iscrowd": 0},
        {"id": 5, "image_id": 4, "category_id": RED, "bbox": [5, 5, 9, 9], "iscrowd": 0},
    ]
    write(tmp_path, "train", held)
    coco = read_coco(tmp_path, "train")
    assert coco.categories == {RED: "red", BLUE: "blue"}
    assert coco.ids.tolist() == [2, 4]  # a crowd alone, or less than a pixel, is no box
    boxes, labels = coco.targets(0)
    assert boxes.tolist() == [[70, 0, 80, 6.5], [1, 2, 31, 42]] and labels.tolist() == [2, 1]
    assert coco.path(1) == tmp_path / "train2017" / "000000000004.png"
    (tmp_path / "train2017").rename(tmp_path / "val2017")
    write(tmp_path, "val", held)
    val = read_coco(tmp_path, "val")
    assert val.ids.tolist() == [1, 2, 3, 4] and np.diff(val.starts).tolist() == [0, 2, 0, 1]


def change(part, number, **values):
    def do(held):
        held[part][number].update(values)
        return held

    return do


def twice(held):
    return {**held, "images": [*held["images"], held["images"][0]]}


def without(part, key):
    def do(held):
        del held[part][1][key]
        return held

    return do


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (change("annotations", 2, bbox=[1, 2, 3]), r"annotations\[2\] \(id 3\): bbox \[1, 2, 3\],"),
        (change("annotations", 0, bbox=[1, 2, -3, 4]), "negative width or height"),
        (change("annotations", 0, bbox=[1, 2, "3", 4]), r"wants \[left, top, width, height\]"),
        (change("annotations", 1, image_id=77), r"annotations\[1\].*there is no image 77"),
        (change("annotations", 1, category_id=5), "there is no category 5"),
        (change("annotations", 1, image_id=[1]), r"has image_id \[1\], wants int"),
        (change("categories", 1, id=BLUE), "category id 7 stands twice"),
        (twice, "image id 1 stands twice"),
        (without("images", "width"), r"images\[1\] has width None, wants int"),
        (lambda held: {**held, "annotations": None}, "no list 'annotations'"),
        (lambda held: [held], "no list 'images'"),
        (lambda held: {**held, "annotations": []}, "no image with a box"),
        (change("images", 0, file_name="none.png"), "1 of 3 images are missing.*none.png"),
    ],
)
def test_faulty_annotations_are_named(spoil, words, tmp_path):
    draw(tmp_path, "train", 4, seed=2)
    write(tmp_path, "train", spoil(held_by(tmp_path, "train")))
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        read_coco(tmp_path, "train")


def test_missing_parts_of_the_layout_are_named(tmp_path):
    draw(tmp_path, "train", 2, seed=2)
    draw(tmp_path, "val", 2, seed=2)
    train_set = read_coco(tmp_path, "train")
    write(tmp_path, "val", {**held_by(tmp_path, "val"), "categories": [{"id": RED, "name": "r"}]})
    held = held_by(tmp_path, "val")
    write(tmp_path, "val", {**held, "annotations": []})
    with pytest.raises(ValueError, match="not those of instances_train2017.json.*'blue'"):
        check_same_categories(train_set, read_coco(tmp_path, "val"))
    (tmp_path / "annotations/instances_val2017.json").write_text("{")
    with pytest.raises(ValueError, match="instances_val2017.json is not JSON"):
        read_coco(tmp_path, "val")
    (tmp_path / "annotations/instances_val2017.json").unlink()
    with pytest.raises(FileNotFoundError, match="no file .*instances_val2017.json; expected ROOT"):
        read_coco(tmp_path, "val")
    shutil.rmtree(tmp_path / "val2017")
    with pytest.raises(FileNotFoundError, match="no folder val2017"):
        read_coco(tmp_path, "val")


def rows_of(loader, epoch, start=0):
    with contextlib.closing(loader):
        return [[sample.row for sample in batch] for batch in loader.epoch(epoch, start)]


def test_order_follows_from_seed_and_epoch_at_any_start_and_number_of_processes(data):
    coco = read_coco(data.root, "train")
    assert len(coco) == 8  # the image without boxes is left out

    def loader(batch=4, rank=0, world=1):
        return Loader(coco, data, batch, seed=5, rank=rank, world=world)

    first, second = rows_of(loader(), 0), rows_of(loader(), 1)
    assert sorted(sum(first, [])) == list(range(8)) and first != second
    assert rows_of(loader(), 1, start=1) == second[1:]
    halves = [rows_of(loader(2, rank, 2), 1) for rank in (0, 1)]
    assert [a + b for a, b in zip(*halves, strict=True)] == second
    with contextlib.closing(loader(2, 1, 2)) as other:
        assert other.names(1, 0) == [str(coco.path(row)) for row in halves[1][0]]


def test_flipped_images_carry_flipped_boxes(data):
    coco = read_coco(data.root, "train")
    with contextlib.closing(Loader(coco, data, 8, seed=0, rank=0, world=1)) as loader:
        [batch] = loader.epoch(0)
    flipped = 0
    for sample in batch:
        pixels = np.asarray(Image.open(coco.path(sample.row)))
        own = sample.image.permute(1, 2, 0).numpy()
        flipped += not np.array_equal(own, pixels)
        for box, label in zip(sample.boxes.int().tolist(), sample.labels.tolist(), strict=True):
            left, top, right, bottom = box
            assert left < right and top < bottom
            inside = own[top:bottom, left:right].reshape(-1, 3)
            assert (inside == COLOURS[{1: RED, 2: BLUE}[label]]).all()
        if flipped and not np.array_equal(own, pixels):
            assert np.array_equal(own, pixels[:, ::-1])
    assert 0 < flipped < 8


def test_an_image_of_another_size_is_named(tmp_path):
    draw(tmp_path, "train", 2, seed=2)
    Image.new("RGB", (5, 5)).save(tmp_path / "train2017/000000000001.png")
    coco = read_coco(tmp_path, "train")
    with contextlib.closing(
        Loader(coco, CocoData(root=tmp_path), 1, seed=0, rank=0, world=1)
    ) as loader:
        with pytest.raises(ValueError, match=r"000000000001.png: \(5, 5\).*say \(64, 80\)"):
            list(loader.epoch(0))


def test_network_is_torchvisions(data):
    with torch.device("meta"):
        own = create(Detector(name="torchvision:fasterrcnn_resnet50_fpn"), data, 90)
        theirs = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    shapes = {name: value.shape for name, value in theirs.state_dict().items()}
    counted = {n: s for n, s in shapes.items() if not n.endswith(".num_batches_tracked")}
    assert {name: value.shape for name, value in own.state_dict().items()} == counted
    assert sum(p.numel() for p in own.parameters()) == 41_755_286  # as torchvision's page says


def test_weights_come_from_a_classifier_or_a_detector(data, tmp_path):
    classifier = torchvision.models.resnet18(num_classes=5)
    torch.save(classifier.state_dict(), tmp_path / "resnet18.pt")
    started = create(Student(**SMALL, backbone=tmp_path / "resnet18.pt"), data, 2)
    body = started.backbone.body.state_dict()
    assert body and all(torch.equal(v, classifier.state_dict()[k]) for k, v in body.items())
    trained = {n.split(".")[0] for n, p in started.backbone.body.named_parameters()
               if p.requires_grad}  # fmt: skip
    assert trained == {"layer2", "layer3", "layer4"}

    torch.save({"model": started.state_dict()}, tmp_path / "detector.pt")
    again = create(Detector(**SMALL, checkpoint=tmp_path / "detector.pt"), data, 2)
    assert digest([again]) == digest([started])
    with pytest.raises(ValueError, match=r"does not fit .*: it has 2 categories beside the back"):
        create(Detector(**SMALL, checkpoint=tmp_path / "detector.pt"), data, 3)
    with pytest.raises(ValueError, match=r"\d+ missing, the first: backbone.body.conv1.weight;"):
        create(Detector(**SMALL, checkpoint=tmp_path / "resnet18.pt"), data, 2)
    with pytest.raises(ValueError, match="did you mean torchvision:fasterrcnn_resnet18_fpn"):
        create(Detector(name="fasterrcnn_resnet18_fpn"), data, 2)


def batch_of(data):
    coco = read_coco(data.root, "train")
    with contextlib.closing(Loader(coco, data, 3, seed=1, rank=0, world=1)) as loader:
        pairs = [sample.on(CPU.device) for sample in next(loader.epoch(0))]
    return [image for image, _ in pairs], [target for _, target in pairs]


def softened(logits, temperature, labels=None):
    """log softmax at a temperature, over all classes or over those that are not the label."""
    rows = logits / temperature
    if labels is not None:
        keep = torch.arange(rows.shape[1]) != labels[:, None]
        rows = rows[keep].view(len(rows), -1)
    return rows.log_softmax(1)


def kl(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum(1)


def kd_formula(z, t, y):
    return 4 * kl(softened(t, 2), softened(z, 2))


def dkd_formula(z, t, y):
    """alpha 1, beta .25, T 1."""
    own = torch.arange(len(y)), y
    pz, pt = (x.softmax(1)[own] for x in (z, t))
    pair = [torch.stack([p, 1 - p], 1).log() for p in (pt, pz)]
    return kl(*pair) + 0.25 * kl(softened(t, 1, y), softened(z, 1, y))


def nkd_formula(z, t, y):
    """gamma 1.5, T 1."""
    own = torch.arange(len(y)), y
    target = -t.softmax(1)[own] * z.log_softmax(1)[own]
    return target - 1.5 * (softened(t, 1, y).exp() * softened(z, 1, y)).sum(1)


@pytest.mark.parametrize(
    ("method", "formula"),
    [
        (KD(temperature=2.0, weight=0.5), kd_formula),
        (DKD(weight=0.5), dkd_formula),
        (NKD(weight=0.5), nkd_formula),
    ],
    ids=["kd", "dkd", "nkd"],
)
def test_loss_is_the_detectors_own_and_the_methods_on_the_students_rois(method, formula, data):
    torch.manual_seed(0)
    student, teacher = create(STUDENT, data, 2), create(Detector(**SMALL), data, 2)
    for network in (student, teacher):  # apart from the uniform start, where KD is all but 0
        nn.init.normal_(network.roi_heads.box_predictor.cls_score.weight, std=3)
    before = digest([teacher])
    distiller = DetectionDistiller(method, student, teacher).train()
    images, targets = batch_of(data)

    torch.manual_seed(1)
    own = student(images, targets)  # torchvision's losses
    seen: dict = {}
    heads = student.roi_heads
    heads.box_roi_pool.register_forward_pre_hook(lambda _, args: seen.update(rois=args[1:]))

    def keep(_, args, out):
        out[0].retain_grad()
        seen["logits"] = out[0]

    heads.box_predictor.register_forward_hook(keep)
    torch.manual_seed(1)
    loss, terms = distiller({}, images, targets)
    loss.backward()
    names = {"classifier": "loss_classifier", "box": "loss_box_reg"}
    names |= {"objectness": "loss_objectness", "rpn_box": "loss_rpn_box_reg"}
    for mine, theirs in names.items():
        torch.testing.assert_close(terms[mine], own[theirs])

    rois, sizes = seen["rois"]
    with torch.no_grad():
        batch, resized = teacher.transform(images, targets)
        pooled = teacher.roi_heads.box_roi_pool(teacher.backbone(batch.tensors), rois, sizes)
        taught = teacher.roi_heads.box_predictor(teacher.roi_heads.box_head(pooled))[0].double()
    labels = torch.cat([label(own, t) for own, t in zip(rois, resized, strict=True)])
    assert len(labels) == terms["rows"] == 3 * 24 and 0 < (labels > 0).sum() < len(labels)
    z = seen["logits"].detach().double().requires_grad_()
    expected = formula(z, taught, labels).mean()
    torch.testing.assert_close(terms["distillation"].double(), expected.detach(), rtol=1e-5, atol=0)
    four = sum(terms[name] for name in names)
    torch.testing.assert_close(loss.detach(), four + 0.5 * terms["distillation"])
    (nn.functional.cross_entropy(z, labels) + 0.5 * expected).backward()
    torch.testing.assert_close(seen["logits"].grad.double(), z.grad, rtol=1e-4, atol=1e-7)

    assert digest([teacher]) == before and not teacher.training
    assert all(p.grad is None for p in teacher.parameters())
    assert not any(name.startswith("teacher") for name in distiller.state_dict())
    used = [p.grad is not None for p in student.parameters() if p.requires_grad]
    assert all(used)  # else many processes would wait for gradients that never come


def label(rois, target):
    """The category of the box that a RoI overlaps by half or more, else the background."""
    overlap, best = torchvision.ops.box_iou(target["boxes"], rois).max(0)
    return torch.where(overlap >= 0.5, target["labels"][best], 0)


def test_training_lowers_the_loss(data):
    torch.manual_seed(0)
    images, targets = batch_of(data)
    for method in (Baseline(), NKD()):
        teacher = None if isinstance(method, Baseline) else create(Detector(**SMALL), data, 2)
        distiller = DetectionDistiller(method, create(STUDENT, data, 2), teacher).train()
        optimizer = torch.optim.SGD(distiller.parameters(), lr=0.003, momentum=0.9)
        losses = []
        for _ in range(12):
            loss, _ = distiller({}, images, targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert sum(losses[-3:]) < 0.8 * sum(losses[:3]), losses  # measured: 0.35 to 0.65


def test_cut_off_and_resumed_it_ends_with_the_same_bytes(data, tmp_path, capsys):
    recipe = recipe_of(data, optim={"ema": 0.9, "clip": 1.0}, checkpoint_every=3, keep=9)
    whole, out = tmp_path / "whole", tmp_path / "cut"
    train(recipe, whole)
    shutil.copytree(whole, out)
    for name in ("step-00000006", "step-00000008"):
        shutil.rmtree(out / "checkpoints" / name)
    train(recipe, out, resume=True)
    assert "resumed from step-00000003" in capsys.readouterr().out
    final = "checkpoints/step-00000008/state.pt"
    assert (out / final).read_bytes() == (whole / final).read_bytes()
    facts = [load_checkpoint(run / "checkpoints/step-00000008")[1] for run in (whole, out)]
    assert facts[0] == facts[1] and facts[0]["step"] == 8
    kept = [
        [
            (r["step"], r["loss"], r["distillation"], r["target"], r["others"])
            for r in log.read(run / "log.jsonl")
            if r["kind"] == "step"
        ]
        for run in (whole, out)
    ]
    assert kept[0] == kept[1] and len(kept[0]) == 8

    other = recipe.model_copy(update={"data": data.model_copy(update={"flip": False})})
    with pytest.raises(ValueError, match="data.flip: True -> False"):
        train(other, out, resume=True)
    (out / "recipe.yaml").unlink()  # the checkpoint still says whose it is
    with pytest.raises(ValueError, match="by another recipe.*\n.*data.flip: True -> False"):
        train(other, out, resume=True)
    shutil.rmtree(whole / "checkpoints")
    with pytest.raises(ValueError, match="finished and its checkpoints are gone"):
        train(recipe, whole, resume=True)


@NEEDS_COCO
def test_a_shipped_recipe_trains_and_evaluates(coco_root, tmp_path, monkeypatch, kd):
    monkeypatch.chdir(tmp_path)
    small = [
        f"data.root={coco_root}", f"data.min_size={SIDE}", "data.max_size=128", "run.device=cpu",
        f"student.name={RESNET18}", "student.hidden=32", "student.trained_stages=5",
        "student.proposals=64", "student.rois=24", f"teacher.name={RESNET18}", "teacher.hidden=32",
        "run.epochs=2", "run.batch=2", "run.eval_batch=2", "optim.lr=0.005", "run.threads=1",
    ]  # fmt: skip
    nkd = "coco/nkd:resnet101-resnet50"
    code, _, told = kd("train", nkd, *small)
    assert code == 2 and "teacher.checkpoint: null leaves the teacher's weights random" in told
    small.append("run.teacher_at_chance=allow")
    code, _, told = kd("train", nkd, *small, "student.trained_stages=3")
    assert code == 2 and "student.trained_stages: 3 freezes parts" in told
    code, printed, _ = kd("train", nkd, *small, "--out", "run")
    assert code == 0 and "8 training and 4 validation images of 2 categories" in printed
    assert "published: AP 38.70" in printed and "student.name" in printed
    records = [r for r in log.read(Path("run/log.jsonl")) if r["kind"] == "epoch"]
    assert len(records) == 2 and all(0 <= r["ap"] <= 100 for r in records)

    code, printed, _ = kd("eval", "run")
    assert code == 0 and f"last (step 8): ap {records[-1]['ap']:.2f}" in printed
    assert kd("report", "run").code == 0
    page = Path("run/report.html").read_text()
    assert "best AP" in page and f">{max(r['ap'] for r in records):.2f}<div" in page
    teacher = ["teacher.checkpoint=run", "run.teacher_at_chance=refuse", "run.epochs=1"]
    code, printed, _ = kd("train", "coco/kd", *small, *teacher, "seeds=2", "--out", "set")
    assert code == 0
    printed = " ".join(printed.split())
    aps = [read_run(path).evaluations[-1]["ap"] for path in Path("set").iterdir()]
    assert f"coco/kd:resnet101-resnet50 2 AP {mean_and_spread(aps)} AP " in printed
    assert len(aps) == 2 and "set: 2 of 2 runs are finished" in printed


@NEEDS_COCO
def test_ap_of_the_truth_is_100_and_of_nothing_0(coco_root):
    coco = read_coco(coco_root, "val")
    found = []
    for row in range(len(coco)):
        boxes, labels = (torch.from_numpy(array) for array in coco.targets(row))
        one = {"boxes": boxes, "labels": labels, "scores": torch.ones(len(labels))}
        found += evaluate.detections(coco, row, one)
    perfect = evaluate.compute(coco, found)
    assert perfect["ap"] == perfect["ap50"] == perfect["ap75"] == pytest.approx(100)
    assert "ap_large" not in perfect  # there is no such object
    assert evaluate.compute(coco, [])["ap"] == 0
    swapped = [{**one, "category_id": RED + BLUE - one["category_id"]} for one in found]
    assert evaluate.compute(coco, swapped)["ap"] == 0


def test_without_pycocotools_the_start_says_so(data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    recipe = recipe_of(data.model_copy(update={"val": True}))
    with pytest.raises(evaluate.MissingPycocotools, match=r"pip install 'kdfuse\[detection\]'"):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_published_rows():
    ap = {name: Recipe.load(name).expect.ap for name in recipes() if name.startswith("coco/")}
    assert ap == {
        "coco/baseline:resnet50": 37.4,
        "coco/baseline:resnet101": 39.4,
        "coco/kd:resnet101-resnet50": 37.8,
        "coco/dkd:resnet101-resnet50": 38.2,
        "coco/nkd:resnet101-resnet50": 38.7,
    }
    dkd = Recipe.load("coco/dkd")
    assert (dkd.method.alpha, dkd.method.beta, dkd.method.temperature) == (1, 0.25, 1)
    assert (dkd.optim.lr, dkd.run.batch, dkd.run.epochs) == (0.02, 16, 12)
    assert dkd.optim.milestones == (8, 11) and dkd.optim.weight_decay == 1e-4


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["teacher=null"], "teacher: method nkd needs one; add teacher.name=NETWORK"),
        (["task=segmentation"], "task: got the text 'segmentation', wants detection"),
        (["method.gama=1"], "method.gama: unknown key; did you mean method.gamma?"),
        (["data.size=224"], "data.size: unknown key"),
        (["data.min_size=2000"], "data.min_size: 2000 is above data.max_size"),
        (["student.checkpoint=a", "student.backbone=b"], "student.backbone: student.checkpoint"),
        (["expect={top1: 70, source: x}"], "expect.top1: detection is measured as AP"),
        (
            ["expect={source: x, also_in: [{table: a, row: b, column: c, top1: 7, source: x}]}"],
            "expect.also_in: its cells are top-1",
        ),
        (["method={name: baseline}"], "teacher: method baseline uses none"),
    ],
)
def test_recipes_that_cannot_work(words, line):
    with pytest.raises(RecipeError) as caught:
        Recipe.load("coco/nkd", words)
    assert str(caught.value).startswith(line)
