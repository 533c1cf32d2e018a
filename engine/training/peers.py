"""What the processes of a run tell each other in words: what they are about to do, and who failed.

It goes through the store of their process group, which torchrun's agent or the first process keeps,
and not through collectives: one process may work alone for as long as it takes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count
from typing import Any, TypeVar

import torch.distributed as dist

from ..recipe.problems import for_users
from ..run.folder import changes
from .alive import Watch, waiting
from .ranks import Group
from .rendezvous import board

SHOWN_AFTER = 60.0  # seconds of waiting, and again after as many
OF_GLOO = ("gloo", "pair closure", "Connection closed by peer", "Connection reset by peer")
LAST_WORDS = 5.0  # seconds in which a process that met a failure says where it was

Found = TypeVar("Found")
_calls = count()  # all processes make the same ones


class PeerError(RuntimeError):
    """A process failed, is gone or differs from the others; the text names it."""

    alike = False  # whether all processes raise the same


class Disagreement(PeerError):
    """What all processes found out together, and raise alike."""

    alike = True


def told(group: Group, value: Any, doing: str) -> list[Any]:
    """The value, of JSON's types, of every process in order of rank.

    Waits until all have come here, and says for whom while they are `doing` what takes so long.
    Raises PeerError for a process that has failed elsewhere, for one that shows no sign of life
    for the group's timeout, and where the store is gone.
    """
    if group.world == 1:
        return [value]
    call = next(_calls)
    with _store_errors(), waiting(doing):
        store = board()
        store.set(f"{call}/{group.rank}", json.dumps(value))
        for rank in range(group.world):
            _wait(group, store, call, rank, doing)
        return [json.loads(store.get(f"{call}/{rank}")) for rank in range(group.world)]


def from_first(group: Group, value: Any, doing: str) -> Any:
    """The first process's value, of JSON's types, in all of them."""
    return told(group, value if group.first else None, doing)[0]


def together(group: Group, doing: str, work: Callable[[], Found]) -> Found:
    """What work() gives, which every process does without the others.

    Where it fails in one, all raise: PeerError with what each has to say, but what is no error of
    the user's keeps its class.
    """
    if group.world == 1:
        return work()
    found, failure = None, None
    try:
        found = work()
    except Exception as error:
        failure = error
    said = told(group, failure and f"{_kind(failure)}{failure}", doing)
    if any(text is not None for text in said):
        _part(group)
    if failure is not None and not for_users(failure):
        raise failure
    if wrong := [f"process {rank}: {text}" for rank, text in enumerate(said) if text is not None]:
        raise Disagreement(f"{doing}: " + "\n".join(wrong)) from failure
    return found  # type: ignore[return-value]


def agree(group: Group, what: str, facts: Callable[[], Mapping[str, Any]]) -> None:
    """Raise PeerError in all processes unless each has the first one's facts, of JSON's types.

    Of what a run may have otherwise when it is resumed, nothing is compared.
    """
    if group.world == 1:
        return
    first, *others = told(group, dict(facts()), f"comparing {what}")
    wrong = [
        f"process {rank}: {line}"
        for rank, found in enumerate(others, start=1)
        for line in changes(first, found)
    ]
    if wrong:
        _part(group)
        raise Disagreement(
            f"the processes do not agree on {what} (process 0 -> another):\n  "
            + "\n  ".join(wrong)
            + "\ngive all of them the same recipe, code, data and run folder"
        )


def _part(group: Group) -> None:
    """Let the first process, which may keep the store, end after those who still read there."""
    with suppress(dist.DistError):
        store, call = board(), next(_calls)
        store.set(f"{call}/{group.rank}", "")
        end = time.monotonic() + LAST_WORDS
        every = [f"{call}/{rank}" for rank in range(group.world)]
        while group.first and not store.check(every) and time.monotonic() < end:
            time.sleep(0.01)


@contextmanager
def named_failures(group: Group, doing: Callable[[], str]) -> Iterator[None]:
    """Within, a failure is told to the others, and one of communication becomes a PeerError.

    That names the processes that failed, or that are silent: dead, or stopped for longer than
    run.timeout. `doing` says where this one is.
    """
    if group.world == 1:
        yield
        return
    try:
        yield
    except PeerError:
        raise
    except Exception as error:
        met = _of_communication(error)
        try:
            with waiting(f"{doing()}, to hear who failed"):
                store = board()
                words = {"met": met, "text": f"{doing()}: {_kind(error)}{error}"}
                store.set(f"ended/{group.rank}", json.dumps(words))
                if not met:
                    if group.first:  # which may keep the store that the others read this in
                        _heard(store, group)
                    raise
                raise PeerError(_blame(store, group, doing())) from error
        except dist.DistError:
            raise PeerError(
                f"process {group.rank} was in {doing()} when another process ended, and with it "
                "what the processes meet through (process 0, or torchrun on its machine)"
            ) from error


def _blame(store: Any, group: Group, doing: str) -> str:
    """Why this process waited in vain."""
    words = _heard(store, group)
    failed = {rank: found["text"] for rank, found in words.items() if found and not found["met"]}
    if failed:
        return "\n".join(f"process {rank} failed in {text}" for rank, text in failed.items())
    if silent := [rank for rank, found in words.items() if found is None]:
        names = " and ".join(f"process {rank}" for rank in silent)
        many = "have ended or hang" if len(silent) > 1 else "has ended or hangs"
        return (
            f"{names} {many}: process {group.rank} waited for it in {doing}, for "
            "run.timeout seconds or longer"
        )
    return f"the processes lost each other in {doing}: the network between them failed"


def _heard(store: Any, group: Group) -> dict[int, dict[str, Any] | None]:
    """What the other processes say at their end; None of those that say nothing for a while."""
    others = [rank for rank in range(group.world) if rank != group.rank]
    end = time.monotonic() + LAST_WORDS
    while time.monotonic() < end and not all(_said(store, rank) for rank in others):
        time.sleep(0.1)
    return {rank: _said(store, rank) for rank in others}


def _said(store: Any, rank: int) -> dict[str, Any] | None:
    key = f"ended/{rank}"
    return json.loads(store.get(key)) if store.check([key]) else None


def _wait(group: Group, store: Any, call: int, rank: int, doing: str) -> None:
    began, watch = time.monotonic(), Watch(store, rank)
    say, pause = began + SHOWN_AFTER, 0.002
    while not store.check([f"{call}/{rank}"]):
        if (found := _said(store, rank)) is not None:
            raise PeerError(f"process {rank} failed in {found['text']}")
        if watch.silent() > group.timeout:
            _part(group)
            raise PeerError(
                f"process {rank} has ended or hangs: process {group.rank} waited for it, {doing}, "
                f"and saw no sign of life for {group.timeout:g} s (run.timeout)"
            )
        if group.first and time.monotonic() > say:
            print(f"waiting for process {rank}, {doing}: {say - began:.0f} s", flush=True)
            say += SHOWN_AFTER
        time.sleep(pause)
        pause = min(2 * pause, 0.5)


@contextmanager
def _store_errors() -> Iterator[None]:
    try:
        yield
    except dist.DistError as error:
        raise PeerError(
            "what the processes meet through is gone: process 0, or torchrun on its machine, ended"
        ) from error


def _of_communication(error: Exception) -> bool:
    """Gloo's errors are RuntimeErrors that name its files, but for some of a backward pass."""
    return isinstance(error, dist.DistError) or any(text in str(error) for text in OF_GLOO)


def _kind(error: Exception) -> str:
    """The error's class, where its text was not written to stand alone."""
    return "" if for_users(error) else f"{type(error).__name__}: "
