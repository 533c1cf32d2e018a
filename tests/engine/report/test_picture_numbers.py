"""The numbers behind a run's pictures, against formulas written anew, worked cases and laws."""

import base64
import io
import itertools
from collections import Counter

import numpy as np
import pytest
from pictured import answers, said
from PIL import Image

from kdfuse.engine.report import agreement, calibration, classes, confusion, correlation, tsne
from kdfuse.engine.report.answers import Answers
from kdfuse.engine.report.drawing import KINDS, MARKERS

pytestmark = pytest.mark.slow(5)


# Calibration


def test_ece_worked_by_hand():
    """0.95 twice, one right: 2/4 * 0.45; 0.55 right: 1/4 * 0.45; 0.15 wrong: 1/4 * 0.15."""
    of = calibration.bins(np.array([0.95, 0.95, 0.55, 0.15]), np.array([1, 0, 1, 0], bool))
    assert calibration.ece(of) == pytest.approx(0.225 + 0.1125 + 0.0375)
    assert [i for i, n in enumerate(of["images"]) if n] == [2, 8, 14]
    assert of["accuracy"][14] == 0.5 and of["accuracy"][0] is None


def test_ece_against_a_loop_over_the_bins():
    rng = np.random.default_rng(0)
    confidence = np.concatenate([rng.random(500), np.arange(1, 16) / 15])  # and every edge
    right = rng.random(515) < confidence**2
    error = 0.0
    for m in range(15):
        inside = (confidence > m / 15) & (confidence <= (m + 1) / 15)
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert calibration.ece(calibration.bins(confidence, right)) == pytest.approx(error, abs=1e-12)


def test_who_is_right_as_often_as_said_has_no_calibration_error():
    confidence = np.repeat(np.arange(1, 21) / 20, 20)
    right = np.tile(np.arange(20), 20) < 20 * confidence - 0.5
    assert calibration.ece(calibration.bins(confidence, right)) == pytest.approx(0, abs=1e-12)
    surer = calibration.bins(np.minimum(confidence + 0.01, 1), right)
    assert calibration.ece(surer) == pytest.approx(0.01 * 19 / 20, abs=1e-12)


def test_confidence_and_top1_of_logits():
    logits = np.array([[0, np.log(3.0)], [1000.0, 1000.0], [5.0, -5.0]])
    network = said(logits)
    assert network.top1.tolist() == [1, 0, 0]  # of equal ones the lower class
    np.testing.assert_allclose(network.confidence, [0.75, 0.5, 1 / (1 + np.exp(-10))])


# Correlation


@pytest.mark.parametrize("shift", [0.0, 1e5])
def test_correlation_of_batches_is_that_of_all_rows(shift):
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(50, 6)) @ rng.normal(size=(6, 6)) + shift
    moments = said(logits).moments
    assert moments is not None
    np.testing.assert_allclose(moments.correlation(), np.corrcoef(logits.T), atol=1e-9)


def test_a_logit_that_never_changes_goes_with_none():
    logits = np.random.default_rng(3).normal(size=(30, 4))
    logits[:, 2] = 0.1
    found = said(logits).moments.correlation()
    assert not found[2].any() and not found[:, 2].any() and found[0, 0] == pytest.approx(1)


def test_mean_absolute_difference_of_the_correlations():
    rng = np.random.default_rng(4)
    logits = {name: rng.normal(size=(40, 5)) for name in ("student", "teacher")}
    given = answers(5, 40)
    given.networks.update({name: said(own) for name, own in logits.items()})
    both = [np.corrcoef(logits[name].T) for name in ("student", "teacher")]
    apart = [abs(both[0][i, j] - both[1][i, j]) for i in range(5) for j in range(5) if i != j]
    found = correlation.numbers(given)
    assert found["mean_absolute_difference"] == pytest.approx(np.mean(apart))
    assert found["largest_absolute_difference"] == pytest.approx(max(apart))
    np.testing.assert_allclose(found["student"], both[0], atol=1e-4)


def test_blocks_leave_the_diagonal_out():
    matrix = np.random.default_rng(5).random((7, 7))
    found = correlation.blocks(matrix, 3)
    assert found.shape == (3, 3)
    for a, b in itertools.product(range(3), range(3)):
        cells = [
            matrix[i, j]
            for i in range(3 * a, min(3 * a + 3, 7))
            for j in range(3 * b, min(3 * b + 3, 7))
            if i != j
        ]
        assert found[a, b] == pytest.approx(np.mean(cells) if cells else 0)


def test_heat_is_transparent_at_zero():
    data = correlation.heat(np.array([[0.0, 0.5], [-1.0, 1.0]]), 1.0)
    pixels = np.asarray(Image.open(io.BytesIO(data)))
    assert pixels[..., 3].tolist() == [[0, 128], [255, 255]]
    assert tuple(pixels[0, 1, :3]) == correlation.ABOVE
    assert tuple(pixels[1, 0, :3]) == correlation.BELOW


