"""Who trains in a run's folder: one process at a time, whatever machine it is on.

flock keeps other processes of a machine out; over a network it may not reach other machines. So the
holder also has a lease there, lease.json, whose time of modification it renews. Nobody compares
clocks: a lease of another machine is watched, and any change of it is a sign of life. A lease is
taken over by creating its heir, lease.json.TOKEN, which only one can do; the holder is the last of
lease.json, its heir, that one's heir. Renamed, the heir is lease.json.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

NAME = "lease.json"
RENEWED = 15.0  # seconds between two renewals
# A lease that stands still for so many looks is nobody's. Looks are counted, not seconds: while the
# file system answers nobody, its holder cannot renew it either.
LOOKS, PAUSE = 60, 1.0  # seconds between two looks
LONGEST = 4096  # bytes of a lease
SINCE = "%Y-%m-%d %H:%M:%S UTC"  # when its process took it


class LeaseLost(RuntimeError):
    """Another process has the folder of a run, or it is gone: two writers would spoil the run."""


@contextmanager
def held(folder: Path, processes: int = 1) -> Iterator[Lease]:
    """Make a run's folder and keep others out of it; `processes` of this run are at work.

    Raises ValueError when another process trains there. What a dead process left is taken over:
    at once on the same machine, after a minute of watching where it was on another.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _in_use(folder, _chain(folder)[-1:]) from error
        except OSError:
            pass  # a file system without locks: the lease alone decides
        with Lease(folder, processes) as lease:
            yield lease
    finally:
        os.close(handle)


class Lease:
    """This process's lease of a folder, renewed by a thread while the block of `with` runs."""

    def __init__(self, folder: Path, processes: int) -> None:
        self.folder = folder
        self.token = os.urandom(16).hex()
        self.notes: list[str] = []  # for the log: from whom it was taken over
        now = time.strftime(SINCE, time.gmtime())
        own = {"pid": os.getpid(), "start": _status(os.getpid())[1]}
        facts = {**_machine(), **own, "processes": processes, "since": now, "token": self.token}
        self._text = (json.dumps(facts, indent=1) + "\n").encode()
        self._file = -1
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def check(self) -> None:
        """Raise LeaseLost unless the folder is still this process's."""
        chain = _chain(self.folder)
        if chain and chain[-1].token == self.token:
            return
        why = f"{chain[-1].owner} has taken it over" if chain else f"its {NAME} is gone"
        raise LeaseLost(f"{self.folder} is no longer this process's: {why}; stopped here")

    def __enter__(self) -> Lease:
        self._take()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        os.close(self._file)
        if [found.token for found in _chain(self.folder)] == [self.token]:
            (self.folder / NAME).unlink(missing_ok=True)

    def _renew(self) -> None:
        while not self._ended.wait(RENEWED):
            try:
                os.utime(self._file)  # of the open file: whoever replaced it is not disturbed
            except OSError:
                pass  # of a network: it is tried again, and `check` finds what became of it

    def _take(self) -> None:
        while True:
            chain = _chain(self.folder)
            gone = _why_gone(chain[-1]) if chain else ""
            path = chain[-1].heir if chain else self.folder / NAME
            if gone is None or not self._create(path):
                continue  # it was let go or handed on while it was watched, or another was faster
            if [found.token for found in _chain(self.folder)][-1:] == [self.token]:
                break
            os.close(self._file)  # what it was to replace is gone meanwhile
            path.unlink(missing_ok=True)
        os.replace(path, self.folder / NAME)
        for found in chain[1:]:  # heirs that died before they had come so far
            found.path.unlink(missing_ok=True)
        if chain:
            self.notes.append(f"took the folder over from {chain[-1].owner}: {gone}")

    def _create(self, path: Path) -> bool:
        """Write the lease; False where there is one. O_EXCL holds on network file systems too."""
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        try:
            if os.write(self._file, self._text) < len(self._text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file)  # other machines see it from here on
        except OSError as error:
            os.close(self._file)
            path.unlink(missing_ok=True)
            error.filename = str(path)  # a failed write does not name its file
            raise
        return True


