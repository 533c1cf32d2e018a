"""Processes that agree, wait for each other, and say who failed: each fault is a real one."""

import os
import shutil
import signal
import socket
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import begin
from processes import together as processes
from tiny import tiny

from kdfuse.engine.training import rendezvous
from kdfuse.engine.training.classification import Classification
from kdfuse.engine.training.peers import (
    PeerError,
    agree,
    from_first,
    named_failures,
    together,
    told,
)
from kdfuse.engine.training.ranks import join
from kdfuse.engine.training.start import train

pytestmark = pytest.mark.slow(30)


FEW = {"subset": 8}


def recipe_of(folder, **run):
    """Ten steps of two epochs, a checkpoint each third."""
    run = {"batch": 16, "checkpoint_every": 3, "keep": 9, **run}
    return tiny(folder / "digits", "kd", data=FEW, run=run)


def caught(kind, work, *arguments):
    with pytest.raises(kind) as failure:
        work(*arguments)
    return str(failure.value)


def fails(rank, error):
    def work():
        if dist.get_rank() == rank:
            raise error
        return dist.get_rank()

    return work


def talk(folder):
    """What three processes say in turn, each kept for the test."""
    group = join("cpu")
    rank, found = group.rank, {}
    time.sleep(0.2 * rank)
    found["told"] = told(group, {"rank": rank, "text": "é"}, "counting")
    found["first"] = from_first(group, rank + 7, "counting")
    found["together"] = together(group, "working", lambda: rank * 2)
    missing = FileNotFoundError(2, "No such file", "/data/train")
    found["missing"] = caught(PeerError, together, group, "opening", fails(1, missing))
    bug = KeyError("x")
    found["bug"] = caught(
        KeyError if rank == 2 else PeerError, together, group, "opening", fails(2, bug)
    )
    agree(group, "the weather", lambda: {"sun": 1, "run.keep": rank})  # which may differ
    wind = {"sun": 1, "wind": "west" if rank < 2 else "east"}
    found["wind"] = caught(PeerError, agree, group, "the weather", lambda: wind)
    torch.save(found, folder / f"{rank}.pt")


def test_words(tmp_path):
    processes(3, talk, tmp_path)
    said = [torch.load(tmp_path / f"{rank}.pt") for rank in range(3)]
    for rank, found in enumerate(said):
        assert found["told"] == [{"rank": r, "text": "é"} for r in range(3)]
        assert found["first"] == 7 and found["together"] == 2 * rank
        assert found["missing"] == "opening: process 1: [Errno 2] No such file: '/data/train'"
        assert found["bug"] == ("'x'" if rank == 2 else "opening: process 2: KeyError: 'x'")
        assert (
            "the weather (process 0 -> another):\n  process 2: wind: west -> east" in found["wind"]
        )


def test_one_process_says_nothing():
    group = join("cpu")
    assert told(group, 1, "x") == [1] and together(group, "x", lambda: 5) == 5
    agree(group, "x", lambda: 1 / 0)
    with pytest.raises(RuntimeError, match="^gloo$"), named_failures(group, lambda: "x"):
        raise RuntimeError("gloo")


def waits(folder, kind):
    """Two processes wait for a third one in words, and keep why they no longer do."""
    group = join("cpu", 4.0)

    def work():
        if group.rank == 1:
            SILENCES[kind]()

    said = caught(PeerError, together, group, "counting", work)
    (folder / str(group.rank)).write_text(said)


