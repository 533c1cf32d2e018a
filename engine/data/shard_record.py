"""shards.json, beside the tars of a packed split: what it was made of, and the tars' checksums."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

RECORD = "shards.json"
FORMAT = "kdfuse-shards-1"
KEYS = {"format", "plan", "images", "resized", "skipped", "shards"}
CHUNK = 1 << 20  # bytes
Record = dict[str, Any]


def to_json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def read_record(folder: Path) -> Record:
    """The record of a packed split. ValueError where it is damaged or of another format."""
    path = folder / RECORD
    try:
        record = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); pack the set again") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT or KEYS - record.keys():
        raise ValueError(f"{path} is no record of format {FORMAT}; pack the set again")
    return record


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
