"""The records of steps as tables: one for each run and way of running."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from ....kernels.bench.report import Record, number
from .. import tables
from ..plots import Panel
from .cases import labelled
from .worth import sentence

# What a table's cases share.
SHARED = ("recipe", "device", "batch", "size", "amp", "compile", "channels_last")


def cells(record: Record) -> dict[str, str]:
    """A record's line, by its columns' headings."""

    def get(name: str, form: str) -> str:
        return number(record.get(name), form)

    low, high = get("images_per_s_p20", ".4g"), get("images_per_s_p80", ".4g")
    return {
        "case": labelled(record["case"], record.get("beside", ())),
        "images/s": get("images_per_s", ".4g"),
        "p20-p80": f"{low}-{high}",
        "times without": get("times_without", ".2f"),
        "step, ms": get("step_ms", ".4g"),
        "compiling, s": get("compile_s", ".3g"),
        "parts/step": get("share_of_parts", ".2f"),
        "loss": get("loss_share", ".1%"),
        "reading": get("reading_share", ".1%"),
        "MFU": get("mfu", ".0%"),
        "host, ms": get("host_ms", ".4g"),
        "ops": get("ops", "d"),
        "launches": get("launches", "d"),
        "memory, MB": get("memory_mb", ".0f"),
        f"peer {record.get('peer', '')}".strip(): get("peer_images_per_s", ".4g"),
        "waits": get("peer_waiting", ".0%"),
        "times peer": get("times_peer", ".2f"),
    }


def title(group: Sequence[Record]) -> str:
    """What the cases of a table share."""
    record = group[0]
    roles = [{r[role] for r in group if role in r} for role in ("teacher", "student")]
    pair = " -> ".join("/".join(sorted(names)) for names in roles if names)
    peak = f"{record['matmul_type']} matrix products {record['matmul_tflops']:.3g} TFLOP/s"
    return f"{record['recipe']} ({pair}): {', '.join(way(record))}; {peak}"


def way(record: Record) -> list[str]:
    """How a record's steps were run."""
    found = [record["device"], f"batch {record['batch']}", f"{record['size']} x {record['size']}"]
    found.append("float32" if record["amp"] == "off" else record["amp"])
    only = ", ".join(record.get("compile_only", []))
    found.append(f"compiled {only}".strip() if record["compile"] else "eager")
    if record.get("capture"):
        found.append("captured")
    if parts := record.get("accumulate"):
        found.append(f"in {parts} parts")
    return [*found, "channels last"] if record["channels_last"] else found


def panels(records: Sequence[Record]) -> list[Panel]:
    """The same tables as bars."""
    found = []
    for group, _ in tables.grids(records, "step", SHARED, cells):
        peers = {f"plain loop, {r['peer']}": None for r in group if "peer" in r}
        sides = {"kdfuse": [r["images_per_s"] for r in group]}
        # A peer is drawn once, not again beside what shares it.
        own = [None if "beside" in r else r.get("peer_images_per_s") for r in group]
        sides |= {name: own for name in peers}
        names = [f"{r['case']}\n{' '.join(r.get('beside', ()))}".strip() for r in group]
        found.append(Panel(title(group), names, sides))
    return found


def shown(records: Sequence[Record], markdown: bool) -> list[str | Table]:
    """What is printed of the records of steps."""
    found = []
    for group, grid in tables.grids(records, "step", SHARED, cells):
        found += tables.shown([(group, grid)], title, markdown)
        found += [f"\n{said}" for said in (sentence(group),) if said]
    return found
