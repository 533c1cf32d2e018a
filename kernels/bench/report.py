"""The benchmark's records: what is written beside them, how they are kept, and their table.

A file of records holds JSON lines of three kinds: "facts" opens a run, "loss" is a measurement,
"absent" says what was not measured and why. Files of the first version are read as well.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import backends
from .peers import CASES

Record = dict[str, Any]
# The columns of a Markdown table, beside those of the providers; a text table has all.
IN_MARKDOWN = {"loss", "(N, C)", "type", "ours, ms", "of copy", "launches", "gradient error"}
OURS = ("cpu", "cuda", "triton")
# What makes a measurement, beside its provider: these records can be compared.
KEY = ("run", "device", "turn", "clock", "case", "rows", "classes", "dtype")


def facts(device: str) -> Record:
    """What a number needs to be read: versions, machine, commit, the byte models."""
    cpu, _ = backends.compiled()
    found: Record = {
        "kind": "facts",
        "commit": output("git", "-C", str(Path(__file__).parent), *COMMIT),
        "torch": torch.__version__,
        "triton": version("triton"),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "simd": cpu.level() if cpu else None,
        "compiler": cpu.compiler if cpu else None,
        "gpu": None,
        "date": time.strftime("%Y-%m-%d"),
        "byte_models": {n: f"{c.elements} elements a logit: {c.traffic}" for n, c in CASES.items()},
    }
    if device == "cuda":
        card = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": card.name,
            "multiprocessors": card.multi_processor_count,
            "l2_bytes": card.L2_cache_size,
            "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    return found


COMMIT = ("describe", "--always", "--dirty", "--exclude=*")


def output(*command: str) -> str | None:
    """The first line that a program prints, None where it is not there or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip().partition("\n")[0] or None


def version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def append(path: Path, record: Record) -> None:
    """One line more, on the disk when this returns: a run that is killed keeps what it measured."""
    torn = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
    with path.open("a") as file:
        file.write("\n" * torn + json.dumps(record) + "\n")


def not_a_record(place: str) -> ValueError:
    return ValueError(f"{place} is not a record of a benchmark")


def each(paths: Iterable[Path]) -> Iterator[tuple[str, Record]]:
    """Every record of some files and its place, "file:line".

    A line that was cut off is left out, and said.

    Raises:
        ValueError: a line that is no record.
    """
    for path in paths:
        for number, line in enumerate(path.read_text().split("\n"), 1):
            place = f"{path}:{number}"
            if not line:
                continue
            try:
                record = json.loads(line)
            except ValueError:
                print(f"{place} was cut off; it is left out", file=sys.stderr)
                continue
            if not isinstance(record, dict) or "kind" not in record:
                raise not_a_record(place)
            yield place, record


def read(paths: Iterable[Path]) -> list[Record]:
    """The measurements of some files, each with the number of its run.

    Records of the first version have no device (cpu), turn (warm) or clock (host) and call the
    device's own backend "fused".

    Raises:
        ValueError: a line that is no record.
    """
    records: list[Record] = []
    run = 0
    for place, record in each(paths):
        run += record["kind"] == "facts"
        if record["kind"] == "loss":
            if not {"provider", "case"} <= record.keys():
                raise not_a_record(place)
            record = {"device": "cpu", "turn": "warm", "clock": "host", "run": run} | record
            if record["provider"] == "fused":
                record["provider"] = record["device"]
            records.append(record)
    return records


def grouped(records: Sequence[Record]) -> dict[tuple, dict[str, Record]]:
    """By what was measured, then by provider; of several runs of one measurement the last."""
    found: dict[tuple, dict[str, Record]] = {}
    for record in records:
        key = tuple(record.get(name) for name in KEY)
        found.setdefault(key, {})[record["provider"]] = record
    return {key[1:]: by for key, by in found.items()}


def ours(by: dict[str, Record]) -> Record | None:
    """The fastest of kdfuse's backends, or its reference where it stands alone."""
    fused = [by[p] for p in OURS if p in by]
    return min(fused, key=lambda r: r["median_ms"]) if fused else by.get("reference")


