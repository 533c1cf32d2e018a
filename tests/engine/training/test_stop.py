"""A run that is stopped, by signals and by its time, and goes on: the bytes of one left alone."""

import operator
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from processes import CHILDREN, together
from same import assert_same_run
from tiny import tiny

from kdfuse.engine import Stopped
from kdfuse.engine.cli import main as cli
from kdfuse.engine.run import job
from kdfuse.engine.run.log import read
from kdfuse.engine.training.classification import Classification
from kdfuse.engine.training.meters import Meters
from kdfuse.engine.training.peers import PeerError
from kdfuse.engine.training.ranks import join
from kdfuse.engine.training.start import train
from kdfuse.engine.training.stop import SIGNALS

pytestmark = pytest.mark.slow(50)

STEPS = 20


def recipe_of(root, **run):
    """Two epochs of ten steps, with a checkpoint after each epoch alone."""
    run = {"epochs": 2, "batch": 16, "log_every": 3, "keep": 9, **run}
    return tiny(root, "kd", data={"subset": 16}, optim={"lr": 0.05, "ema": 0.9}, run=run)


@pytest.fixture(scope="module")
def whole(few, tmp_path_factory):
    """The run that nothing happened to."""
    return train(recipe_of(few), tmp_path_factory.mktemp("whole") / "run")


