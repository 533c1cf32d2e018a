"""Checkpoints: round trip, damage, kills at every moment, a full disk, code in a file."""

import errno
import hashlib
import io
import json
import os
import random
import resource
import shutil
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from disks import fill, mount, small_disk

from kdfuse.engine.run.checkpoint import CheckpointError, latest, load, save, step_name
from kdfuse.engine.training import process

pytestmark = pytest.mark.slow(15)

ROOT = Path(__file__).parents[3]


def state(step, size=1000):
    """Tensors that all say `step`, so that a mixture of two saves is seen."""
    return {
        "student": OrderedDict(w=torch.full((size,), float(step)), n=torch.tensor(step)),
        "optimizer": {"state": {0: {"v": torch.zeros(3)}}, "groups": [{"lr": 0.1, "b": (1, 2)}]},
        "none": None,
        "flag": True,
    }


def store(folder, step, **options):
    return save(folder, step_name(step), state(step), {"step": step, "top1": 61.5}, **options)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def damage(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_round_trip(tmp_path):
    folder = tmp_path / "new" / "checkpoints"
    path = store(folder, 7)
    assert path == folder / "step-00000007" and names(path) == [
        "facts.json",
        "sha256.json",
        "state.pt",
    ]
    got, facts = load(path)
    assert facts == {"step": 7, "top1": 61.5}
    assert torch.equal(got["student"]["w"], torch.full((1000,), 7.0))
    assert got["student"]["n"].dtype == torch.int64
    assert got["optimizer"]["groups"] == [{"lr": 0.1, "b": (1, 2)}]
    assert torch.equal(got["optimizer"]["state"][0]["v"], torch.zeros(3))
    assert got["none"] is None and got["flag"] is True


def test_optimizer_and_model_states_round_trip(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.randn(4, 3)).square().sum().backward()
    optimizer.step()
    tensors = {"student": model.state_dict(), "optimizer": optimizer.state_dict()}
    got, _ = load(save(tmp_path, "best", tensors, {}))
    for key, value in model.state_dict().items():
        assert torch.equal(got["student"][key], value)
    again = torch.optim.AdamW(model.parameters(), fused=True)
    again.load_state_dict(got["optimizer"])
    for a, b in zip(again.state.values(), optimizer.state.values(), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in ("step", "exp_avg", "exp_avg_sq"))


def test_only_the_newest_stay_and_best_is_kept(tmp_path):
    save(tmp_path, "best", state(1), {"step": 1})
    for step in (1, 2, 99_999_999, 100_000_000):
        store(tmp_path, step, keep=2)
    assert names(tmp_path) == ["best", "step-100000000", "step-99999999"]
    assert latest(tmp_path).path.name == "step-100000000"
    store(tmp_path, 100_000_001, keep=1)
    assert names(tmp_path) == ["best", "step-100000001"]
    with pytest.raises(ValueError, match="keep: 0;"):
        store(tmp_path, 5, keep=0)


def test_a_checkpoint_has_the_bytes_of_torch_save(tmp_path):
    path = store(tmp_path, 7)
    torch.save(state(7), written := io.BytesIO())
    assert (path / "state.pt").read_bytes() == written.getvalue()
    sums = {file: hashlib.sha256((path / file).read_bytes()) for file in ("state.pt", "facts.json")}
    held = json.loads((path / "sha256.json").read_text())
    assert held == {file: made.hexdigest() for file, made in sums.items()}


def test_best_is_a_link_that_outlives_its_step(tmp_path):
    save(tmp_path, "best", state(0), {"step": 0})
    store(tmp_path, 1, keep=1, best=True)
    for file in ("state.pt", "facts.json", "sha256.json"):
        assert (tmp_path / "best" / file).samefile(tmp_path / step_name(1) / file)
    store(tmp_path, 2, keep=1)
    assert names(tmp_path) == ["best", step_name(2)]
    assert (tmp_path / "best" / "state.pt").stat().st_nlink == 1
    got, facts = load(tmp_path / "best")
    assert facts["step"] == 1 and torch.equal(got["student"]["w"], torch.full((1000,), 1.0))


def no_links(source, target):
    raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(source))


