"""What the fused self-learning teachers of a run said in each of its steps, for another run."""

from __future__ import annotations

from pathlib import Path

from ..methods import Method
from .header import NAME
from .replay import Recorded
from .shards import CacheError

# Of the method, what shaped the SL-Ts and their fusion, and is the student's as well.
SHARED = ("temperature", "slts", "fusion")


class RecordedSlts(Recorded):
    """A whole record, opened. Its views are the epochs of the run that wrote it, in their order:
    other than a frozen teacher, SL-Ts say more as they learn."""

    key = "slt.record"
    of_slts = True
    unfinished = "the run that records it is not at its end; go on with that (resume=true)"

    def __init__(self, folder: Path) -> None:
        """Raises CacheError for one that is not whole, or whose files are damaged."""
        if not (folder / NAME).is_file():
            raise CacheError(
                f"slt.record: {folder} is no record, it has no {NAME}; a run with "
                f"run.record={folder} writes one"
            )
        super().__init__(folder)

    @property
    def again(self) -> int | None:
        """Epochs after which the plan's views began anew in the run that recorded; None: never."""
        assert self.header.slts is not None
        return self.header.slts["again"]

    def summary(self, epochs: int) -> str:
        """In a line: what it is, and how many epochs of it a run learns from."""
        views = self.header.views
        return f"SL-Ts {self.folder}: {self.header.summary()}, {epochs} of {views} epochs"

    def check_cache(self, cache: Recorded, epochs: int) -> None:
        """Raise CacheError where so many epochs of a teacher's cache are of other views."""
        seed, of_cache = self.header.seed, cache.header.seed
        if seed != of_cache:
            raise CacheError(
                f"slt.record: {self.folder} has the views of seed {seed}, and teacher.cache "
                f"{cache.folder} those of {of_cache}; record both under one run.seed"
            )
        again = self.again or self.header.views
        if any(cache.epoch(epoch) != epoch % again for epoch in range(epochs)):
            raise CacheError(
                f"slt.record: the views of {self.folder} begin again after {again} epochs, and "
                f"those of teacher.cache {cache.folder} after {cache.header.views}; take the cache "
                "that the SL-Ts learned from, or one of as many views as there are epochs"
            )

    def check_teacher(self, digest: str) -> None:
        """Raise CacheError unless its SL-Ts learned from the teacher of these weights."""
        if self.header.digest != digest:
            raise CacheError(
                f"slt.record: the SL-Ts of {self.folder} learned from another teacher (weights "
                f"{self.header.digest[:12]} -> {digest[:12]}); give that one, or record them anew"
            )

    def check_run(self, method: Method, network: str, epochs: int) -> None:
        """Raise CacheError unless a run may learn from it: so many epochs under this method, with
        SL-Ts of this name ("" for any)."""
        assert self.header.slts is not None
        names, views = set(self.header.teachers), self.header.views
        if network and network not in names:
            raise CacheError(
                f"slt.record: {self.folder} has the answers of {', '.join(names)}, and slt.name is "
                f"{network}; leave it out, or name the one that was recorded"
            )
        was, now = self.header.slts["method"], method.model_dump(mode="json")
        if drift := [f"method.{k}: {was[k]} -> {now[k]}" for k in SHARED if was[k] != now[k]]:
            raise CacheError(
                f"slt.record: the SL-Ts of {self.folder} learned otherwise (recorded -> asked "
                "for):\n  " + "\n  ".join(drift) + "\nundo that, or record them anew"
            )
        if epochs > views:
            raise CacheError(
                f"slt.record: {self.folder} has {views} epochs of SL-Ts that learn, and this run "
                f"has {epochs}; set run.epochs={views} (or run.stop_epoch={views}), or record a "
                "longer run"
            )
