"""Times the fused losses against eager and compiled PyTorch, in one run, with a copy beside them.

A measurement is one forward and backward through autograd. The providers take turns, so that a
drift of the machine meets all of them. A warm turn is two calls that are not counted, since in
training the logits have just been written, and four that are; a cold one is a single call, which
finds the caches as the provider before left them. Medians are reported, with the time of a copy
that reads and writes as many bytes as the loss has to.
"""

import argparse
import functools
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import backends
from .peers import CASES, Case

SIZES = ["256x1000", "1024x1000", "4096x1000", "1024x21841"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PROVIDERS = ("fused", "eager", "compiled", "copy")
# Calls of a turn, not counted and counted: on the provider's own caches, or on those of the last.
TURNS = {"warm": (2, 4), "cold": (0, 1)}
LEAST = 15  # samples: a median of fewer does not outlive a stall of the machine


def facts(device: str) -> dict[str, Any]:
    """What a number needs to be read: versions, machine, commit."""
    module, _ = backends.compiled()
    root = Path(__file__).resolve().parent.parent
    command = ["git", "-C", str(root), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "kind": "facts",
        "commit": commit or None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "simd": module.level() if module else None,
        "compiler": module.compiler if module else None,
        "date": time.strftime("%Y-%m-%d"),
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def gradients(loss: Callable[..., Any], trained: list[Tensor], arguments: list[Tensor]) -> Any:
    value = loss(*arguments)
    return value, torch.autograd.grad(value, trained)


def error(loss: Callable[..., Any], case: Case, arguments: list[Tensor]) -> float:
    """Largest gradient error against the eager form in float64, over the largest gradient."""
    exact = [a.detach().double() if a.is_floating_point() else a for a in arguments]
    exact = [a.requires_grad_() if k < case.trained else a for k, a in enumerate(exact)]
    _, truth = gradients(case.eager, exact[: case.trained], exact)
    _, made = gradients(loss, arguments[: case.trained], arguments)
    worst = max((m.double() - t).abs().max() for m, t in zip(made, truth, strict=True))
    return float(worst / max(t.abs().max() for t in truth))


def quantile(times: list[float], q: float) -> float:
    return sorted(times)[min(int(q * len(times)), len(times) - 1)]


def measure(
    name: str,
    rows: int,
    classes: int,
    dtype: torch.dtype,
    peers: list[str],
    budget: float,
    device: str = "cpu",
    turn: str = "warm",
) -> list[dict[str, Any]]:
    """One row a provider: times in ms, GB/s by the byte model, share of the copy's speed."""
    case = CASES[name]
    torch.manual_seed(0)
    logits = list(case.logits(rows, classes, dtype, device))
    arguments = [*logits, torch.randint(classes, (rows,)).to(device)]
    trained = logits[: case.trained]
    traffic = case.elements * rows * classes * dtype.itemsize
    source = torch.randn(traffic // 8, device=device)
    sink = torch.empty_like(source)
    fused_loss = functools.partial(case.fused, backend=device)
    losses: dict[str, Callable[..., Any]] = {"fused": fused_loss, "eager": case.eager}
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    if "compiled" in peers:
        torch._dynamo.reset()
        losses["compiled"] = torch.compile(case.eager, dynamic=False)
    calls: dict[str, Callable[[], Any]] = {
        p: functools.partial(gradients, losses[p], trained, arguments)
        for p in PROVIDERS
        if p in losses and (p in peers or p == "fused")
    }
    calls["copy"] = lambda: sink.copy_(source)
    for call in calls.values():
        call()
        call()
    uncounted, counted = TURNS[turn]
    times: dict[str, list[float]] = {p: [] for p in calls}
    start = time.perf_counter()
    while len(times["copy"]) < LEAST or time.perf_counter() - start < budget:
        for provider, call in calls.items():
            for _ in range(uncounted):  # the last provider's data leaves the caches
                call()
            for _ in range(counted):
                wait()
                began = time.perf_counter()
                call()
                wait()
                times[provider].append(time.perf_counter() - began)
        if len(times["copy"]) >= 400:
            break
    copy, fused = quantile(times["copy"], 0.5), quantile(times["fused"], 0.5)
    out = []
    for provider, seconds in times.items():
        median = quantile(seconds, 0.5)
        record = {"kind": "loss", "case": name, "rows": rows, "classes": classes}
        record |= {
            "device": device,
            "turn": turn,
            "dtype": str(dtype).removeprefix("torch."),
            "provider": provider,
        }
        record |= {"median_ms": median * 1e3, "p20_ms": quantile(seconds, 0.2) * 1e3}
        record |= {"p80_ms": quantile(seconds, 0.8) * 1e3, "samples": len(seconds)}
        record |= {"model_bytes": traffic, "gb_per_s": traffic / median / 1e9}
        record |= {"share_of_copy": copy / median, "times_fused": median / fused}
        if provider in losses:
            record["gradient_error"] = error(losses[provider], case, arguments)
        out.append(record)
    return out


def table(records: list[dict[str, Any]]) -> str:
    """A line a case, size and type: the fused time, and how many times longer the peers take."""
    lines = [
        f"{'loss':10} {'size':>12} {'type':9} {'fused ms':>9} {'eager':>7} {'compiled':>9} "
        f"{'of copy':>8} {'error':>9} {'eager err':>9}"
    ]
    found: dict[tuple, dict[str, dict]] = {}
    for r in records:
        key = (r["case"], r["rows"], r["classes"], r["dtype"])
        found.setdefault(key, {})[r["provider"]] = r
    for (name, rows, classes, dtype), by in found.items():
        ratio = {p: f"{by[p]['times_fused']:.1f}x" if p in by else "-" for p in PROVIDERS}
        fused = by["fused"]
        worst = f"{by['eager']['gradient_error']:.1e}" if "eager" in by else "-"
        lines.append(
            f"{name:10} {f'{rows}x{classes}':>12} {dtype:9} {fused['median_ms']:9.3f} "
            f"{ratio['eager']:>7} {ratio['compiled']:>9} {fused['share_of_copy']:8.0%} "
            f"{fused['gradient_error']:9.1e} {worst:>9}"
        )
    return "\n".join(lines)


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """Bars of the time over the fused one, a panel for each type."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    types = list(dict.fromkeys(r["dtype"] for r in records))
    figure, axes = plt.subplots(
        len(types), 1, figsize=(10, 3.2 * len(types)), squeeze=False, layout="constrained"
    )
    for axis, dtype in zip(axes[:, 0], types, strict=True):
        chosen = [r for r in records if r["dtype"] == dtype]
        labels = list(dict.fromkeys((r["case"], r["rows"], r["classes"]) for r in chosen))
        for k, provider in enumerate(("eager", "compiled")):
            found = {
                (r["case"], r["rows"], r["classes"]): r["times_fused"]
                for r in chosen
                if r["provider"] == provider
            }
            places = [(i + 0.4 * k, found[x]) for i, x in enumerate(labels) if x in found]
            if places:
                bars = axis.bar(*zip(*places, strict=True), width=0.38, label=provider)
                axis.bar_label(bars, fmt="%.0f", fontsize=7)
        axis.axhline(1, color="black", linewidth=1)
        axis.set_xticks(
            [i + 0.2 for i in range(len(labels))],
            [f"{c}\n{n} x {m}" for c, n, m in labels],
            fontsize=7,
        )
        axis.set_ylabel("time / fused time")
        axis.set_title(f"{dtype}, forward + backward", fontsize=9)
        axis.legend(fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    plt.close(figure)


def size(text: str) -> tuple[int, int]:
    try:
        rows, classes = (int(part) for part in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form 1024x1000") from None
    if rows < 1 or classes < 3:
        raise argparse.ArgumentTypeError(f"{text!r} needs at least 1 row and 3 classes")
    return rows, classes


def main(words: list[str] | None = None) -> None:
    """The benchmark's command line; prints a table, and writes JSON lines and a plot if asked."""
    parser = argparse.ArgumentParser(prog="kdfuse bench losses", description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--sizes", nargs="+", type=size, default=[size(s) for s in SIZES])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--peers", nargs="*", choices=["eager", "compiled"], default=["eager"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--turn", choices=TURNS, default="warm", help="whose caches a call finds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=3.0, help="a case, size and type takes")
    parser.add_argument("--out", type=Path, help="append JSON lines to this file")
    parser.add_argument("--plot", type=Path, help="draw the ratios into this file (.svg, .png)")
    chosen = parser.parse_args(words)
    reason = backends.backends()[chosen.device]
    if reason:
        raise RuntimeError(f"there is nothing fused to time on {chosen.device}: {reason}")
    torch.set_num_threads(chosen.threads)
    records = []
    for name in chosen.cases:
        for rows, classes in chosen.sizes:
            for dtype in chosen.dtypes:
                shape = (rows, classes, DTYPES[dtype])
                options = (chosen.peers, chosen.seconds, chosen.device, chosen.turn)
                records += measure(name, *shape, *options)
                print(table(records[-len(chosen.peers) - 2 :]).splitlines()[1], flush=True)
    print("\n" + table(records))
    if chosen.out:
        with chosen.out.open("a") as file:
            for record in (facts(chosen.device), *records):
                file.write(json.dumps(record) + "\n")
    if chosen.plot:
        plot(records, chosen.plot)


if __name__ == "__main__":
    main()
