"""shards.json, beside the tars of a packed split: what it was made of, and the tars' checksums."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from ..recipe import problems
from ..recipe.schema import Strict

RECORD = "shards.json"
FORMAT = "kdfuse-shards-1"
CHUNK = 1 << 20  # bytes
Record = dict[str, Any]
Count = Annotated[int, Field(ge=0)]


class Tar(Strict):
    """A tar of a packed split, with the checksum of its bytes."""

    name: Annotated[str, Field(pattern=r"^[0-9]{5}\.tar$")]
    images: Count
    bytes: Count
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class MadeTar(Tar):
    """The same while its split is packed."""

    resized: Count
    skipped: dict[str, str]


class Whole(Strict):
    """All of a record."""

    format: Literal["kdfuse-shards-1"]
    plan: dict[str, Any]
    images: Count
    resized: Count
    skipped: dict[str, str]
    shards: list[Tar]


def to_json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def read_record(folder: Path) -> Record:
    """The record of a packed split. ValueError where it is damaged or of another format."""
    path = folder / RECORD
    try:
        return Whole.model_validate(json.loads(path.read_bytes())).model_dump()
    except (ValueError, RecursionError) as error:
        why = problems.first(error)
        raise ValueError(f"{path} is no record of {FORMAT} ({why}); pack the set again") from error


def made_before(path: Path) -> Record | None:
    """The record of a tar of a split that is packed; None where it is not there or damaged."""
    try:
        return MadeTar.model_validate(json.loads(path.read_bytes())).model_dump()
    except (FileNotFoundError, ValueError, RecursionError):
        return None


def wrong_lengths(folder: Path, record: Record) -> list[tuple[Path, str]]:
    """The tars that are missing or not as long as the record says, with the reason."""
    found = []
    for shard in record["shards"]:
        path = folder / shard["name"]
        if not path.is_file():
            found.append((path, f"missing, though {RECORD} lists it; pack the set again"))
        elif path.stat().st_size != shard["bytes"]:
            found.append((path, f"{path.stat().st_size} bytes, {RECORD} says {shard['bytes']}"))
    return found


def faults_of(folder: Path) -> list[tuple[Path, str]]:
    """What of a packed split is not as its record says, every tar read whole."""
    try:
        record = read_record(folder)
    except (OSError, ValueError) as error:
        return [(folder / RECORD, str(error))]
    found = wrong_lengths(folder, record)
    seen = {path for path, _ in found}
    for shard in record["shards"]:
        path = folder / shard["name"]
        if path not in seen and _sha256(path) != shard["sha256"]:
            found.append((path, f"its bytes are not those that {RECORD} has the checksum of"))
    listed = {shard["name"] for shard in record["shards"]}
    found += [
        (path, f"not in {RECORD}, so not part of the packed set")
        for path in sorted(folder.glob("*.tar"))
        if path.name not in listed
    ]
    return found


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
