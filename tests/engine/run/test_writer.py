"""Checkpoints of a thread: the bytes of their moment, one at a time, none lost, no error lost."""

import copy
import gc
import io
import re
import resource
import threading
import weakref
from pathlib import Path

import pytest
import torch
from processes import together

from kdfuse.engine.run import checkpoint, writer
from kdfuse.engine.run.checkpoint import CheckpointError, load
from kdfuse.engine.run.writer import Writer, snapshot

pytestmark = pytest.mark.slow(5)

SECONDS = 60  # after which a test that hangs fails


@pytest.fixture
def gate(monkeypatch):
    """Holds up every checkpoint until it is opened; what was begun and written, in order."""
    write, opened = checkpoint.save, threading.Event()
    opened.events = []

    def held(folder, name, *given, **options):
        opened.events.append(f"begun {name}")
        assert opened.wait(SECONDS)
        path = write(folder, name, *given, **options)
        opened.events.append(f"written {name}")
        return path

    monkeypatch.setattr(checkpoint, "save", held)
    yield opened
    opened.set()


def trained():
    """A network in NHWC and its optimiser after a step, and views that share their storage."""
    convolution, norm = torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)
    model = torch.nn.Sequential(convolution, norm, torch.nn.Flatten(), torch.nn.Linear(32, 2))
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    whole = torch.arange(12.0).reshape(3, 4)
    tensors = {"views": [whole[1:], whole.T, whole], "empty": torch.zeros(0), "rng": (1, [2, 3])}

    def step():
        optimizer.zero_grad()
        model(torch.randn(4, 3, 4, 4)).square().sum().backward()
        optimizer.step()
        whole.add_(1)

    def state():
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), **tensors}

    step()
    return state, step


def saved(value):
    torch.save(value, made := io.BytesIO())
    return made.getvalue()


def test_a_checkpoint_has_the_bytes_of_its_moment(gate, tmp_path):
    state, step = trained()
    facts = {"results": {"best": {"top1": 1.0}}}
    bytes_then, facts_then = saved(state()), copy.deepcopy(facts)
    with Writer(print) as made:
        made.save(tmp_path, "step-00000001", state(), facts, keep=1)
        for _ in range(3):
            step()
        facts["results"]["best"] = facts["results"]["last"] = {"top1": 2.0}
        assert saved(state()) != bytes_then
        gate.set()
    assert (tmp_path / "step-00000001" / "state.pt").read_bytes() == bytes_then
    assert load(tmp_path / "step-00000001")[1] == facts_then


def test_a_snapshot_shares_nothing_with_what_trains():
    state, step = trained()
    given = state()
    taken = snapshot(given)
    before = saved(taken)
    assert before == saved(given)
    step()
    assert saved(taken) == before != saved(given)
    taken["views"][2].zero_()
    assert not taken["views"][0].any() and given["views"][0].all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_snapshot_of_a_gpu_is_on_the_host():
    there = torch.arange(1e6, device="cuda")
    taken = snapshot({"w": [there, there[10:]], "n": 3})
    there.zero_()
    assert taken["n"] == 3
    for tensor, first in zip(taken["w"], (0.0, 10.0), strict=True):
        assert tensor.is_pinned() and torch.equal(tensor, torch.arange(first, 1e6))


def test_one_at_most_is_on_its_way_and_none_is_dropped(gate, tmp_path):
    made = Writer(print)
    made.save(tmp_path, "step-00000001", {}, {}, keep=3)
    second = threading.Thread(
        target=made.save, args=(tmp_path, "step-00000002", {}, {}), kwargs={"keep": 3}
    )
    second.start()
    second.join(0.2)
    assert second.is_alive() and gate.events == ["begun step-00000001"]
    gate.set()
    second.join()
    with made:
        made.save(tmp_path, "step-00000003", {}, {}, keep=3)
    names = [f"step-0000000{i}" for i in (1, 2, 3)]
    assert gate.events == [f"{what} {name}" for name in names for what in ("begun", "written")]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


