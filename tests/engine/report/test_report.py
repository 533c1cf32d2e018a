"""The page about runs: numbers beside the published ones, whatever state a run is in."""

import html
import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import pytest

from kdfuse.engine.recipe.load import Recipe
from kdfuse.engine.report.curves import Chart, Line, charts
from kdfuse.engine.report.numbers import numbers
from kdfuse.engine.report.page import report
from kdfuse.engine.run.log import RunLog
from kdfuse.engine.run.past import across_seeds, read_run

SLKD = "cifar100/slkd:resnet32x4-resnet8x4"
KD = "cifar100/kd:resnet32x4-resnet8x4"
NKD = "coco/nkd:resnet101-resnet50"
Maker = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Maker:
    """Writes a run directory as training does, with made-up accuracies."""

    def write(
        folder: str,
        recipe: str = SLKD,
        words: tuple[str, ...] = (),
        top1: tuple[float, ...] = (70.0, 77.0, 76.0),
        finished: bool = True,
    ) -> Path:
        path = tmp_path / folder
        path.mkdir()
        (path / "recipe.yaml").write_text(Recipe.load(recipe, words).explain())
        (path / "environment.json").write_text(json.dumps({"torch": "2.x", "gpus": ["<H200>"]}))
        with RunLog(path, 30, 3) as log:
            log.note("teacher: 79.42 <top-1>")
            for epoch, value in enumerate(top1, 1):
                losses = {"loss": 2.0 / epoch, "kd": 1.0 / epoch, "top1": value - 5, "lr": 0.05}
                log.step(10 * epoch, epoch, losses, 1000.0, 0.1)
                more = {"slt0_top1": value + 1, "slt1_top1": value + 2, "train_slt0_top1": 1.0}
                log.epoch(epoch, {"top1": value, "top5": 99.0, **more, "lr": 0.05})
            if finished:
                log.end({"best_top1": max(top1)})
        return path

    return write


@pytest.fixture
def detect(tmp_path: Path) -> Maker:
    """Writes a run directory of a detector as training does, with made-up APs."""

    def write(
        folder: str,
        recipe: str = NKD,
        words: tuple[str, ...] = (),
        ap: tuple[float, ...] = (20.0, 38.0, 37.5),
    ) -> Path:
        path = tmp_path / folder
        path.mkdir()
        (path / "recipe.yaml").write_text(Recipe.load(recipe, words).explain())
        with RunLog(path, 30, 3) as log:
            for epoch, value in enumerate(ap, 1):
                losses = {"loss": 2.0 / epoch, "classifier": 1.0, "distillation": 0.5, "lr": 0.02}
                log.step(10 * epoch, epoch, losses, 16.0, 0.1)
                parts = {"ap50": value + 20, "ap75": value + 5, "ap_small": value / 2}
                log.epoch(epoch, {"ap": value, **parts, "ema_ap": value + 1, "train_loss": 1.0})
            log.end({})
        return path

    return write


def text_of(page: str) -> str:
    """What a reader sees: no styles, no tags, single spaces."""
    page = re.sub(r"<(style|svg).*?</\1>", " ", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page)).split())


def test_one_run(make: Maker, tmp_path: Path) -> None:
    out = report([make("first")], tmp_path / "page.html")
    assert out == tmp_path / "page.html"
    page = out.read_text()
    seen = text_of(page)
    assert f"{SLKD} slkd first seed 0 76.00 77.00 epoch 2 76.85 SLKD paper, table 1 +0.15" in seen
    assert "SL-T 0 SL-T 1 student, training batches published 76.85" in seen
    assert "method.temperature 4.0" in seen and "optim.lr 0.05" in seen
    assert page.count("<svg") == 5


def test_trajectories_of_self_learning_teachers(make: Maker, tmp_path: Path) -> None:
    path = make("first", finished=False)
    values = {"kl_teacher_to_slt0": 0.5, "kl_slt0_to_student": 0.25, "entropy_ema": 1.0}
    values |= {"agreement_student": 80.0, "agreement_kd_student": 75.0, "top1": 70.0}
    with RunLog(path, 30, 3, resume_step=10) as log:
        log.epoch(2, values)
        log.epoch(3, {**values, "kl_teacher_to_slt0": 0.125})
    drawn = {chart.title: chart.lines for chart in charts(read_run(path))}
    assert drawn["Divergence (KL) at T = 1, nats"] == [
        Line("teacher to SL-T 0", [2.0, 3.0], [0.5, 0.125], 0),
        Line("SL-T 0 to student", [2.0, 3.0], [0.25, 0.25], 1),
    ]
    agreement = drawn["Same class as the teacher, percent"]
    assert [line.label for line in agreement] == ["student", "kd_student"]
    [averaged] = drawn["Entropy of the predictions, nats"]
    assert averaged.label == "student, averaged (EMA)"
    assert not any("method's T" in title for title in drawn)
    [speed], [wait] = drawn["Images a second"], drawn["Waiting for data, share of the time"]
    assert (speed.y, wait.y) == ([1000.0], [0.1])
    report([path], tmp_path / "page.html")


