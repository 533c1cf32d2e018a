"""Runs with steps that are not finite: skipped, gone back for, stopped for; and what logs say."""

import json
import math
import os
import signal
import time

import pytest
from processes import together
from test_resume import assert_same, cut, records
from test_train import last
from tiny import tiny

from kdfuse.engine.data.sources import open_source
from kdfuse.engine.run import checkpoint
from kdfuse.engine.run.checkpoint import load
from kdfuse.engine.run.log import read
from kdfuse.engine.training.alarms import FACTOR, FEWEST, RECORDS, fallen, spike
from kdfuse.engine.training.classification import Classification, chance_level
from kdfuse.engine.training.meters import Diverged
from kdfuse.engine.training.ranks import join
from kdfuse.engine.training.start import train
from kdfuse.engine.training.state import State
from kdfuse.engine.training.stop import Stopped

pytestmark = pytest.mark.slow(20)

END = "step-00000010"


@pytest.fixture
def broken(monkeypatch):
    """`break_steps` for the length of a test."""
    monkeypatch.setattr(Classification, "step", Classification.step)
    return break_steps


GRADIENTS = "gradients"  # in place of a factor: the loss is as it was


def times(out, factor):
    if factor != GRADIENTS:
        return out * factor
    out.register_hook(lambda gradient: gradient * math.inf)
    return out


def break_steps(factors, once=False):
    """Multiply the student's logits in the steps of these numbers, each time or the first time
    alone: the rows of each step's batch, once it came."""
    step, factors, rows = Classification.step, dict(factors), {}

    def wrapped(task, batch):
        number = task.state.done + 1
        rows[number] = batch.index.tolist()
        factor = factors.pop(number, 1.0) if once else factors.get(number, 1.0)
        student = task.networks.main.student
        handle = student.register_forward_hook(lambda _, x, out: times(out, factor))
        try:
            return step(task, batch)
        finally:
            handle.remove()

    Classification.step = wrapped
    return rows


def recipe_of(few, **changes):
    """Two epochs of five steps, checkpoints after every other step."""
    run = {"batch": 16, "checkpoint_every": 2, "keep": 9, **changes.pop("run", {})}
    optim = {"lr": 0.05, "ema": 0.9, "skip_limit": 2, **changes.pop("optim", {})}
    return tiny(few, "kd", data={"subset": 8}, run=run, optim=optim, **changes)


def notes(run):
    return [r["text"] for r in read(run / "log.jsonl") if r["kind"] == "note"]


def end_of(run):
    return load(run / "checkpoints" / END)


def nan_in(*steps):
    return dict.fromkeys(steps, math.nan)


@pytest.fixture(scope="module")
def undisturbed(few, tmp_path_factory):
    return train(recipe_of(few), tmp_path_factory.mktemp("whole") / "run")


def test_skipped_steps_are_told_and_a_resumed_run_ends_the_same(few, undisturbed, broken, tmp_path):
    assert not any("skipped" in record for record in records(undisturbed))
    broken(nan_in(4, 6, 7))  # its checkpoint of step 6 stands within a row
    whole = train(recipe_of(few), tmp_path / "whole")
    run = cut(whole, tmp_path / "run", 6)
    train(recipe_of(few), run, resume=True)
    for mine, theirs in zip(end_of(run), end_of(whole), strict=True):
        assert_same(mine, theirs)
    assert records(run) == records(whole)
    steps = {r["step"]: r for r in records(whole) if r["kind"] == "step"}
    assert {n: r.get("skipped") for n, r in steps.items()} == {
        2: None, 4: 1, 5: None, 6: 1, 8: 1, 10: None
    }  # fmt: skip
    assert all(math.isfinite(r["loss"]) for n, r in steps.items() if n != 6)
    assert steps[6]["loss"] is None  # of no step
    told = "steps skipped until step 8: 1, the last from step 6 on, whose loss or gradients"
    assert [text for text in notes(whole) if told in text and "(rank 0: loss, kd, ce)" in text]