def checkpoints(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def last_note(run):
    """The last record, a note."""
    record = read(run / "log.jsonl")[-1]
    assert record["kind"] == "note"
    return record["text"]


def told(name, step):
    return f"stopped by {name}, resume=true goes on from step-{step:08d}"


def in_step(number, act):
    """Have `act` called in a step of this process's runs, when its batch is done."""
    step = Classification.step

    def with_act(self, batch):
        terms = step(self, batch)
        if self.state.done + 1 == number:
            act()
        return terms

    Classification.step = with_act


def send(*numbers):
    for number in numbers:
        os.kill(os.getpid(), number)


def child(recipe, out, step, seconds, numbers):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell may have ignored
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # as below a torchrun that is to live on
    act = partial(send, *numbers)
    in_step(step, threading.Timer(seconds, act).start if seconds else act)
    train(recipe, out, resume="auto")


def attempt(recipe, out, step=0, numbers=(), seconds=0.0):
    """Train in a process that sends itself signals in a step, or a while after: its exit code."""
    process = CHILDREN.Process(target=child, args=(recipe, out, step, seconds, numbers))
    process.start()
    process.join()
    return process.exitcode


def test_told_at_any_moment_it_saves_once_and_ends_the_same(few, whole, tmp_path):
    chance, out = random.Random("stop"), tmp_path / "run"
    step, before = 0, set()
    for number, code in ((signal.SIGTERM, 143), (signal.SIGUSR1, 143), (signal.SIGINT, 130)):
        told_in, seconds = step + 3, chance.uniform(0.001, 0.05)
        assert attempt(recipe_of(few), out, told_in, [number], seconds) == code
        step = int(last_note(out)[-8:])
        assert step >= told_in and last_note(out) == told(number.name, step)
        new = set(checkpoints(out)) - before - {"best"}
        # The end of an epoch has one in any case.
        assert new - {"step-00000010"} <= {f"step-{step:08d}"} <= new
        before |= new
    assert attempt(recipe_of(few), out) == 0
    assert_same_run(out, whole, STEPS)


@pytest.mark.parametrize("step", [10, STEPS])
def test_at_the_end_of_an_epoch_the_evaluation_is_left_for_later(step, few, whole, tmp_path):
    out = tmp_path / "run"
    assert attempt(recipe_of(few), out, step, [signal.SIGTERM]) == 143
    assert last_note(out) == told("SIGTERM", step)
    assert f"step-{step:08d}" in checkpoints(out) and not (out / "report.html").exists()
    evaluated = [record["step"] for record in read(out / "log.jsonl") if record["kind"] == "epoch"]
    assert evaluated == list(range(10, step, 10))
    assert attempt(recipe_of(few), out) == 0
    assert_same_run(out, whole, STEPS)


def test_a_second_signal_ends_it_at_once(few, tmp_path):
    out = tmp_path / "run"
    twice = [signal.SIGUSR1, signal.SIGTERM]
    assert attempt(recipe_of(few), out, 4, twice) == -signal.SIGTERM
    assert not (out / "checkpoints").exists()
    assert [r["kind"] for r in read(out / "log.jsonl")] == ["start", "step"]


@pytest.fixture
def in_the_background():
    """Ctrl-C is not for this process, says the shell."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


def test_what_takes_signals_is_put_back_and_left_alone_in_threads(
    few, tmp_path, monkeypatch, in_the_background
):
    before = [signal.getsignal(number) for number in SIGNALS]
    seen = []
    monkeypatch.setattr(Classification, "step", Classification.step)
    in_step(1, lambda: seen.append([signal.getsignal(number) for number in SIGNALS]))
    recipe = recipe_of(few, epochs=1, batch=160)
    train(recipe, tmp_path / "here")
    thread = threading.Thread(target=train, args=(recipe, tmp_path / "thread"))
    thread.start()
    thread.join()
    here, of_thread = seen
    taken = dict(zip(SIGNALS, map(operator.ne, here, before), strict=True))
    assert taken == {signal.SIGTERM: True, signal.SIGUSR1: True, signal.SIGINT: False}
    assert of_thread == before
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert (tmp_path / "thread" / "report.html").exists()


def test_time_that_is_up_stops_it_with_a_step_done(few, whole, tmp_path):
    out = tmp_path / "run"
    for step in (1, 2):
        with pytest.raises(Stopped, match=r"stopped by run\.time_limit") as caught:
            train(recipe_of(few, time_limit=1), out, resume="auto")  # all of it is reserve
        assert caught.value.code == 143
        assert last_note(out) == told("run.time_limit", step)
    train(recipe_of(few), out, resume="auto")
    assert_same_run(out, whole, STEPS)


def age(pipe):
    pipe.send(job.age())


def test_a_process_knows_its_age(monkeypatch):
    reader, writer = CHILDREN.Pipe(duplex=False)
    begun = time.monotonic()
    process = CHILDREN.Process(target=age, args=(writer,))
    process.start()
    assert (
        -0.02 <= reader.recv() <= time.monotonic() - begun + 0.02
    )  # clocks tick 100 times a second
    process.join()
    own = job.age()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")  # then it is that of the process above
    assert job.age() >= own


# Two processes.


def ranks_recipe(root):
    return recipe_of(root, checkpoint_every=4)


def one_of_two(root, folder):
    """A run left alone, and one of which a signal to one process stops both, after the same step:
    the one after that of the signal. It is looked for in the wrong place, and goes on."""
    train(ranks_recipe(root), folder / "whole")
    if os.environ["RANK"] == "1":
        in_step(5, partial(send, signal.SIGUSR1))
    with pytest.raises(Stopped) as caught:
        train(ranks_recipe(root), folder / "one")
    assert caught.value.code == 143 and caught.value.why == "SIGUSR1"
    elsewhere(root, folder)
    to_the_end(root, folder, "one")


def elsewhere(root, folder):
    """The second process is in another place, and the folder's name is relative."""
    place = folder / os.environ["RANK"]
    place.mkdir()
    os.chdir(place)
    if os.environ["RANK"] == "0":
        shutil.copytree(folder / "one", place / "run")
    with pytest.raises(PeerError, match="process 1: checkpoint .*step-00000006: no such folder"):
        train(ranks_recipe(root), "run", resume=True)


def to_the_end(root, folder, name):
    train(ranks_recipe(root), folder / name, resume=True)


@pytest.fixture(scope="module")
def two(few, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    together(2, one_of_two, few, folder)
    return folder


def test_a_signal_to_one_of_two_stops_both(two):
    stopped = two / "0" / "run"
    assert last_note(stopped) == told("SIGUSR1", 6)
    assert checkpoints(stopped) == ["step-00000004", "step-00000006"]
    assert_same_run(two / "one", two / "whole", STEPS)


def sums():
    """A mean does not hang on whether and when a checkpoint is made."""
    group = join("cpu")
    found = []
    for every in (100, 7):
        chance, meters = torch.Generator().manual_seed(group.rank), Meters(group)
        for step in range(1, 61):
            loss = torch.randn((), dtype=torch.float64, generator=chance).exp()
            meters.add(torch.tensor(step), {"loss": loss, "rows": torch.ones(())})
            if step % every == 0:
                state, meters = meters.state_dict(), Meters(group)
                meters.load_state_dict(state)
        found.append(meters.read())
    assert found[0] == found[1]


def test_sums_of_two_are_kept_apart():
    together(2, sums)


def under_torchrun():
    """The command line, whose second process kills itself in its first life; in the second one
    torchrun is told to stop."""
    if not job.restarted() and os.environ["RANK"] == "1":
        in_step(7, partial(send, signal.SIGKILL))
    if job.restarted() and os.environ["RANK"] == "0":
        in_step(17, tell_torchrun)
    cli.main()


def tell_torchrun():
    """And wait until it has handed that on."""
    os.kill(os.getppid(), signal.SIGTERM)
    stop = signal.getsignal(signal.SIGTERM).__self__
    while not stop._signal:
        time.sleep(0.01)


def test_torchrun_starts_it_again_and_stops_it(two, few):
    (two / "tiny.yaml").write_text(ranks_recipe(few).explain())
    words = ["--standalone", "--nproc-per-node=2", "--max-restarts=1", __file__, "train"]
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words, "tiny.yaml"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        cwd=two,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode != 0 and "resumed from step-00000004" in done.stdout, done.stderr
    assert [path.name for path in (two / "runs").iterdir()] == ["tiny-1"]
    run = two / "runs" / "tiny-1"
    assert last_note(run) == told("SIGTERM", 18)
    together(2, to_the_end, few, two, Path("runs") / "tiny-1")
    assert_same_run(run, two / "whole", STEPS)


if __name__ == "__main__":
    under_torchrun()
