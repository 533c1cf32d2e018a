"""What a cache says of itself: cache.json, by which a run knows whether it is the one it needs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..data.durable import whole_file
from .forms import FIELDS, Form
from .shards import CacheError, Layout

NAME = "cache.json"
VERSION = 1
# What has no part in the views: where images lie, how many threads read them.
ELSEWHERE = {"root", "workers", "prefetch", "bad_images", "loader", "decode", "hw_decoder_load"}


@dataclass(frozen=True)
class Header:
    """Whose answers these are, to what, and how they are held."""

    form: Form
    views: int
    steps: int  # of a view
    batch: int
    seed: int  # of the plan
    data: Mapping[str, Any]  # the section of the recipe, but for ELSEWHERE
    sources: Mapping[str, str]  # digests of the training images and their plan, and the loader
    teachers: tuple[str, ...]  # by name
    digest: str  # of the teachers' weights
    numerics: Mapping[str, Any]  # what else the teacher's answers depend on
    facts: Mapping[str, float]  # measured when it was recorded; not compared
    # Of fused SL-Ts: settings of the run that they learned in (training/slt_record.py).
    slts: Mapping[str, Any] | None = None

    def key(self) -> dict[str, Any]:
        """All that decides the rows, of JSON's types."""
        found = asdict(self)
        del found["facts"]
        if not self.form.taps:  # as before there were any
            del found["form"]["taps"], found["form"]["tap_number"]
        if self.slts is None:  # as before there were records of them
            del found["slts"]
        return json.loads(json.dumps(found))

    def summary(self) -> str:
        """In a line: whose answers, to how many views, in which form and size."""
        form, measured = self.form, [f"{k} {v:.2f}" for k, v in self.facts.items()]
        at = "" if form.temperature is None else f" at T = {form.temperature:g}"
        return ", ".join(
            [
                f"{' and '.join(self.teachers)}: {form.form}{at}",
                f"{form.row.itemsize} bytes a view, {self.views} views of "
                f"{self.steps * self.batch} images",
                *measured,
            ]
        )

    def layout(self) -> Layout:
        text = json.dumps(self.key(), sort_keys=True)
        digest = sha256(text.encode()).hexdigest()
        return Layout(digest, self.form.row, self.views, self.steps, self.batch)


def write(folder: Path, header: Header) -> None:
    """The header of a new cache."""
    text = json.dumps({"version": VERSION, **header.key(), "facts": dict(header.facts)}, indent=1)
    with whole_file(folder / NAME, folder / f"{NAME}.unfinished") as file:
        file.write(text.encode() + b"\n")


def read(folder: Path) -> Header:
    """The header of a cache. CacheError where there is none, or it is damaged."""
    path = folder / NAME
    try:
        found = json.loads(path.read_bytes())
        if found.pop("version") != VERSION:
            raise CacheError(f"{path}: of another version of kdfuse; record the cache again")
        form = found.pop("form")
        form["taps"] = tuple((name, tuple(shape)) for name, shape in form.get("taps", ()))
        form.setdefault("tap_number", "float16")
        header = Header(
            Form(**{name: form[name] for name in FIELDS}),
            **{**found, "teachers": tuple(found["teachers"])},
        )
        numbers = (header.views, header.steps, header.batch, header.form.classes)
        if not all(type(n) is int and 0 < n < 2**40 for n in numbers):
            raise ValueError("its sizes are not those of a cache")
        header.layout()
    except FileNotFoundError:
        raise CacheError(
            f"teacher.cache: {folder} is no cache, it has no {NAME}; `kdfuse cache RECIPE --out "
            f"{folder}` records one"
        ) from None
    except CacheError:
        raise
    except OSError as error:
        raise CacheError(f"{path}: {error.strerror}") from error
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError, OverflowError):
        raise CacheError(
            f"{path}: damaged; restore it from a copy, or record the cache again"
        ) from None
    return header
