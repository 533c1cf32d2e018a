"""The files of a record that grows: whatever is forgotten and written again, in whatever parts."""

import random
from contextlib import suppress

import numpy as np
import pytest

from kdfuse.engine.cache import growing, shards
from kdfuse.engine.cache.growing import Growing
from kdfuse.engine.cache.shards import CacheError, Layout, look, rows_of, verify

BATCH, STEPS, VIEWS = 6, 5, 3
LAYOUT = Layout("digest", np.dtype([("x", "<i4", 2)]), VIEWS, STEPS, BATCH)
WORLDS = {1: [range(6)], 2: [range(4), range(4, 6)], 3: [range(2), range(2, 4), range(4, 6)]}


@pytest.fixture(autouse=True)
def short_shards(monkeypatch):
    monkeypatch.setattr(shards, "ROWS", 2 * BATCH)  # of 2, 2 and 1 steps


def none(view, steps):
    return {}


def rows(step, course):
    """What all places of a step say, in one course of training."""
    made = np.zeros(BATCH, LAYOUT.row)
    made["x"] = np.arange(BATCH)[:, None] * 1000 + step * 10 + course
    return made


def processes(folder, world):
    return [Growing(folder, LAYOUT, WORLDS[world], rank) for rank in range(world)]


def put(all_of_them, step, course):
    for one in all_of_them:
        one.put(step, rows(step, course)[one.part.start : one.part.stop])


def flushed(all_of_them, done):
    for one in all_of_them:
        one.flush()
    all_of_them[0].finish(done, none)


def steps_of(folder):
    """The rows of each step of a finished record."""
    found = []
    for view, steps in LAYOUT.shards():
        path = LAYOUT.path(folder, view, steps.start)
        verify(path, LAYOUT, view, steps)
        held = rows_of(path, LAYOUT, 0, len(steps) * BATCH)
        found += list(held.reshape(len(steps), BATCH))
    return found


class Killed(Exception):
    """The process ended here."""


@pytest.mark.parametrize("seed", range(20))
def test_a_record_is_of_the_last_course_however_often_it_was_begun_again(
    seed, tmp_path, monkeypatch
):
    """Killed at any step, or before or behind any change of the files, with any rows behind the
    last checkpoint on the disk or not, and gone on with from any checkpoint by any number of
    processes."""
    chance = random.Random(seed)

    def deadly(work):
        def done(*given):
            for act in (lambda: None, lambda: work(*given)):
                act()
                if chance.random() < 0.03:
                    raise Killed

        return done

    for name in ("write", "_remove"):
        monkeypatch.setattr(growing, name, deadly(getattr(growing, name)))
    course, done, wanted, total, ended = 0, 0, {}, VIEWS * STEPS, False
    while not ended:
        now, saved = processes(tmp_path, chance.choice(list(WORLDS))), [done]
        ends = chance.randint(done + 1, total + 6)
        with suppress(Killed):
            now[0].rewind(done, none)
            for step in range(done, min(ends, total)):
                put(now, step, course)
                wanted[step] = course
                if chance.random() < 0.4 or step + 1 == total:
                    for one in now:
                        one.flush()
                    saved.append(step + 1)  # by a thread, while the files are made
                    now[0].finish(step + 1, none)
            ended = ends >= total
        for one in now:
            one.drop()
        done = chance.choice(saved[-2:])
        course += 1
    found = steps_of(tmp_path)
    assert len(found) == total
    for step, held in enumerate(found):
        assert (held == rows(step, wanted[step])).all()
    assert {path.suffix for path in tmp_path.rglob("*.*")} == {".shard"}


def test_what_is_lost_before_a_checkpoint_is_named(tmp_path):
    now = processes(tmp_path, 2)
    for step in range(4):
        put(now, step, 0)
    flushed(now, 4)
    for step in (4, 5, 6, 7):
        put(now, step, 0)
    for one in now:
        one.flush()
    lost = tmp_path / "view-00001" / "00000.of-4-6"
    held = lost.read_bytes()
    lost.write_bytes(held[:-1])
    with pytest.raises(CacheError, match=r"lacks what was recorded from step 5 to 7 \(of .*00000"):
        processes(tmp_path, 2)[0].rewind(8, none)
    lost.write_bytes(held)
    now = processes(tmp_path, 1)
    now[0].rewind(8, none)
    shard = tmp_path / "view-00000" / "00001.shard"
    shard.write_bytes(shard.read_bytes()[:-3])
    with pytest.raises(CacheError, match="00001.shard: it is cut off"):
        processes(tmp_path, 1)[0].rewind(8, none)


def test_a_shard_says_which_images_could_not_be_read(tmp_path):
    (one,) = processes(tmp_path, 1)
    for step in range(STEPS):
        put([one], step, 0)
    one.flush()
    one.finish(STEPS, lambda view, steps: {steps.start: "cut"})
    path = LAYOUT.path(tmp_path, 0, 2)
    assert look(path, LAYOUT, 0, range(2, 4))["unreadable"] == {2: "cut"}
