"""One process at a time trains in a folder: of one machine, of several, at once, one after another.

Another machine is a lease with another host's name: what it decides by is all that is written there
and whether it changes.
"""

import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack

import pytest
from processes import CHILDREN, together
from tiny import tiny

from kdfuse.engine.run import lease
from kdfuse.engine.run.lease import NAME, Lease, LeaseLost, held
from kdfuse.engine.run.log import RunLog, read
from kdfuse.engine.training.start import train

pytestmark = pytest.mark.slow(8)

# The file alone: nothing of it needs PyTorch, which takes seconds to import.
HOLDER = f"""
import sys
from pathlib import Path
sys.path.append({os.path.dirname(lease.__file__)!r})
import lease
folder, keeper, lease.RENEWED = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
if len(sys.argv) > 4:
    lease.socket.gethostname = lambda: sys.argv[4]
with lease.held(folder) if keeper == "held" else lease.Lease(folder, 1):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holding(tmp_path):
    """Starts a process that holds tmp_path until its standard input ends."""
    started = []

    def start(keeper="held", renewed=15.0, host=()):
        words = [sys.executable, "-c", HOLDER, str(tmp_path), keeper, str(renewed), *host]
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


@pytest.fixture
def watched(monkeypatch):
    """A watch that ends soon where nothing changes, or one that ends by a change alone."""

    def set_to(looks):
        monkeypatch.setattr(lease, "LOOKS", looks)
        monkeypatch.setattr(lease, "PAUSE", 0.01)

    return set_to


@functools.cache
def ended():
    """The number of a process that is gone."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def written(folder, **changes):
    """A lease as a process of this machine that is gone would have left it, or another's."""
    facts = {"pid": ended(), "start": "1", "since": "yesterday", "token": "0" * 32, **changes}
    (folder / NAME).write_text(json.dumps({**lease._machine(), **facts}))
    return facts


@pytest.mark.parametrize("keeper", ["held", "Lease"])  # with and without flock
def test_a_living_process_of_this_machine_is_named(keeper, holding, tmp_path):
    process = holding(keeper)
    since = json.loads((tmp_path / NAME).read_text())["since"]
    who = f"process {process.pid} on {socket.gethostname()}, there since {since}"
    with pytest.raises(ValueError, match=f"another process is training there.*{who}"):
        with held(tmp_path):
            pass
    assert time.strptime(since, "%Y-%m-%d %H:%M:%S UTC")
    process.stdin.close()
    assert process.wait() == 0
    assert not (tmp_path / NAME).exists()
    with held(tmp_path) as mine:
        assert mine.notes == []


@pytest.mark.parametrize("reaped", [True, False])  # unreaped, its number still stands for it
def test_after_kill_9_the_same_machine_goes_on_at_once(reaped, holding, tmp_path, capsys):
    process = holding()
    process.send_signal(signal.SIGKILL)
    if reaped:
        process.wait()
    else:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert (tmp_path / NAME).exists()
    with held(tmp_path) as mine:
        assert "watching" not in capsys.readouterr().out
        (note,) = mine.notes
        assert f"took the folder over from process {process.pid} on" in note
        assert "that process is gone" in note
        assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_a_number_that_came_back_is_another_process(tmp_path):
    written(tmp_path, pid=os.getpid())
    with held(tmp_path) as mine:
        assert "that process is gone" in mine.notes[0]
    written(tmp_path, pid=os.getpid(), start=lease._status(os.getpid())[1])
    with pytest.raises(ValueError, match=f"process {os.getpid()} on"):
        with held(tmp_path):
            pass


@pytest.mark.parametrize("away", [-1e9, 0.0, 1e9])  # the other machine's clock, seconds
def test_a_lease_of_another_machine_that_stands_still_is_stale(away, watched, tmp_path, capsys):
    watched(looks=3)
    facts = written(tmp_path, host="node7")
    now = time.time() + away
    os.utime(tmp_path / NAME, (now, now))
    with held(tmp_path) as mine:
        who = f"process {facts['pid']} on node7, there since yesterday"
        assert f"watching for 0.03 s whether {who} is alive" in capsys.readouterr().out
        assert mine.notes == [
            f"took the folder over from {who}: it did not renew its lease for 0.03 s"
        ]


