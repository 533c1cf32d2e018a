"""Runs whose processes are killed at drawn moments: each ends in the bytes of one left alone."""

import random
import time
from functools import cache, partial
from importlib.util import find_spec
from itertools import product
from threading import Timer

import pytest
from processes import begin
from same import assert_same_run
from tiny import tiny

from kdfuse.engine.training.start import train

pytestmark = pytest.mark.slow(25)

STEPS = 20
LOADERS = ["torchvision"] + (["dali"] if find_spec("nvidia.dali") else [])
# Loader, processes, method, average, mixup: neighbours in the list differ in most, the first two,
# of one process and of two, in all.
KINDS = list(product(LOADERS, (1, 2, 3), ("kd", "slkd"), (None, 0.9), (0.0, 0.4)))
random.Random("kinds 162").shuffle(KINDS)


def recipe_of(root, loader, method, average, mixup):
    run = {"epochs": 2, "batch": 16, "log_every": 3, "checkpoint_every": 4, "keep": 9}
    data = {"subset": 16, "loader": loader, "mixup": mixup}
    optim = {"lr": 0.05, "ema": average, "schedule": "cosine"}
    return tiny(root, method, data=data, optim=optim, run={**run, "timeout": 30.0})


def attempt(recipe, out, world, victim=None, seconds=0.0):
    """Train in `world` processes, of which one is killed after so many seconds; their exit codes
    and what they said."""
    started, said = begin(world, partial(train, resume="auto"), recipe, out)
    if victim is not None:
        timer = Timer(seconds, started[victim].kill)
        timer.start()
    for child in started:
        child.join()
    if victim is not None:
        timer.cancel()
    return [child.exitcode for child in started], said()


@pytest.fixture(scope="module")
def alone(few, tmp_path_factory):
    """The finished run of a kind that nothing happened to, and the seconds that it took."""

    @cache
    def made(kind):
        loader, world, *rest = kind
        out, began = tmp_path_factory.mktemp("alone") / "run", time.monotonic()
        codes, said = attempt(recipe_of(few, loader, *rest), out, world)
        assert codes == [0] * world, said
        return out, time.monotonic() - began

    return made


@pytest.mark.cases(2, 25)
def test_killed_at_any_moment_it_ends_the_same(case, alone, few, tmp_path, pytestconfig):
    wanted = 4 if pytestconfig.getoption("--long") else 2  # kills
    chance = random.Random(f"kills {case}")
    kind = KINDS[case % len(KINDS)]
    loader, world, *rest = kind
    recipe, (whole, seconds) = recipe_of(few, loader, *rest), alone(kind)
    kills, number, finished = 0, 0, False
    while kills < wanted or not finished:
        if finished:
            number, finished = number + 1, False
        out, began = tmp_path / f"run{number}", time.monotonic()
        if kills < wanted:
            victim = chance.randrange(world)
            codes, said = attempt(recipe, out, world, victim, chance.uniform(0.2, 1) * seconds)
            assert codes[victim] in (-9, 0), said
            kills += codes[victim] == -9
        else:
            codes, said = attempt(recipe, out, world)
            assert codes == [0] * world, said
        finished = codes == [0] * world
        # The others of a process that was killed end by themselves, each with an error.
        assert finished or world == 1 or set(codes) <= {-9, 0, 1}, said
        if finished:
            assert_same_run(out, whole, STEPS)
            # What came before may have waited for a cold disk; a kill that comes later hits nobody.
            seconds = min(seconds, time.monotonic() - began)