@pytest.mark.parametrize("kind", [None, KeyboardInterrupt, RuntimeError])
def test_its_end_waits_for_the_last_one(kind, gate, tmp_path):
    timer = threading.Timer(0.2, gate.set)
    try:
        with Writer(print) as made:
            made.save(tmp_path, "best", {"w": torch.ones(3)}, {}, keep=1)
            timer.start()
            if kind is not None:
                raise kind
    except BaseException as error:
        assert type(error) is kind
    assert gate.events == ["begun best", "written best"] and load(tmp_path / "best")


def refused(folder):
    """A writer on the way to a checkpoint that cannot be written: its folder is a file."""
    (folder / "file").write_text("")
    said = []
    made = Writer(said.append)
    made.save(folder / "file", "step-00000001", {}, {}, keep=1)
    return made, said


TOLD = r"checkpoint .*file/step-00000001: cannot write .*; the run goes on without it"


def test_a_checkpoint_that_cannot_be_written_is_told_once(tmp_path):
    made, said = refused(tmp_path)
    made._thread.join()
    made.check()
    made.check()
    made.finish()
    assert len(said) == 1 and re.fullmatch(TOLD, said[0])


def test_the_next_save_tells_and_goes_on(tmp_path):
    made, said = refused(tmp_path)
    with made:
        made.save(tmp_path, "step-00000002", {}, {}, keep=1)
        made.finish()
        assert len(said) == 1 and re.fullmatch(TOLD, said[0])
    assert load(tmp_path / "step-00000002")


def test_the_last_one_has_to_be_on_the_disk(tmp_path):
    made, said = refused(tmp_path)
    with pytest.raises(CheckpointError, match=r"file/step-00000001: cannot write"), made:
        made.finish()
    assert not said


def test_a_failure_beside_another_error_is_told(tmp_path):
    made, said = refused(tmp_path)
    with pytest.raises(KeyboardInterrupt), made:
        raise KeyboardInterrupt
    assert len(said) == 1 and re.fullmatch(TOLD, said[0])


@pytest.mark.parametrize("then", ["check", "save", "finish", "end"])
def test_any_other_error_of_the_thread_is_raised(then, tmp_path):
    made = Writer(print)
    made.save(tmp_path, "best", {"path": Path()}, {}, keep=1)
    with pytest.raises(TypeError, match=r"tensors\['path'\]: a PosixPath"):
        if then == "check":
            made._thread.join()
            made.check()
        elif then == "save":
            made.save(tmp_path, "best", {}, {}, keep=1)
        elif then == "finish":
            made.finish()
        else:
            with made:
                pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("full", [False, True])
def test_a_snapshot_is_gone_once_it_is_written_or_has_failed(full, tmp_path, monkeypatch):
    """Or there would be two beside what trains. Without the garbage collector, which comes late."""
    taken, said = [], []

    def watched(value):
        taken.append(weakref.ref((copied := snapshot(value))[0]["w"]))
        return copied

    monkeypatch.setattr(writer, "snapshot", watched)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    gc.disable()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]) if full else limit)
        with Writer(said.append) as made:
            made.save(tmp_path, "best", {"w": torch.zeros(10_000)}, {}, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        gc.enable()
    assert len(taken) == 1 and taken[0]() is None
    assert ["state.pt: File too large" in text for text in said] == [True] * full


def peak():
    """The most memory that this process has had since it was last asked, in bytes."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    Path("/proc/self/clear_refs").write_text("5")
    return 1024 * int(found[1])


def saves_three(folder):
    size = 96 << 20
    tensors = {"w": torch.ones(size // 4)}
    peak()
    before = peak()
    with Writer(print) as made:
        for _ in range(3):
            made.save(folder, "best", tensors, {}, keep=1)
    assert size * 0.9 < peak() - before < size * 1.3


def test_memory_is_one_copy_of_the_state(tmp_path):
    together(1, saves_three, tmp_path)  # a process that has no memory of other tests to use again
