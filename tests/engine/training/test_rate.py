"""The learning rate at its corners, and at other batches."""

import math

import pytest

from kdfuse.engine.recipe.optim import Optim
from kdfuse.engine.recipe.run import Run
from kdfuse.engine.training.rate import lr_at


def run(epochs, batch=64):
    return Run(epochs=epochs, batch=batch)


def test_step_schedule_drops_once_the_milestone_is_finished():
    optim = Optim(lr=0.05, milestones=(150, 180, 210), gamma=0.1)
    steps = 782  # of an epoch
    last_before, first_after = (150 * steps - 1) / steps, (150 * steps) / steps
    assert lr_at(optim, run(240), 0) == 0.05
    assert lr_at(optim, run(240), last_before) == 0.05
    assert lr_at(optim, run(240), first_after) == pytest.approx(0.005)
    assert lr_at(optim, run(240), 180) == pytest.approx(5e-4)
    assert lr_at(optim, run(240), 239.9) == pytest.approx(5e-5)


def test_cosine_schedule():
    optim = Optim(lr=1.0, schedule="cosine", min_lr=0.2)
    assert lr_at(optim, run(10), 0) == 1.0
    assert lr_at(optim, run(10), 5) == pytest.approx(0.6)
    assert lr_at(optim, run(10), 2.5) == pytest.approx(0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2)
    assert lr_at(optim, run(10), 10) == lr_at(optim, run(10), 11) == pytest.approx(0.2)


def test_constant_schedule():
    assert {lr_at(Optim(lr=0.3, schedule="constant"), run(9), e) for e in (0, 4.5, 9)} == {0.3}


def test_warmup():
    cosine = Optim(lr=1.0, schedule="cosine", warmup_epochs=4)
    assert [lr_at(cosine, run(12), e) for e in (0, 0.5, 1, 3, 4)] == [0, 0.125, 0.25, 0.75, 1]
    assert lr_at(cosine, run(12), 8) == pytest.approx(0.5)
    step = Optim(lr=1.0, milestones=(2,), warmup_epochs=4)
    assert lr_at(step, run(12), 3) == pytest.approx(0.075)
    with pytest.raises(ValueError, match=r"optim.warmup_epochs: 4.0 leaves none of run.epochs=4"):
        lr_at(cosine, run(4), 0)


@pytest.mark.parametrize(
    ("scale", "batch", "factor"),
    [
        ("linear", 1024, 4.0),
        ("linear", 96, 0.375),
        ("sqrt", 1024, 2.0),
        ("sqrt", 512, math.sqrt(2)),
        ("sqrt", 64, 0.5),
    ],
)
def test_the_whole_schedule_is_scaled_with_the_batch(scale, batch, factor):
    given = {"lr": 0.1, "schedule": "cosine", "min_lr": 0.01, "warmup_epochs": 2}
    plain, scaled = Optim(**given), Optim(**given, scale=scale)
    for epoch in (0, 0.5, 2, 5, 7.25, 10):
        expected = factor * lr_at(plain, run(10), epoch)
        assert lr_at(scaled, run(10, batch), epoch) == pytest.approx(expected, rel=1e-15)
    # The end of the cosine, which is min_lr, is scaled as the rest.
    assert lr_at(scaled, run(10, batch), 10) == pytest.approx(factor * 0.01)


def test_a_rate_is_given_for_the_batch_that_scale_batch_says():
    optim = Optim(lr=0.3, schedule="constant", scale="linear", scale_batch=96)
    assert lr_at(optim, run(5, 192), 1) == 0.6
    assert lr_at(optim, run(5, 96), 1) == 0.3


def test_without_a_rule_the_batch_changes_no_bit():
    optim = Optim(lr=0.1, milestones=(2, 4), gamma=0.3)
    for batch in (1, 96, 8192):
        assert lr_at(optim, run(5, batch), 4.5) == 0.1 * 0.3**2