# Confusion, classes, agreement


def test_confusion_counts_and_worst_pairs():
    rng = np.random.default_rng(6)
    target, top1 = rng.integers(6, size=200), rng.integers(6, size=200)
    matrix = confusion.counts(target, top1, 6)
    count = Counter(zip(target.tolist(), top1.tolist(), strict=True))
    assert all(matrix[i, j] == count[i, j] for i in range(6) for j in range(6))
    wrong = {cell: n for cell, n in count.items() if cell[0] != cell[1]}
    worst = sorted(wrong, key=lambda cell: (-wrong[cell], cell))
    assert confusion.pairs(matrix, 4) == worst[:4]
    errors = Counter()
    for (i, j), n in wrong.items():
        errors.update({i: n, j: n})
    assert confusion.confused(matrix, 2) == sorted(
        sorted(range(6), key=lambda c: (-errors[c], c))[:2]
    )
    assert confusion.pairs(np.diag([3, 4]), 5) == []


def test_images_of_a_pair_are_those_that_are_taken_for_the_other():
    """Three images; the second is a 1 taken for a 0, and it alone is red."""
    red = {1: (255, 0, 0)}
    given = Answers(
        ["0", "1"],
        np.array([0, 1, 1]),
        np.array([0, 1, 2]),
        np.ones(3, bool),
        {"student": said(np.array([[1.0, 0], [1, 0], [0, 1]]))},
        lambda row: Image.new("RGB", (200, 100), red.get(row, (0, 0, 255))),
    )
    found = confusion.numbers(given)
    assert found["cells"] == [[0, 0, 1], [1, 0, 1], [1, 1, 1]]
    (pair,) = found["pairs"]
    assert (pair["class"], pair["taken_for"]) == (1, 0)
    (file,) = pair["pictures"]
    image = Image.open(io.BytesIO(base64.b64decode(file)))
    pixel = image.getpixel((10, 10))
    assert image.size == (40, 20) and pixel[0] > 240 and pixel[2] < 20


def test_accuracy_of_each_class():
    target, top1 = np.array([0, 0, 0, 1, 3]), np.array([0, 0, 1, 1, 0])
    found = classes.accuracies(target, top1, 4)
    np.testing.assert_allclose(found, [200 / 3, 100, np.nan, 0])


def test_cases_of_agreement_are_all_images():
    rng = np.random.default_rng(7)
    target, own, teacher = (rng.integers(3, size=300) for _ in range(3))
    found = agreement.cases(own, teacher, target)
    each = Counter()
    for t, a, b in zip(target, own, teacher, strict=True):
        if a == b:
            each["both right" if a == t else "the same error"] += 1
        elif t in (a, b):
            each["the network alone right" if a == t else "the teacher alone right"] += 1
        else:
            each["different errors"] += 1
    assert found == dict(each) and sum(found.values()) == 300
    alone = answers(3, 30)
    alone.networks["student"] = alone.networks["teacher"]
    assert agreement.numbers(alone)["networks"]["student"]["share"] == 1.0


# t-SNE


@pytest.mark.parametrize(("count", "each"), [(3, 5), (10, 1000), (20, 100), (1000, 50)])
def test_sample_is_small_and_spread(count, each):
    target = np.random.default_rng(8).permutation(np.repeat(np.arange(count), each))
    rows = tsne.sample(target, count)
    of_class = Counter(target[rows].tolist())
    assert len(rows) == len(set(rows)) <= 2000 and len(of_class) == min(count, 20)
    assert {0, count - 1} <= set(of_class)
    assert set(of_class.values()) == {min(each, 2000 // len(of_class))}


def test_a_map_keeps_groups_together_and_is_the_same_again():
    given = answers(4, 80)
    found = tsne.numbers(given)
    places, labels = np.array(found["networks"]["student"]["map"]), np.array(found["labels"])
    apart = np.linalg.norm(places[:, None] - places[None], axis=2) + 1e9 * np.eye(80)
    assert (labels[apart.argmin(1)] == labels).mean() > 0.95
    assert tsne.numbers(given) == found


def test_why_a_network_has_no_map():
    given = answers(3, 12)
    given.networks["student"] = said(np.zeros((12, 3)), np.ones((12, 4), np.float32))
    given.networks["teacher"] = said(np.zeros((12, 3)))
    given.networks["teacher"].no_features = "it has no such layer"
    found = tsne.numbers(given)
    assert list(found["networks"]) == ["SL-T 0"]
    words = tsne.draw(found).words
    assert "Without student: its features are the same for all images" in words
    assert "Without teacher: it has no such layer" in words


def test_each_class_of_a_map_has_a_look_of_its_own():
    assert tsne.CLASSES <= KINDS * MARKERS
