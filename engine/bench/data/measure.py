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
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from PIL import features

from ....kernels.bench.report import Record, facts, version
from ...data.contents import Encoded
from ...data.loaders import CPU
from ...data.manifest import Manifest
from ...data.plan import Ints
from ...data.sources import open_source
from ...recipe.data import Data
from .sides import PEER, SPLITS, Mode, Side, Turn, sides_of

BLOCKS = 5
Clock = Callable[[], float]  # seconds
MOST = 4096  # images that take part: far beyond any cache of a processor, within memory


@dataclass(frozen=True)
class Block:
    images: int
    seconds: float
    cpu_seconds: float | None
    resident: int | None  # bytes, at its end


Which = TypeVar("Which", bound=Turn, covariant=True)


@dataclass
class Turns(Generic[Which]):
    """A side, the batches of its blocks, and the blocks so far."""

    side: Which
    steps: int
    blocks: list[Block] = field(default_factory=list)

    @property
    def rates(self) -> list[float]:
        """Images a second of each block."""
        return [one.images / one.seconds for one in self.blocks]


def cores() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def opening(data: Data, made: int | None, device: str = "cpu") -> Record:
    """The record that opens a run; `made`: how many images were made for it."""
    found = facts(device)
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


def readable_rows(manifest: Manifest) -> Ints:
    """The images that take part, read once, so that they come from memory."""
    readable = np.setdiff1d(np.arange(len(manifest.target)), list(manifest.bad))
    few = np.linspace(0, len(readable) - 1, min(len(readable), MOST)).astype(np.int64)
    rows = readable[few]
    if isinstance(manifest.content, Encoded):
        for row in rows.tolist():
            with manifest.content.open(row) as file:
                file.read()
    return rows


def measure(
    data: Data,
    batch: int,
    modes: Sequence[Mode],
    loaders: Sequence[str],
    seconds: float,
    keep: Callable[[Record], None],
    device: torch.device = CPU,
) -> None:
    """Measures each mode, about `seconds` for each loader, and hands each record to `keep`.

    Batches are as a run on `device` gets them, before any copy to it that the step asks for.
    ValueError where none of the loaders can read the images.
    """
    for mode in modes:
        manifest = open_source(data, SPLITS[mode])
        rows = readable_rows(manifest)
        sides, lost = sides_of(manifest, rows, data, batch, mode, loaders, device)
        for name, why in lost.items():
            keep({"kind": "absent", "mode": mode, "loader": name, "why_not": why})
        if all(name in lost for name in loaders):
            raise ValueError(f"--loaders {' '.join(loaders)}: none can read these images")
        try:
            turns = [Turns(side, steps_of(side, seconds)) for side in sides]
            play(turns)
        finally:
            for side in sides:
                side.close()
        about = about_images(manifest, rows) | {"mode": mode, "batch": batch, "size": data.size}
        about |= {"workers": data.workers, "prefetch": data.prefetch}
        for found in _records(turns):
            keep({"kind": "loader"} | about | found)


def play(turns: Sequence[Turns[Any]], clock: Clock = time.perf_counter) -> None:
    """A block each in turn, so that a drift of the machine meets all."""
    for number in range(BLOCKS):
        shift = number % len(turns)
        for turn in (*turns[shift:], *turns[:shift]):
            turn.blocks.append(block(turn.side, turn.steps, clock))


def block(side: Turn, steps: int, clock: Clock = time.perf_counter) -> Block:
    """Takes so many batches on the clock."""
    batches = side.batches()
    for _ in range(side.ahead):
        next(batches)
    begin, spent = clock(), cpu_seconds()
    images = sum(next(batches) for _ in range(steps))
    seconds, now = clock() - begin, cpu_seconds()
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


def steps_of(side: Turn, seconds: float, clock: Clock = time.perf_counter) -> int:
    """Batches of a block, in whole bursts, from a first block that is not counted."""
    pilot = block(side, side.burst, clock)
    bursts = round(seconds / BLOCKS / pilot.seconds)
    return side.burst * max(bursts, 1)


def about_images(manifest: Manifest, rows: Ints) -> Record:
    content = manifest.content
    height, width = manifest.sizes[rows].mean(axis=0).tolist()
    length = float(content.lengths[rows].mean()) if isinstance(content, Encoded) else None
    return {
        "set_images": len(rows),
        "mean_bytes": length,
        "mean_width": width,
        "mean_height": height,
    }


def speed(turn: Turns[Any]) -> Record:
    """How fast it went, and from how much that is known."""
    low, median, high = np.quantile(turn.rates, [0.2, 0.5, 0.8]).tolist()
    spent = [one.cpu_seconds for one in turn.blocks if one.cpu_seconds is not None]
    images = sum(one.images for one in turn.blocks)
    return {
        "images_per_s": median,
        "p20_images_per_s": low,
        "p80_images_per_s": high,
        "images_per_cpu_s": images / sum(spent) if spent else None,
        "cores": cores(),
        "blocks": len(turn.blocks),
        "steps_per_block": turn.steps,
        "images": images,
        "resident_bytes_first": turn.blocks[0].resident,
        "resident_bytes_last": turn.blocks[-1].resident,
    }


def _records(turns: Sequence[Turns[Side]]) -> list[Record]:
    found: list[Record] = []
    for turn in turns:
        own = speed(turn)
        own["images_per_s_per_core"] = own["images_per_s"] / own["cores"]
        found.append({"loader": turn.side.name, "decode": turn.side.decode} | own)
    peer = next((one["images_per_s"] for one in found if one["loader"] == PEER), None)
    return [one | {"times_peer": one["images_per_s"] / peer if peer else None} for one in found]