def test_numbers_of_runs_are_a_record_each(make: Maker, tmp_path: Path) -> None:
    begun = make("begun", KD, words=("run.seed=3",), top1=(), finished=False)
    out = numbers([make("first"), begun], tmp_path / "runs.jsonl")
    first, other = (json.loads(line) for line in out.read_text().splitlines())
    assert (first["recipe"], first["method"], first["student"]) == (SLKD, "slkd", "resnet8x4")
    assert (first["best"]["top1"], first["best"]["epoch"], first["last"]["slt1_top1"]) == (
        77,
        2,
        78,
    )
    assert (first["state"], first["images_per_s"], first["torch"]) == ("finished", 1000.0, "2.x")
    assert first["train_s"] >= 0 and "time" not in first["last"]
    assert other["seed"] == 3 and other["state"].startswith("unfinished")
    assert other["last"] is None and other["best"] is None


def test_page_needs_nothing_else_and_escapes(make: Maker, tmp_path: Path) -> None:
    page = report([make("first")], tmp_path / "page.html").read_text()
    assert not re.search(r"(src|href)=\"(?!#)", page)
    assert "@import" not in page and "<script" not in page and "url(http" not in page
    assert "teacher: 79.42 &lt;top-1&gt;" in page and "<H200>" not in page
    assert not list(tmp_path.glob("*.tmp"))


def test_curves_are_well_formed_and_use_the_pages_colours(make: Maker, tmp_path: Path) -> None:
    page = report([make("first"), make("second", words=("run.seed=1",))], tmp_path / "p.html")
    found = re.findall(r"<svg.*?</svg>", page.read_text(), flags=re.DOTALL)
    assert len(found) == 11
    names = [name for svg in found for name in re.findall(r'\bid="([^"]*)"', svg)]
    assert len(names) == len(set(names))
    for svg in found:
        assert ET.fromstring(svg).get("viewBox")
        assert "var(--c0)" in svg and "#fe0" not in svg


def test_the_same_runs_give_the_same_page(make: Maker, tmp_path: Path) -> None:
    run = make("first")
    assert (
        report([run], tmp_path / "a.html").read_bytes()
        == report([run], tmp_path / "b.html").read_bytes()
    )


def test_seeds_are_one_row_with_mean_and_spread(make: Maker, tmp_path: Path) -> None:
    runs = [
        make("s0", top1=(70, 76)),
        make("s1", top1=(70, 77), words=("run.seed=1",)),
        make("s2", top1=(78, 75), words=("run.seed=2",)),
        make("killed", top1=(10,), words=("run.seed=3",), finished=False),
        make("kd", recipe=KD, top1=(73.0,)),
    ]
    assert [len(group.runs) for group in across_seeds([read_run(run) for run in runs])] == [4, 1]
    seen = text_of(report(runs, tmp_path / "page.html").read_text())
    assert "76.00 \u00b1 1.00 77.00 \u00b1 1.00 76.85" in seen
    assert "killed seed 3, unfinished, step 10 of 30" in seen
    assert "What differs" in seen and "method.name slkd kd" in seen


def test_two_runs_of_a_seed_are_no_sample(make: Maker, tmp_path: Path) -> None:
    runs = [make("one", top1=(70, 76)), make("again", top1=(70, 76))]
    runs.append(make("s1", top1=(70, 78), words=("run.seed=1",)))
    past = [read_run(run) for run in runs]
    assert [[run.path.name for run in group.runs] for group in across_seeds(past)] == [
        ["one", "s1"],
        ["again"],
    ]


@pytest.mark.parametrize(
    "values",
    [(2e-4,), (1e-4,), (-1e-4, 2e-4), (1e-7,), (5e-4,), (0.05,), (0.0995, 0.1), (93.1, 93.14)],
)
def test_the_numbers_of_an_axis_fit_beside_it(values: tuple[float, ...]) -> None:
    svg = Chart("any", [Line("line", [1, 2], [values[0], values[-1]])]).svg
    assert max(len(text) for text in re.findall(r"<text[^>]*>([^<]*)</text>", svg)) <= 7