def as_line(record: Record) -> str:
    """A record of a measurement or of its absence, as it comes."""
    what = "{case} {rows}x{classes} {dtype} ".format(**record)
    way = f"{record['turn']} {record['clock']} " if "turn" in record else ""
    if record["kind"] == "absent":
        return f"{what}{way}{record['provider']}: not measured, {record['why_not']}"
    return f"{what}{way}{record['provider']}: {record['median_ms']:.4g} ms"


def number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def line(key: tuple, by: dict[str, Record], providers: Sequence[str]) -> dict[str, str]:
    """One row of the table: the fastest of ours, and how many times longer the others take."""
    _, _, _, name, rows, classes, dtype = key
    best = ours(by)
    mine: Record = best or {}
    eager = by.get("eager", {})
    cells = {"loss": name, "(N, C)": f"({rows}, {classes})", "type": dtype}
    cells["ours, ms"] = f"{best['median_ms']:.4g} {best['provider']}" if best else "-"
    cells["p20-p80"] = f"{best['p20_ms']:.4g}-{best['p80_ms']:.4g}" if best else "-"
    cells["forward"] = number(mine.get("forward_median_ms"), ".4g")
    cells["backward"] = number(mine.get("backward_median_ms"), ".4g")
    for p in providers:
        if p not in by or by[p] is best:
            cells[p] = "-"
        elif best:
            cells[p] = f"{by[p]['median_ms'] / best['median_ms']:.1f}x"
        else:
            cells[p] = f"{by[p]['median_ms']:.4g} ms"
    cells["GB/s"] = number(mine.get("gb_per_s"), ".0f")
    cells["of copy"] = number(mine.get("share_of_copy"), ".0%")
    cells["launches"] = number(mine.get("launches"), "d")
    cells["torch ops"] = number(mine.get("torch_ops"), "d")
    cells["host, us"] = number(mine.get("host_us"), ".0f")
    peak = mine.get("peak_bytes")
    cells["peak, MB"] = number(None if peak is None else peak / 1e6, ".1f")
    cells["loss error"] = number(mine.get("loss_error"), ".0e")
    cells["gradient error"] = number(mine.get("gradient_error"), ".0e")
    cells["eager's"] = number(eager.get("gradient_error"), ".0e") if best else "-"
    return cells


def place(key: tuple) -> tuple:
    """Sorts the lines of a table: losses as in CASES, then sizes and types."""
    _, _, _, name, rows, classes, dtype = key
    return (list(CASES).index(name) if name in CASES else len(CASES), classes, rows, dtype)


def tables(records: Sequence[Record], markdown: bool) -> str:
    """A table for each device, turn and clock; columns in which nothing stands are left out."""
    groups: dict[tuple, dict[tuple, dict[str, Record]]] = {}
    for key, by in grouped(records).items():
        if by.keys() - {"copy"}:
            groups.setdefault(key[:3], {})[key] = by
    parts = []
    for (device, turn, clock), found in groups.items():
        providers = list(dict.fromkeys(p for by in found.values() for p in by if p != "copy"))
        body = [line(key, found[key], providers) for key in sorted(found, key=place)]
        heads = [h for h in body[0] if any(cells[h] != "-" for cells in body)]
        heads = [h for h in heads if not markdown or h in IN_MARKDOWN or h in providers]
        grid = [heads, *([cells[h] for h in heads] for cells in body)]
        title = f"{device}, {turn} turns, {clock} clock: forward and backward, medians"
        parts.append(f"{title}\n\n{in_markdown(grid) if markdown else in_text(grid)}")
    return "\n\n".join(parts)


def in_markdown(grid: Sequence[Sequence[str]]) -> str:
    head, *body = (f"| {' | '.join(cells)} |" for cells in grid)
    return "\n".join([head, "|" + "---|" * len(grid[0]), *body])


def in_text(grid: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    lines = ("  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in grid)
    return "\n".join(lines)