@dataclass(frozen=True)
class Found:
    """A lease as it lies in a folder. Its process may be dead; what it says may be anything."""

    path: Path
    raw: bytes
    time: int  # of modification, as its file system counts

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What it says; {} for what no lease says: its creator may be writing it now."""
        try:
            facts = json.loads(self.raw)
            process = type(facts["pid"]) is int and 0 < facts["pid"] < 2**31
            return facts if process and re.fullmatch("[0-9a-f]{32}", facts["token"]) else {}
        except (ValueError, TypeError, LookupError, RecursionError):
            return {}

    @property
    def token(self) -> str:
        return self.facts.get("token") or hashlib.sha256(self.raw).hexdigest()[:32]

    @property
    def heir(self) -> Path:
        """The name of the lease that takes this one over."""
        return self.path.with_name(f"{NAME}.{self.token}")

    @property
    def owner(self) -> str:
        """Its process in words."""
        if not (facts := self.facts):
            return f"the unknown owner of {self.path.name}"
        return f"process {facts['pid']} on {facts.get('host')}, there since {facts.get('since')}"

    @property
    def lives(self) -> bool | None:
        """Whether its process is there; None for one of another machine."""
        here = self.facts.items() >= _machine().items()
        return _lives(self.facts["pid"], self.facts.get("start")) if here else None


def holder(folder: Path) -> Found | None:
    """The lease by which a folder is held, be its process alive or not; None without one."""
    return next(reversed(_chain(folder)), None)


def _chain(folder: Path) -> list[Found]:
    """The lease in a folder, its heir, the heir's heir; [] where there is none."""
    chain: list[Found] = []
    found = _read(folder / NAME)
    while found is not None and found.token not in [one.token for one in chain]:
        chain.append(found)
        found = _read(found.heir)
    return chain


def _read(path: Path) -> Found | None:
    try:
        # Opened, for over a network what is known of a file by its name may be a minute old.
        with open(path, "rb") as file:
            return Found(path, file.read(LONGEST), os.fstat(file.fileno()).st_mtime_ns)
    except FileNotFoundError:
        return None


def _why_gone(found: Found) -> str | None:
    """Why a lease is nobody's, None where it is no longer there; ValueError while it is held."""
    if found.lives:
        raise _in_use(found.path.parent, [found])
    if found.lives is False:
        return "that process is gone"
    folder, seconds = found.path.parent, f"{LOOKS * PAUSE:g} s"
    print(f"{folder}: watching for {seconds} whether {found.owner} is alive", flush=True)
    for _ in range(LOOKS):
        time.sleep(PAUSE)
        now = _chain(folder)[-1:]
        if now != [found]:
            if now and now[0].token == found.token:
                raise _in_use(folder, now)
            return None
    return f"it did not renew its lease for {seconds}"


def _in_use(folder: Path, by: list[Found]) -> ValueError:
    who = f" ({by[0].owner})" if by else ""
    return ValueError(
        f"out = {folder}: another process is training there{who}; stop it first, or choose another "
        f"folder; where the folder is a copy of one in use, remove its {NAME}"
    )


def _machine() -> dict[str, str]:
    """Where a process's number means that process: host, its start, and its space of numbers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        numbers = os.readlink("/proc/self/ns/pid")
    except OSError:  # no Linux
        boot, numbers = "", ""
    return {"host": socket.gethostname(), "boot": boot, "numbers": numbers}


def _lives(pid: int, start: str | None) -> bool:
    """Whether the process that began at `start` is there: its number may be another's by now."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    state, began = _status(pid)
    same = start == began or None in (start, began)
    return same and state not in ("Z", "X")  # killed, and only its number is left


def _status(pid: int) -> tuple[str, str | None]:
    """State of a process and its start in ticks since the machine's; ("", None) if hidden."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", None
    return fields[0], fields[19]