def test_a_lease_of_another_machine_that_is_renewed_holds(holding, watched, tmp_path):
    process = holding("Lease", 0.05, ["node7"])
    watched(looks=10**9)  # a renewal ends it
    with pytest.raises(ValueError, match=f"training there .process {process.pid} on node7"):
        with held(tmp_path):
            pass
    process.stdin.close()
    assert process.wait() == 0


def test_a_renewal_by_a_clock_that_was_set_back_counts(watched, tmp_path):
    watched(looks=10**9)
    written(tmp_path, host="node7")
    ended = threading.Event()

    def renew():
        moment = time.time()
        while not ended.wait(0.02):
            moment -= 3600
            os.utime(tmp_path / NAME, (moment, moment))

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(ValueError, match="another process is training there"):
            with held(tmp_path):
                pass
    finally:
        ended.set()
        thread.join()


def test_a_lease_that_is_let_go_while_it_is_watched(watched, tmp_path, monkeypatch):
    watched(looks=10**9)
    written(tmp_path, host="node7")
    timer = threading.Timer(0.1, (tmp_path / NAME).unlink)
    timer.start()
    with held(tmp_path) as mine:
        assert mine.notes == []
    timer.join()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[" * 4000,
        "[]",
        '{"pid": 1e999, "token": "' + "0" * 32 + '"}',
        '{"pid": 4, "token": "../../etc"}',
        '{"pid": -1, "token": 3}',
    ],
)
def test_what_no_lease_says_is_watched_too(text, watched, tmp_path):
    watched(looks=2)
    (tmp_path / NAME).write_text(text)
    with held(tmp_path) as mine:
        assert "took the folder over from the unknown owner of lease.json" in mine.notes[0]


def test_it_is_renewed_and_let_go(monkeypatch, tmp_path):
    monkeypatch.setattr(lease, "RENEWED", 0.01)
    with pytest.raises(KeyError), held(tmp_path) as mine:
        path = tmp_path / NAME
        facts, before = json.loads(path.read_text()), path.stat().st_mtime_ns
        assert facts["pid"] == os.getpid() and facts["host"] == socket.gethostname()
        while path.stat().st_mtime_ns == before:
            time.sleep(0.01)
        mine.check()
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_a_lease_that_another_took_over_is_lost_and_left_alone(tmp_path):
    with held(tmp_path) as mine:
        mine.check()
        aside = tmp_path / "aside"
        aside.mkdir()
        written(aside, host="node7")
        os.replace(aside / NAME, tmp_path / NAME)
        with pytest.raises(LeaseLost, match="process .* on node7.* has taken it over; stopped"):
            mine.check()
    assert json.loads((tmp_path / NAME).read_text())["host"] == "node7"


def test_an_heir_is_the_holder_before_it_is_renamed(tmp_path):
    with held(tmp_path) as mine:
        heir = Lease(tmp_path, 1)
        assert heir._create(tmp_path / f"{NAME}.{mine.token}")
        os.close(heir._file)
        with pytest.raises(LeaseLost, match=f"process {os.getpid()} on"):
            mine.check()
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_that_was_removed_is_lost(tmp_path):
    folder = tmp_path / "run"
    with held(folder) as mine:
        shutil.rmtree(folder)
        with pytest.raises(LeaseLost, match=r"its lease.json is gone"):
            mine.check()
    assert not folder.exists()


def hold(folder):
    with held(folder):
        pass


def test_a_folder_in_use_is_not_shared(tmp_path):
    with held(tmp_path), pytest.raises(AssertionError, match="another process is training there"):
        together(1, hold, tmp_path)
    together(1, hold, tmp_path)


ROUNDS, RACERS = 40, 4


def race(folders, own_host, gate, results):
    """Try for each folder at the same time as the others; the winner holds it until all tried."""
    lease.LOOKS, lease.PAUSE, judged = 10**9, 0.001, lease._why_gone
    if own_host:

        def patient(found):
            """Watches a racer until it is renewed, however long that takes here."""
            lease.LOOKS = 5 if found.facts.get("host") == "node7" else 10**9
            return judged(found)

        lease._why_gone, lease.RENEWED = patient, 0.001
        lease.socket.gethostname = lambda: f"racer{os.getpid()}"
    for folder in folders:
        gate.wait()
        outcome, mine = "won", Lease(folder, 1)  # without flock, as on a file system that has none
        with ExitStack() as stack:
            try:
                stack.enter_context(mine)
            except ValueError:
                outcome = "refused"
            gate.wait()
            try:
                if outcome == "won":
                    mine.check()
            except LeaseLost as error:
                outcome = str(error)
            results.put((folder.name, outcome))
            gate.wait()


