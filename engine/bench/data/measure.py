"""Benchmark of the input path: the loaders of a recipe's images beside torchvision's own way.

Loaders and peer take turns in blocks of batches, so that a drift of the machine meets all of them.
In a block a loader starts anew, hands out what it prepares ahead uncounted, and is closed at the
end: nothing works while another's clock runs. All files are read once before, so that they come
from memory. An epoch of few images is repeated within a block, for its start and end would weigh
more than they do in a real set.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing import active_children
from pathlib import Path

import numpy as np
from PIL import features

from ....kernels.bench.report import Record, facts, version
from ...data.contents import Encoded
from ...data.manifest import Manifest
from ...data.plan import Ints
from ...data.sources import open_source
from ...recipe.data import Data
from .sides import PEER, SPLITS, Mode, Side, sides_of

BLOCKS = 5
MOST = 4096  # images that take part: far beyond any cache of a processor, within memory


@dataclass(frozen=True)
class Block:
    images: int
    seconds: float
    cpu_seconds: float | None
    resident: int | None  # bytes, at its end


@dataclass
class Turns:
    """A side, the batches of its blocks, and the blocks so far."""

    side: Side
    steps: int
    blocks: list[Block] = field(default_factory=list)


def cores() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def opening(data: Data, made: int | None) -> Record:
    """The record that opens a run; `made`: how many images were made for it."""
    found = facts("cpu")
    del found["byte_models"]
    return found | {
        "benchmark": "data",
        "usable_cores": cores(),
        "torchvision": version("torchvision"),
        "pillow": version("pillow"),
        "libjpeg_turbo": features.version("libjpeg_turbo"),
        "dali": version("nvidia-dali-cuda130"),
        "made_images": made,
        "data": data.model_dump(mode="json", exclude={"root"}),
    }


def measure(
    data: Data,
    batch: int,
    modes: Sequence[Mode],
    loaders: Sequence[str],
    seconds: float,
    keep: Callable[[Record], None],
) -> None:
    """Measures each mode, about `seconds` for each loader, and hands each record to `keep`.

    ValueError where none of the loaders can read the images.
    """
    for mode in modes:
        manifest = open_source(data, SPLITS[mode])
        readable = np.setdiff1d(np.arange(len(manifest.target)), list(manifest.bad))
        few = np.linspace(0, len(readable) - 1, min(len(readable), MOST)).astype(np.int64)
        rows = readable[few]
        if isinstance(manifest.content, Encoded):
            for row in rows.tolist():
                with manifest.content.open(row) as file:
                    file.read()
        sides, lost = sides_of(manifest, rows, data, batch, mode, loaders)
        for name, why in lost.items():
            keep({"kind": "absent", "mode": mode, "loader": name, "why_not": why})
        if all(name in lost for name in loaders):
            raise ValueError(f"--loaders {' '.join(loaders)}: none can read these images")
        try:
            turns = [Turns(side, _steps(side, seconds)) for side in sides]
            for number in range(BLOCKS):
                shift = number % len(turns)
                for turn in turns[shift:] + turns[:shift]:
                    turn.blocks.append(block(turn.side, turn.steps))
        finally:
            for side in sides:
                side.close()
        about = _about(manifest, rows) | {"mode": mode, "batch": batch, "size": data.size}
        about |= {"workers": data.workers, "prefetch": data.prefetch}
        for found in _records(turns):
            keep({"kind": "loader"} | about | found)


def block(side: Side, steps: int) -> Block:
    """Takes so many batches on the clock."""
    batches = side.batches()
    for _ in range(side.ahead):
        next(batches)
    begin, spent = time.perf_counter(), cpu_seconds()
    images = sum(next(batches) for _ in range(steps))
    seconds, now = time.perf_counter() - begin, cpu_seconds()
    memory = resident_bytes()
    batches.close()
    return Block(images, seconds, None if now is None or spent is None else now - spent, memory)


def cpu_seconds() -> float | None:
    """Processor time of this process and of those that it has started and that still run."""
    if not Path("/proc/self/stat").exists():
        return None
    spent = time.process_time()
    for child in active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        spent += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return spent


def resident_bytes() -> int | None:
    """Memory in use of the same; pages that two of them share count twice."""
    if not Path("/proc/self/statm").exists():
        return None
    pids = ["self", *(str(child.pid) for child in active_children())]
    pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids]
    return sum(pages) * os.sysconf("SC_PAGE_SIZE")


def _steps(side: Side, seconds: float) -> int:
    """Batches of a block, in whole bursts, from a first block that is not counted."""
    pilot = block(side, side.burst)
    bursts = round(seconds / BLOCKS / pilot.seconds)
    return side.burst * max(bursts, 1)


def _about(manifest: Manifest, rows: Ints) -> Record:
    content = manifest.content
    height, width = manifest.sizes[rows].mean(axis=0).tolist()
    length = float(content.lengths[rows].mean()) if isinstance(content, Encoded) else None
    return {
        "set_images": len(rows),
        "mean_bytes": length,
        "mean_width": width,
        "mean_height": height,
    }


def _records(turns: Sequence[Turns]) -> list[Record]:
    found = []
    for turn in turns:
        rates = [one.images / one.seconds for one in turn.blocks]
        low, median, high = np.quantile(rates, [0.2, 0.5, 0.8]).tolist()
        spent = [one.cpu_seconds for one in turn.blocks if one.cpu_seconds is not None]
        images = sum(one.images for one in turn.blocks)
        found.append(
            {
                "loader": turn.side.name,
                "decode": turn.side.decode,
                "images_per_s": median,
                "p20_images_per_s": low,
                "p80_images_per_s": high,
                "cores": cores(),
                "images_per_s_per_core": median / cores(),
                "images_per_cpu_s": images / sum(spent) if spent else None,
                "blocks": len(turn.blocks),
                "steps_per_block": turn.steps,
                "images": images,
                "resident_bytes_first": turn.blocks[0].resident,
                "resident_bytes_last": turn.blocks[-1].resident,
            }
        )
    peer = next((one["images_per_s"] for one in found if one["loader"] == PEER), None)
    return [one | {"times_peer": one["images_per_s"] / peer if peer else None} for one in found]