def test_one_row_too_long_and_it_goes_back_once_to_the_bytes_of_an_undisturbed_run(
    few, undisturbed, broken, tmp_path, capsys
):
    broken(nan_in(7, 8, 9), once=True)  # as a fault of the machine; step 8 is a checkpoint
    run = train(recipe_of(few), tmp_path / "run")
    told = [text for text in notes(run) if text.startswith("3 steps in a row were skipped, from")]
    assert (
        len(told) == 1
        and "step 7 on" in told[0]
        and "the run goes back, once\nimages of" in told[0]
    )
    assert "resumed from step-00000006" in notes(run)
    (state, facts), (theirs, their_facts) = end_of(run), end_of(undisturbed)
    assert facts.pop("went_back") == 7 and their_facts.pop("went_back") is None
    assert facts == their_facts
    assert_same(state, theirs)
    assert records(run) == records(undisturbed)
    kept = {path.name for path in (run / "checkpoints").iterdir()}
    assert kept == {path.name for path in (undisturbed / "checkpoints").iterdir()}


def test_it_goes_on_at_a_lower_rate_if_asked_killed_or_not(few, broken, tmp_path):
    recipe = recipe_of(few, optim={"rollback_lr": 0.5})
    broken(nan_in(5, 6, 7), once=True)
    whole = train(recipe, tmp_path / "whole")
    assert last(whole, "epoch")["lr"] == 0.025
    run = cut(whole, tmp_path / "run", 4)
    train(recipe, run, resume=True)
    for mine, theirs in zip(end_of(run), end_of(whole), strict=True):
        assert_same(mine, theirs)
    assert records(run) == records(whole)


def test_the_second_time_it_stops_and_names_step_rank_terms_and_images(few, broken, tmp_path):
    rows = broken(nan_in(7, 8, 9))
    recipe = recipe_of(few)
    with pytest.raises(Diverged) as stopped:
        train(recipe, tmp_path / "run")
    said, *images = str(stopped.value).split("\n")
    assert said.startswith(
        "3 steps in a row were skipped, from step 7 on, whose loss or gradients are not finite "
        "(rank 0: loss, kd, ce): stopped, checkpoints before it are kept; lower optim.lr"
    )
    manifest = open_source(recipe.data, "train")
    names = [f"  {manifest.name(row)}" for row in rows[7]]
    assert images == ["images of step 7 on rank 0:", *names]
    # Killed and resumed it does not begin to go back anew.
    facts = load(tmp_path / "run" / "checkpoints" / "step-00000006")[1]
    assert facts["went_back"] == 7
    before = notes(tmp_path / "run")
    with pytest.raises(Diverged, match="3 steps in a row were skipped, from step 7 on"):
        train(recipe, tmp_path / "run", resume=True)
    assert [text for text in notes(tmp_path / "run") if "goes back" in text] == [
        text for text in before if "goes back" in text
    ]
    # What follows may be allowed more.
    train(recipe_of(few, optim={"skip_limit": 3}), tmp_path / "run", resume=True)


def test_where_only_gradients_are_broken_it_stops_with_the_images_too(few, broken, tmp_path):
    rows = broken(dict.fromkeys((1, 2, 3), GRADIENTS))
    recipe = recipe_of(few)
    with pytest.raises(
        Diverged, match=r"step 1 on.*\(every term of the loss is finite\)"
    ) as stopped:
        train(recipe, tmp_path / "run")
    manifest = open_source(recipe.data, "train")
    names = [f"  {manifest.name(row)}" for row in rows[1]]
    assert str(stopped.value).split("\n")[1:] == ["images of step 1 on rank 0:", *names]


def test_it_waits_for_the_checkpoint_that_is_being_written(
    few, undisturbed, broken, tmp_path, monkeypatch
):
    save = checkpoint.save

    def slowly(*given, **options):
        time.sleep(0.5)
        return save(*given, **options)

    monkeypatch.setattr(checkpoint, "save", slowly)
    broken(nan_in(7, 8, 9), once=True)
    run = train(recipe_of(few, run={"checkpoint_every": 6}), tmp_path / "run")
    assert "resumed from step-00000006" in notes(run)
    assert_same(end_of(run)[0], end_of(undisturbed)[0])


def test_it_goes_back_to_a_checkpoint_that_counted_no_skips(few, undisturbed, broken, tmp_path):
    run = cut(undisturbed, tmp_path / "run", 6)
    state, facts = load(run / "checkpoints" / "step-00000006")
    for held, name in ((state, "faults"), (facts, "losses"), (facts, "went_back")):
        del held[name]  # as an earlier version left it
    checkpoint.save(run / "checkpoints", "step-00000006", state, facts, keep=9)
    broken(nan_in(7, 8, 9), once=True)
    train(recipe_of(few), run, resume=True)
    assert "the run goes back, once" in "".join(notes(run))
    assert_same(end_of(run)[0], end_of(undisturbed)[0])