SILENCES = {"dead": lambda: os._exit(9), "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP)}


@pytest.mark.parametrize("kind", SILENCES)
def test_nobody_waits_for_one_that_is_gone(tmp_path, kind):
    processes(3, waits, tmp_path, kind, lost=1)
    for rank in (0, 2):
        assert (tmp_path / str(rank)).read_text() == (
            f"process 1 has ended or hangs: process {rank} waited for it, counting, and saw no "
            "sign of life for 4 s (run.timeout)"
        )


def frozen_first(folder, where):
    """The process that keeps the store stops; the other one waits, in words or in a step."""
    group = join("cpu", 4.0)
    os.dup2(os.open(folder / f"said{group.rank}", os.O_WRONLY | os.O_CREAT), 2)
    stop = partial(os.kill, os.getpid(), signal.SIGSTOP)
    if where == "words":
        together(group, "counting", stop if group.first else lambda: None)
    at_step(3, 0, stop)
    train(recipe_of(folder), folder / "run")


@pytest.mark.parametrize("where", ["words", "step"])
def test_one_that_hangs_with_the_store_ends_the_others(few, tmp_path, where):
    (tmp_path / "digits").symlink_to(few)
    started, said = begin(2, frozen_first, tmp_path, where)
    started[1].join()
    started[0].kill()
    assert started[1].exitcode == 2, said()
    text = (tmp_path / "said1").read_text()
    assert "error: process 0 hangs, or torchrun on its machine: process 1 waited, " in text
    assert "has not answered for 4 s (run.timeout)" in text
    assert ("counting" if where == "words" else "step 3, to hear who failed") in text


def test_who_comes_alone_is_told(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(rendezvous, "JOINING", 0.5)
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_PORT", str(port))):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(rendezvous.NobodyMet, match=rf"process 0 .* 127.0.0.1:{port} .* within 1 s"):
        join("cpu", 1.0)
    monkeypatch.setenv("RANK", "x")
    with pytest.raises(ValueError, match="RANK='x' in the environment: wants a number from 0"):
        join("cpu", 1.0)


def works_long(rank):
    group = join("cpu", 2.0)
    assert together(group, "counting", lambda: group.rank == rank and not time.sleep(5)) in (0, 1)
    again = join("cpu", 2.0)  # which shows it once more
    assert told(again, group.rank, "counting") == [0, 1]
    group.wait()  # for whoever reads what the first one keeps


@pytest.mark.parametrize("rank", [0, 1])
def test_one_that_works_is_waited_for_beyond_the_limit(rank):
    processes(2, works_long, rank)


def disks(folder):
    """Runs whose processes do not see the same: what all of them say."""
    rank = join("cpu").rank
    found = {}
    disk = folder / f"disk{rank}"  # where the same name means another folder
    shutil.copytree(folder / "run", disk / "run")
    if rank == 1:  # has the checkpoint before
        shutil.rmtree(disk / "run" / "checkpoints" / "step-00000006")
    os.chdir(disk)
    found["missing"] = caught(PeerError, train, recipe_of(folder), Path("run"), True)
    other = recipe_of(folder, epochs=2 + rank, stop_epoch=2)
    found["recipe"] = caught(PeerError, train, other, folder / "new")
    moved = tiny(folder / f"digits{'' if rank == 0 else '-other'}", "kd", data=FEW)
    found["data"] = caught(PeerError, train, moved, folder / "new")
    torch.save(found, folder / f"{rank}.pt")


def test_processes_that_differ_end_before_the_first_step(few, tmp_path):
    (tmp_path / "digits").symlink_to(few)
    other = shutil.copytree(few, tmp_path / "digits-other")
    min((other / "train" / "3").iterdir()).unlink()
    train(recipe_of(tmp_path), tmp_path / "run")
    for name in ("step-00000009", "step-00000010"):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / name)
    processes(2, disks, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first == second
    assert "process 1: checkpoint" in first["missing"]
    assert "step-00000006: no such folder" in first["missing"]
    assert "process 1: run.epochs: 2 -> 3" in first["recipe"]
    assert "process 1: training images:" in first["data"]
    assert not (tmp_path / "new").exists()


def at_step(number, rank, fault):
    """A process in whose step so many something happens."""
    steps, usual = [0], Classification.step

    def step(self, batch):
        steps[0] += 1
        if steps[0] == number and self.group.rank == rank:
            fault()
        return usual(self, batch)

    Classification.step = step


def broken():
    raise ValueError("the fourth batch is broken")


FAULTS = {
    "dead": lambda: os._exit(9),
    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "failed": broken,
}


def faulty(folder, kind):
    """A run of which one process fails in step 4; the other keeps what it says, and ends both."""
    group = join("cpu", 4.0)
    at_step(4, 1, FAULTS[kind])
    try:
        train(recipe_of(folder), folder / kind)
    except Exception as error:
        (folder / f"{kind}-{group.rank}").write_text(f"{type(error).__name__}: {error}")


@pytest.mark.parametrize("kind", FAULTS)
def test_a_process_that_fails_is_named(few, tmp_path, kind):
    (tmp_path / "digits").symlink_to(few)
    processes(2, faulty, tmp_path, kind, lost=None if kind == "failed" else 1)
    if kind == "failed":
        assert (tmp_path / "failed-1").read_text() == "ValueError: the fourth batch is broken"
        why = "process 1 failed in step 4: the fourth batch is broken"
    else:
        why = "process 1 has ended or hangs: process 0 waited for it in step 4, for run.timeout"
    assert (tmp_path / f"{kind}-0").read_text().startswith(f"PeerError: {why}")
