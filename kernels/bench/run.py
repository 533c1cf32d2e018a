"""Microbenchmark of the losses: kdfuse's backends and their peers, in one run.

The providers take turns, so that a drift of the machine meets all of them; a copy that reads and
writes as many bytes as a loss has to (its byte model, see peers.py) takes part. Medians and the
20th and 80th percentiles are kept; timing.py says what the clocks measure, gauges.py what is
counted. Runs without kdfuse's compiled part, on the reference alone.
"""

import argparse
import importlib.util
import math
from pathlib import Path

import torch

from . import report
from .measure import measure, why_missing
from .peers import CASES
from .plan import DTYPES, Budget, items
from .providers import BACKENDS, PEERS, absent
from .report import Record
from .timing import TURNS, copy_speed

SIZES = ((1024, 1000), (4096, 1000), (256, 1000), (1024, 21841))


def size(text: str) -> tuple[int, int]:
    try:
        rows, classes = (int(part) for part in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form 1024x1000") from None
    if rows < 1 or classes < 3:
        raise argparse.ArgumentTypeError(f"{text!r} needs at least 1 row and 3 classes")
    return rows, classes


def duration(text: str) -> float:
    number = float(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no length of time in seconds")
    return number


def threads(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is fewer than 1")
    return number


def picture(text: str) -> Path:
    path = Path(text)
    if path.suffix not in (".svg", ".png"):
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .svg or .png")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {str(path.parent)!r}")
    return path


def arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="kdfuse bench losses", description=__doc__)
    several = parser.add_argument_group("what is measured, the most important first")
    several.add_argument("--cases", nargs="+", choices=CASES)
    several.add_argument("--sizes", nargs="+", type=size, metavar="NxC")
    several.add_argument("--dtypes", nargs="+", choices=DTYPES)
    several.add_argument("--turn", nargs="+", choices=TURNS, help="whose caches a call finds")
    several.add_argument("--device", choices=["cpu", "cuda"])
    how = parser.add_argument_group("how")
    how.add_argument("--backends", nargs="*", choices=BACKENDS, help="default: all of the device")
    how.add_argument("--peers", nargs="*", choices=[*PEERS, "all"], help="default: eager")
    how.add_argument("--threads", type=threads)
    how.add_argument("--seconds", type=duration, help="timing of a case, size and type; default: 3")
    how.add_argument("--budget", type=duration, help="seconds, after which no case is begun")
    how.add_argument("--out", type=Path, help="append JSON lines to this file, as they come")
    shown = parser.add_argument_group("what is shown")
    shown.add_argument("--from", dest="read", nargs="+", type=Path, metavar="FILE",
                       help="show the records of these files instead of measuring")  # fmt: skip
    shown.add_argument(
        "--clock", choices=["host", "events", "graph"], help="show these times alone"
    )
    shown.add_argument("--markdown", action="store_true", help="print Markdown tables")
    shown.add_argument("--plot", type=picture, help="draw into this file (.svg, .png)")
    chosen = parser.parse_args(words)
    for name in ("backends", "peers", "threads", "seconds", "budget", "out"):
        if chosen.read and getattr(chosen, name) is not None:
            parser.error(f"--{name} goes with measuring, --from measures nothing")
    for path in chosen.read or []:
        if not path.is_file():
            parser.error(f"--from {path}: there is no such file")
    if chosen.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib, which is not installed: pip install matplotlib")
    if chosen.clock not in (None, "host") and chosen.device != "cuda" and not chosen.read:
        parser.error(f"--clock {chosen.clock}: a GPU's clock; name --device cuda")
    if chosen.device == "cuda" and not chosen.read and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    return chosen


def run(chosen: argparse.Namespace) -> list[Record]:
    """Measures what was chosen, and writes and prints each record as it comes."""
    device = chosen.device or "cpu"
    if chosen.threads is not None:
        torch.set_num_threads(chosen.threads)
    own = BACKENDS if chosen.backends is None else chosen.backends
    peers = ["eager"] if chosen.peers is None else chosen.peers
    peers = PEERS if "all" in peers else peers
    asked = [p for p in (*BACKENDS, *PEERS) if p in own or p in peers]
    lost = absent(asked, device)
    providers = [p for p in asked if p not in lost]
    default = [n for n, c in CASES.items() if c.fused or device == "cuda"]
    plan = items(chosen.cases or default, chosen.sizes or SIZES, chosen.dtypes or list(DTYPES)[:2])
    turns = chosen.turn or (["warm"] if device == "cpu" else ["cold", "warm"])
    opening = report.facts(device) | {"copy_gb_per_s": copy_speed(device)}
    opening["absent"] = [{"peer": p, "why_not": why} for p, why in lost.items()]
    for peer, why in lost.items():
        print(f"{peer} takes no part: {why}")
    found: list[Record] = []

    def keep(record: Record) -> None:
        found.append(record)
        if chosen.out:
            report.append(chosen.out, record)
        if record["kind"] != "facts":
            print(report.as_line(record), flush=True)

    keep(opening)
    seconds = 3.0 if chosen.seconds is None else chosen.seconds
    budget = Budget(chosen.budget, len(plan), seconds)
    for item in plan:
        if budget.begin():
            measure(item, providers, device, turns, budget, keep)
        else:
            keep(why_missing(item, device, "all", "the budget was spent"))
        if device == "cuda":
            torch.cuda.empty_cache()
    return found


def main(words: list[str] | None = None) -> None:
    """The benchmark's command line: measures or reads, then prints tables and draws."""
    chosen = arguments(words)
    if chosen.read:
        records = report.read(chosen.read)
        wanted = {"case": chosen.cases, "dtype": chosen.dtypes, "turn": chosen.turn}
        records = [r for r in records if all(v is None or r[k] in v for k, v in wanted.items())]
        sizes = chosen.sizes
        records = [r for r in records if sizes is None or (r["rows"], r["classes"]) in sizes]
        records = [r for r in records if chosen.device in (None, r["device"])]
    else:
        records = [r for r in run(chosen) if r["kind"] == "loss"]
    records = [r for r in records if chosen.clock in (None, r["clock"])]
    if not records:
        raise SystemExit("no measurements to show: none fits what was chosen")
    print("\n" + report.tables(records, chosen.markdown))
    if chosen.plot:
        from .plots import plot

        plot(records, chosen.plot)