def test_a_detector_is_judged_by_its_box_ap(detect: Maker, tmp_path: Path) -> None:
    run = detect("first")
    past = read_run(run)
    assert past.best is not None and past.best["epoch"] == 2.0 and past.best["ap"] == 38.0
    page = report([run], tmp_path / "page.html").read_text()
    seen = text_of(page)
    assert "last AP best AP" in seen and "COCO's box AP in percent on the validation set" in seen
    assert f"{NKD} nkd first seed 0 37.50 38.00 epoch 2 38.70 NKD/USKD, supplement -0.70" in seen
    assert "Box AP, percent student student, averaged (EMA) published 38.70" in seen
    assert "Box AP by overlap and by size IoU 0.50 IoU 0.75 small objects Loss" in seen
    assert "Loss terms in training loss classifier distillation Learning" in seen
    assert "epoch ap ap50 ap75 ap_small ema_ap train_loss 1 20 40 25 10 21 1 2 38" in seen
    assert "top-1" not in seen and page.count("<svg") == 6


def test_a_detector_that_diverged_or_was_never_evaluated(detect: Maker, tmp_path: Path) -> None:
    runs = [
        detect("diverged", ap=(20.0, float("nan"), 19.0)),
        detect("without", words=("data.val=false",), ap=()),
    ]
    assert [r["epoch"] for r in read_run(runs[0]).evaluations] == [1.0, 3.0]
    seen = text_of(report(runs, tmp_path / "page.html").read_text())
    assert "diverged seed 0 19.00 20.00 epoch 1 38.70" in seen
    assert "without seed 0 - - 38.70" in seen


def test_classifiers_and_detectors_are_not_compared(
    make: Maker, detect: Maker, tmp_path: Path
) -> None:
    one = [make("c0", top1=(76.0,)), detect("d0", ap=(37.0,))]
    seen = text_of(report(one, tmp_path / "page.html").read_text())
    assert "2 recipes, 2 runs Top-1 accuracy recipe runs last top-1" in seen
    assert "best epoch. Box AP recipe runs last AP" in seen
    assert "Student's" not in seen and "What differs" not in seen

    more = [make("c1", recipe=KD, top1=(73.0,)), detect("d1", words=("run.seed=1",), ap=(39.0,))]
    seen = text_of(report([*one, *more], tmp_path / "page.html").read_text())
    top1, ap = seen.split(" Box AP recipe ")
    assert f"Student's top-1 accuracy, percent {SLKD} {KD} What differs {SLKD} {KD} " in top1
    assert "method.name slkd kd" in top1 and "coco" not in top1
    assert f"{NKD} nkd d0 seed 0 d1 seed 1 38.00 \u00b1 1.41 38.00 \u00b1 1.41 38.70" in ap
    assert f"Student's box AP, percent {NKD} c0 " in ap  # the seeds alone differ


def test_a_killed_run(make: Maker, tmp_path: Path) -> None:
    run = make("killed", top1=(70.0,), finished=False)
    with (run / "log.jsonl").open("a") as file:
        file.write('{"kind": "ep')
    seen = text_of(report([run], tmp_path / "page.html").read_text())
    assert "killed seed 0, unfinished, step 10 of 30 70.00 70.00 epoch 1" in seen


def test_runs_without_an_epoch(make: Maker, tmp_path: Path) -> None:
    started, bare = make("started", top1=(), finished=False), make("bare", finished=False)
    (bare / "log.jsonl").unlink()
    (bare / "environment.json").unlink()
    assert read_run(started).state == "unfinished, step 0 of 30"
    seen = text_of(report([started, bare], tmp_path / "page.html").read_text())
    assert "bare seed 0, not started - - 76.85" in seen
    assert seen.count("Nothing recorded yet.") == 11


def test_values_that_are_not_numbers_leave_gaps(make: Maker, tmp_path: Path) -> None:
    run = make("diverged", top1=(70.0, float("nan"), 71.0))
    past = read_run(run)
    assert [record["epoch"] for record in past.evaluations] == [1.0, 3.0]
    assert past.best is not None and past.best["top1"] == 71.0
    assert "<svg" in report([run], tmp_path / "page.html").read_text()


def test_what_is_no_run_is_refused_by_name(make: Maker, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty is not a run directory"):
        report([make("first"), tmp_path / "empty"], tmp_path / "page.html")
    with pytest.raises(FileNotFoundError, match="nowhere is not a run directory"):
        report([tmp_path / "nowhere"], tmp_path / "page.html")
    with pytest.raises(ValueError, match="at least one"):
        report([], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_best_is_the_earliest_of_equals(make: Maker) -> None:
    best = read_run(make("ties", top1=(70.0, 75.0, 75.0))).best
    assert best is not None and best["epoch"] == 2.0