def nothing(folder):
    pass


def dead(folder):
    written(folder)


def dead_with_heirs(folder):
    """Two that took over died before they were done."""
    facts = written(folder)
    for heir in ("1" * 32, "2" * 32):
        os.replace(folder / NAME, folder / "first")
        written(folder, token=heir)
        os.replace(folder / NAME, folder / f"{NAME}.{facts['token']}")
        os.replace(folder / "first", folder / NAME)
        facts["token"] = heir


def elsewhere(folder):
    written(folder, host="node7")


@pytest.mark.parametrize(
    ("before", "own_host"),
    [(nothing, False), (dead, False), (dead_with_heirs, False), (nothing, True), (elsewhere, True)],
)
def test_of_several_that_start_at_once_one_wins(before, own_host, tmp_path):
    rounds = ROUNDS // 4 if own_host else ROUNDS
    folders = [tmp_path / str(number) for number in range(rounds)]
    for folder in folders:
        folder.mkdir()
        before(folder)
    gate, results = CHILDREN.Barrier(RACERS), CHILDREN.SimpleQueue()
    words = (folders, own_host, gate, results)
    racers = [CHILDREN.Process(target=race, args=words) for _ in range(RACERS)]
    for racer in racers:
        racer.start()
    told = [results.get() for _ in range(rounds * RACERS)]
    for racer in racers:
        racer.join()
    for folder in folders:
        found = sorted(what for name, what in told if name == folder.name)
        assert found == ["refused"] * (RACERS - 1) + ["won"], folder
        assert list(folder.iterdir()) == []


@pytest.mark.parametrize("after", ["running", "ended"])
def test_a_judgement_that_came_too_late_takes_nothing_over(after, tmp_path, monkeypatch):
    """Between the look at a dead lease and its heir another was here, and is or is not yet."""
    written(tmp_path)
    judged = lease._why_gone

    def slow(found):
        why = judged(found)
        if found.token == "0" * 32 and (tmp_path / NAME).exists():
            (tmp_path / NAME).unlink()
            if after == "running":
                started = lease._status(os.getpid())[1]
                written(tmp_path, pid=os.getpid(), start=started, token="1" * 32)
        return why

    monkeypatch.setattr(lease, "_why_gone", slow)
    if after == "running":
        with pytest.raises(ValueError, match="another process is training there"), held(tmp_path):
            pass
        assert json.loads((tmp_path / NAME).read_text())["token"] == "1" * 32
    else:
        with held(tmp_path) as mine:
            assert mine.notes == []
    assert len(list(tmp_path.iterdir())) == (after == "running")


@pytest.mark.parametrize("loss", ["another", "removed"])
def test_a_run_ends_where_it_loses_its_folder(loss, digits, tmp_path, monkeypatch):
    run, step = tmp_path / "run", RunLog.step

    def then_lost(log, number, *values):
        step(log, number, *values)
        if number == 4 and loss == "another":
            (tmp_path / "aside").mkdir()
            written(tmp_path / "aside", host="node7")
            os.replace(tmp_path / "aside" / NAME, run / NAME)
        elif number == 4:
            shutil.rmtree(run)

    monkeypatch.setattr(RunLog, "step", then_lost)
    with pytest.raises(LeaseLost, match="node7" if loss == "another" else "is gone"):
        train(tiny(digits), run)
    if loss == "another":
        assert read(run / "log.jsonl")[-1]["step"] == 4
        assert not (run / "checkpoints").exists()
        assert json.loads((run / NAME).read_text())["host"] == "node7"


def test_a_run_says_from_whom_it_took_over(digits, tmp_path):
    run = train(tiny(digits, run={"epochs": 1}), tmp_path / "run")
    assert not (run / NAME).exists()
    facts = written(run)
    train(tiny(digits, run={"epochs": 1}), run, resume=True)
    notes = [record["text"] for record in read(run / "log.jsonl") if record["kind"] == "note"]
    assert any(f"from process {facts['pid']} on" in note for note in notes)