def test_it_can_be_told_to_stop_after_it_went_back(few, broken, tmp_path, monkeypatch):
    recipe = recipe_of(few, optim={"rollback_lr": 0.5})
    broken(nan_in(7, 8, 9), once=True)
    whole = train(recipe, tmp_path / "whole")
    broken(nan_in(7, 8, 9), once=True)
    begin, seen = State.begin, []

    def stopped(state, *given):
        begin(state, *given)
        seen.append(state.done + 1)
        if seen.count(9) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(State, "begin", stopped)
    with pytest.raises(Stopped, match="stopped by SIGTERM"):
        train(recipe, tmp_path / "run")
    assert seen == [*range(1, 11), 7, 8, 9]
    monkeypatch.setattr(State, "begin", begin)
    train(recipe, tmp_path / "run", resume=True)
    for mine, theirs in zip(end_of(tmp_path / "run"), end_of(whole), strict=True):
        assert_same(mine, theirs)
    assert last(tmp_path / "run", "epoch")["lr"] == 0.025


def of_two(recipe, folder):
    """What each of two processes is told; the second one's batches alone are broken."""
    group = join("cpu")
    rows = break_steps(nan_in(7, 8, 9) if group.rank else {})
    with pytest.raises(Diverged) as stopped:
        train(recipe, folder / "run")
    (folder / f"{group.rank}.json").write_text(json.dumps([str(stopped.value), rows[7]]))


def test_two_processes_go_back_and_stop_together(few, tmp_path):
    recipe = recipe_of(few, run={"batch": 15})
    together(2, of_two, recipe, tmp_path)
    (said, _), (also, rows) = (
        json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)
    )
    assert said == also
    said, *images = said.split("\n")
    assert "from step 7 on" in said and "(rank 1: loss, kd, ce): stopped" in said
    manifest = open_source(recipe.data, "train")
    names = [f"  {manifest.name(row)}" for row in rows]
    assert images == ["images of step 7 on rank 1:", *names] and len(names) == 8  # of 15
    assert [text for text in notes(tmp_path / "run") if "the run goes back, once" in text]


def test_where_there_is_no_checkpoint_it_stops(few, broken, tmp_path):
    broken(nan_in(2, 3, 4))
    with pytest.raises(Diverged, match="3 steps in a row were skipped, from step 2 on"):
        train(recipe_of(few), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]


def test_a_spike_and_an_accuracy_that_is_gone_are_in_the_log(digits, broken, tmp_path):
    broken({40: 1e3, 41: 1e6, 42: 1e6})
    changes = {"data": {"subset": None}, "run": {"log_every": 3, "eval_every": 1}}
    run = train(tiny(digits, "ce", optim={"lr": 0.1}, **changes), tmp_path / "run")
    assert read(run / "log.jsonl")[-1]["best_epoch"] == 1
    spiked, gone = notes(run)
    assert spiked.startswith("until step 42 a spike: loss ")
    assert gone.startswith("epoch 2: top1 ") and " is chance level, after " in gone


def test_a_spike_is_one_beside_the_median_of_its_last_records():
    usual = [1.0, 2.0, 3.0, 2.5, 100.0, 1.5]  # a spike of before hardly moves their median, 2.25
    assert spike([*usual, 2.0], FACTOR * 2.0) is None
    assert spike([*usual, 2.0], FACTOR * 2.0 + 0.1) == "a spike: loss 8.1, 4.05 times its median 2"
    assert spike([*usual[:4], 100.0], 100.0) is None  # it began a record before
    assert spike([1.0] * (FEWEST - 1), 100.0) is None
    assert spike([-1.0] * RECORDS, 100.0) is None
    assert spike([1.0] * RECORDS, math.nan) is None


def test_chance_after_better_is_told():
    chance = chance_level(10)
    assert chance == 15.0 and chance_level(1000) == pytest.approx(0.15)
    assert fallen("top1", 15.0, 15.0, chance) is None  # it was never better
    assert fallen("top1", 15.1, 60.0, chance) is None
    assert fallen("epoch 3: top1", 10.0, 60.0, chance) == (
        "epoch 3: top1 10.00 is chance level, after 60.00: look at the loss and optim.lr"
    )
    assert fallen("top1", math.nan, 60.0, chance) is None