def test_best_is_a_copy_where_there_are_no_links(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", no_links)
    step = store(tmp_path, 1, best=True)
    for file in step.iterdir():
        best = tmp_path / "best" / file.name
        assert best.read_bytes() == file.read_bytes() and not best.samefile(file)


def test_best_is_replaced(tmp_path):
    for step in (1, 2):
        save(tmp_path, "best", state(step), {"step": step})
    assert names(tmp_path) == ["best"] and load(tmp_path / "best")[1] == {"step": 2}


def test_latest_of_nothing(tmp_path):
    assert latest(tmp_path / "absent") is None
    save(tmp_path, "best", state(1), {})
    (tmp_path / "step-00000009.tmp-1").mkdir()
    assert latest(tmp_path) is None


@pytest.mark.parametrize("file", ["state.pt", "facts.json", "sha256.json"])
@pytest.mark.parametrize("how", ["truncated", "flipped", "missing", "empty"])
def test_damage_is_named_and_the_one_before_is_used(file, how, tmp_path):
    store(tmp_path, 1)
    broken = store(tmp_path, 2)
    target = broken / file
    data = target.read_bytes()
    if how == "flipped":
        damage(target)
    elif how == "missing":
        target.unlink()
    else:
        target.write_bytes(data[: len(data) // 2] if how == "truncated" else b"")
    with pytest.raises(CheckpointError, match=r"step-00000002: .*(state\.pt|\.json)") as caught:
        load(broken)
    if file != "sha256.json" or how == "missing":
        assert f": {file} " in str(caught.value)
    path, got, facts, skipped = latest(tmp_path)
    assert path.name == "step-00000001" and facts["step"] == 1 and got["student"]["n"] == 1
    assert skipped == [str(caught.value)]


def test_checksums_that_name_nothing_are_no_checksums(tmp_path):
    path = store(tmp_path, 1)
    for text in ("{}", "[]", "3"):
        (path / "sha256.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"state\.pt does not match|sha256\.json is dam"):
            load(path)


def test_all_damaged_is_an_error_that_lists_them(tmp_path):
    for step in (1, 2):
        damage(store(tmp_path, step) / "state.pt")
    with pytest.raises(CheckpointError, match=r"(?s)no checkpoint.*step-00000002: .*step-00000001"):
        latest(tmp_path)
    with pytest.raises(CheckpointError, match="checkpoint .*absent: no such folder"):
        load(tmp_path / "absent")


def test_steps_of_an_abandoned_future_do_not_come_back(tmp_path):
    store(tmp_path, 10)
    damage(store(tmp_path, 20) / "state.pt")
    assert latest(tmp_path).facts["step"] == 10
    store(tmp_path, 15)
    assert names(tmp_path) == ["step-00000010", "step-00000015"]
    damage(store(tmp_path, 20) / "state.pt")
    store(tmp_path, 20)
    assert latest(tmp_path).facts["step"] == 20 and latest(tmp_path).skipped == []


def test_what_could_not_be_loaded_again_is_refused_before_the_disk_is_touched(tmp_path):
    folder = tmp_path / "checkpoints"
    for value, where in [
        ({"opt": {"lr": np.float64(0.1)}}, r"tensors\['opt'\]\['lr'\]: a float64"),
        ({"path": [1, Path("x")]}, r"tensors\['path'\]\[1\]: a PosixPath"),
        ({"rng": np.zeros(3)}, r"tensors\['rng'\]: a ndarray"),
        ({(1, 2): 3}, r"tensors: the key \(1, 2\) is a tuple"),
    ]:
        with pytest.raises(TypeError, match=where):
            save(folder, "best", value, {})
    with pytest.raises(ValueError, match="nan"):
        save(folder, "best", {}, {"loss": float("nan")})
    assert not folder.exists()


def test_code_in_a_checkpoint_is_refused_and_does_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    store(tmp_path / "c", 1)
    path = store(tmp_path / "c", 2)
    torch.save({"student": Bomb()}, path / "state.pt")
    files = ("state.pt", "facts.json")
    sums = {file: hashlib.sha256((path / file).read_bytes()).hexdigest() for file in files}
    (path / "sha256.json").write_text(json.dumps(sums))
    with pytest.raises(CheckpointError, match=r"state\.pt is refused"):
        load(path)
    assert latest(tmp_path / "c").facts["step"] == 1
    assert not (tmp_path / "ran").exists()


def test_a_file_that_grows_too_large_leaves_the_old_one_and_says_so(tmp_path):
    """A limit on the size of a file stands in for a quota: the write fails halfway, for real."""
    store(tmp_path, 1)
    save(tmp_path, "best", state(1), {"step": 1})
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    for name in (step_name(2), "best"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
        try:
            with pytest.raises(CheckpointError) as caught:
                save(tmp_path, name, state(2, size=1_000_000), {"step": 2})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        text = str(caught.value)
        assert f"{name}.tmp-{os.getpid()}/state.pt: {os.strerror(errno.EFBIG)}" in text
        assert "earlier checkpoints are intact" in text
        assert "its tensors alone take 4,000,020 bytes, the disk has" in text
    assert names(tmp_path) == ["best", "step-00000001"]
    assert latest(tmp_path).facts["step"] == 1 and load(tmp_path / "best")[1]["step"] == 1


# Of 40,020 bytes of tensors: less room than for those; for those alone; for all but the last file;
# for a checkpoint, and no links are to be had.
@pytest.mark.parametrize("room", [36864, 40960, 45056, 49152])
def test_a_full_disk_leaves_the_old_one_and_says_what_is_missing(room, tmp_path, monkeypatch):
    if room == 49152:
        monkeypatch.setattr(os, "link", no_links)
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        store(disk / "c", 1, best=True)
        before = {path: path.read_bytes() for path in (disk / "c").rglob("*.*")}
        filler = fill(disk, room)
        with pytest.raises(CheckpointError) as caught:
            save(disk / "c", step_name(2), state(2, size=10_000), {"step": 2}, best=True)
        text = str(caught.value)
        assert text.startswith(f"checkpoint {disk / 'c' / step_name(2)}: cannot write ")
        assert f": {os.strerror(errno.ENOSPC)}; earlier checkpoints are intact; " in text
        missing = ", 3,156 too few" if room < 40_020 else ""
        wanted = f"its tensors alone take 40,020 bytes, the disk has {room:,} free{missing}"
        assert text.split("; ")[-1] == wanted
        assert {path: path.read_bytes() for path in (disk / "c").rglob("*.*")} == before
        filler.unlink()
        monkeypatch.undo()
        save(disk / "c", step_name(2), state(2, size=10_000), {"step": 2}, best=True)
        assert latest(disk / "c").facts["step"] == load(disk / "c" / "best")[1]["step"] == 2


def test_a_disk_that_is_read_only_is_named(tmp_path):
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        store(disk, 1)
        mount("-o", "remount,ro", str(disk))
        with pytest.raises(CheckpointError, match=rf"cannot write .*: {os.strerror(errno.EROFS)}"):
            store(disk, 2)
        assert latest(disk).facts["step"] == 1


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write .*file"):
        store(tmp_path / "file", 1)


def test_leftovers_of_dead_writers_go_and_of_living_ones_stay(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    living = os.getppid()
    for name in (
        f"step-00000001.tmp-{child.pid}",
        f"best.tmp-{os.getpid()}",
        f"best.tmp-{living}",
    ):
        (tmp_path / name).mkdir()
    (tmp_path / "notes.old-1999").write_text("")
    replaced = save(tmp_path, "best", state(3), {"step": 3})
    shutil.move(replaced, tmp_path / f"best.old-{child.pid}")
    assert load(tmp_path / "best")[1]["step"] == 3
    store(tmp_path, 4)
    assert names(tmp_path) == ["best", f"best.tmp-{living}", "notes.old-1999", "step-00000004"]
    assert load(tmp_path / "best")[1]["step"] == 3


def test_everything_is_durable_before_the_name_appears(tmp_path, monkeypatch):
    calls = []
    fsync, rename = os.fsync, os.rename

    def watched_fsync(descriptor):
        calls.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def watched_rename(source, target):
        calls.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "rename", watched_rename)
    store(tmp_path / "c", 1, best=True)
    step, best = (f"{name}.tmp-{os.getpid()}" for name in ("step-00000001", "best"))
    assert calls[:4] == ["state.pt", "facts.json", "sha256.json", step]
    # The step is there no sooner than the best that a run which goes on from it will not save.
    assert calls[4:] == [best, "rename", "c", "rename", "c", tmp_path.name]


# Forks writers that are killed; fork, because importing torch each time takes seconds. Of three
# steps one writer saves the first as "best" alone, the second for itself, the third as both.
# `arm` decides when it dies.
WRITER = """
import os, random, signal, sys
from pathlib import Path
import torch
from kdfuse.engine.run.checkpoint import latest, load, save, step_name
from kdfuse.engine.run.writer import Writer

def state(step):
    return {"student": {"w": torch.full((100_000,), float(step))}}

def write(folder, start, pipe, save=save):
    for step in range(start, start + 10_000):
        name = "best" if step % 3 == 1 else step_name(step)
        save(folder, name, state(step), {"step": step}, keep=2, best=step % 3 == 0)
        os.write(pipe, b".")

def write_in_a_thread(folder, start, pipe):
    with Writer(print) as writer:
        write(folder, start, pipe, writer.save)

def newest(kinds, step):
    return max(s for s in range(step + 1) if s % 3 in kinds)

def check(folder, saved):
    found = latest(folder)
    assert found is not None and found.skipped == [], found
    at = found.facts["step"]
    assert at >= newest((0, 2), saved), (at, saved)
    best, facts = load(folder / "best")
    for got, step in ((found.state, at), (best, facts["step"])):
        assert torch.equal(got["student"]["w"], state(step)["student"]["w"])
    # Never older than what a run that goes on from here has saved before.
    assert newest((0, 1), at) <= facts["step"] <= at + 2, (at, facts)
    return at

def life(folder, start, arm, saves, polls, write=write):
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        arm()
        write(folder, start, writing)
        os._exit(1)
    os.close(writing)
    for _ in range(saves):
        os.read(reading, 1)
    for _ in range(polls):
        os.listdir(folder)
    if saves:
        os.kill(pid, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    os.close(reading)

def at_random(folder):
    seen = 0
    for turn in range(12):
        saves = random.randint(1, 5)
        how = (write, write_in_a_thread)[turn % 2]
        life(folder, seen + 1, lambda: None, saves, random.randint(0, 4000), how)
        # A thread may not have begun yet with the last.
        seen = check(folder, seen + saves - turn % 2)

def at_each_call(folder):
    def arm(n):
        left = [n]
        def deadly(call):
            def inner(*args, **kwargs):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **kwargs)
            return inner
        for name in ("fsync", "rename", "mkdir", "rmdir", "unlink", "link"):
            setattr(os, name, deadly(getattr(os, name)))
    seen = 0
    # Three steps are 52 calls: each of them, from whichever step a life begins with.
    for n in range(1, 70):
        life(folder, seen + 1, lambda: arm(n), 0, 0)
        seen = check(folder, seen)
    print("steps", seen)

torch.set_num_threads(1)
random.seed(int(sys.argv[3]))
save(Path(sys.argv[2]), step_name(0), state(0), {"step": 0}, best=True)
globals()[sys.argv[1]](Path(sys.argv[2]))
"""


@pytest.mark.parametrize("when", ["at_random", "at_each_call"])
def test_kill_9_never_loses_the_last_good_checkpoint(when, tmp_path):
    seed = random.randrange(10**6)
    command = [sys.executable, "-c", WRITER, when, str(tmp_path), str(seed)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, f"seed {seed}\n{done.stderr}"
    left = latest(tmp_path).facts["step"]
    store(tmp_path, left + 1)
    assert names(tmp_path) == ["best", step_name(left), step_name(left + 1)]


def test_rng_goes_on_where_it_was(tmp_path):
    def draws():
        return random.gauss(0, 1), np.random.standard_normal(), torch.randn(3).tolist()

    draws()  # an odd number: the Gaussian generators keep half a pair
    path = save(tmp_path, "best", {"rng": process.capture()}, {})
    expected = [draws() for _ in range(3)]
    process.restore(load(path)[0]["rng"])
    assert [draws() for _ in range(3)] == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_rng_goes_on_where_it_was():
    captured = process.capture()
    expected = torch.randn(3, device="cuda")
    process.restore(captured)
    assert torch.equal(torch.randn(3, device="cuda"), expected)
