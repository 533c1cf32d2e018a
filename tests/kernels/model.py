"""Writes docs/results/model.md: what the CUDA kernels should take, before any measurement.

    python tests/kernels/model.py --out docs/results/model.md

needs nvcc with cuobjdump and nvdisasm, and a C++ compiler for the launcher (tests/simulator); about
two minutes. `--cache FOLDER` keeps what it compiles, for one state of the code.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/simulator"), str(ROOT / "tests")]

import gpus  # noqa: E402
import launches  # noqa: E402
import prediction  # noqa: E402
import row_code  # noqa: E402
import simulator  # noqa: E402
from gpus import GPUS, Gpu  # noqa: E402
from launches import Launch, Size  # noqa: E402
from prediction import Prediction  # noqa: E402
from row_code import Code  # noqa: E402
from sass import Kernel  # noqa: E402

WORDS = Path(__file__).with_name("model_page.md")  # numbers come in the place of @NAMES@
SHAPES = ((256, 1000), (1024, 1000), (4096, 1000), (1024, 21841), (8192, 32000), (4096, 128256))
SIZES = tuple(Size("kd", *shape, dtype) for shape in SHAPES for dtype in launches.TYPES)
SIZES += (Size("slkd", 8192, 32000, "bf16"),)
DIRECTION = 5.0  # us: the goal of a direction at small sizes
# Share of a copy's speed, forward and backward.
GOALS = {(8192, 32000): 0.85, (4096, 128256): 0.85, (1024, 21841): 0.75, (4096, 1000): 0.70}
OF_SLKD = 0.80
OFF_BY, OFF_BY_US = 0.2, 2.0  # what a prediction may be off by, and is still right

Found = dict[str, list[tuple[Size, Launch, Prediction | None]]]


def goal(size: Size) -> float | None:
    """None: the goal is a time."""
    return OF_SLKD if size.loss == "slkd" else GOALS.get((size.rows, size.classes))


def verdict(p: Prediction) -> str:
    """Undecided: nearer to the goal than the model claims to be right."""
    of = goal(p.size)
    if of is None:
        time = max(p.forward, p.backward)
        met, near = time <= DIRECTION, abs(time - DIRECTION) <= OFF_BY_US
        return f"{DIRECTION:g} us: {_said(met, near)}"
    near = abs(p.share_of_both - of) <= OFF_BY * p.share_of_both
    return f"{of:.0%}: {_said(p.share_of_both >= of, near)}"


def _said(met: bool, near: bool) -> str:
    return "undecided" if near else "met" if met else "**missed**"


def two(x: float) -> str:
    """Two significant digits."""
    return f"{float(f'{x:.2g}'):,.0f}" if abs(x) >= 10 else f"{float(f'{x:.2g}'):g}"


def kb(x: float) -> str:
    return two(x / 1024)


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *([str(x) for x in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def facts(codes: dict[Kernel, Code]) -> launches.Facts:
    def of(kernel: Kernel) -> tuple[int, int]:
        """The general kernels are not modelled: as the simulator has them."""
        found = codes.get(kernel)
        return (found.registers, found.shared) if found else (168, 5648)

    return of


def predictions(cache: Path) -> tuple[Found, dict[str, dict[Kernel, Code]]]:
    library = cache / "simulator.so"
    if not library.exists():
        simulator.build(cache)
    found, codes = {}, {}
    for name, gpu in GPUS.items():
        of = codes[gpu.arch] = row_code.codes(gpu.arch, gpu.fp32_lanes, cache)
        found[name] = []
        for size in SIZES:
            launch = launches.ask(library, name, size, facts(of))
            modelled = prediction.is_modelled(launch.kernel)
            made = prediction.predict(gpu, size, launch, of[launch.kernel]) if modelled else None
            found[name].append((size, launch, made))
    return found, codes


def constants() -> str:
    fields: list[tuple[str, Callable[[Gpu], object]]] = [
        ("SMs", lambda g: g.sms),
        ("clock, GHz", lambda g: g.clock),
        ("datasheet bandwidth, TB/s", lambda g: g.datasheet),
        ("copy, TB/s, read and written", lambda g: g.copy),
        ("L2, MB", lambda g: g.cache),
        ("float32 results of an SM in a cycle", lambda g: g.fp32_lanes),
        ("KB in flight an SM that CCCL asks for", lambda g: kb(g.asked_bytes)),
        ("SMs of each GPC", lambda g: " ".join(map(str, g.clusters))),
        ("shared memory of an SM, KB", lambda g: g.memory_of_sm >> 10),
        ("`near`: latency of memory alone, us", lambda g: g.near),
        ("`loaded`: the same at a copy's rate, us", lambda g: g.loaded),
        ("`launch`, us", lambda g: g.launch),
    ]
    sizes = table(["", *GPUS], ([what, *map(of, GPUS.values())] for what, of in fields))
    latencies = ", ".join(f"{k} {v}" for k, v in {**gpus.LATENCY, **gpus.MEETING}.items())
    pipes = ", ".join(f"{k} {v}" for k, v in gpus.PIPES.items())
    return f"""{sizes}

Cycles for which an instruction of a warp holds its pipe, of which an SM has four of a kind:
{pipes}, fp32 128 by the results above;
128-bit accesses four times as long. Cycles until a result can be read:
{latencies}, a load from L2 and a fence {gpus.L2}.
An SM takes {gpus.INGEST} bytes a cycle from L2 (assumed).

{table(["constant", "where it is from"], gpus.SOURCES)}"""


def of_code(codes: dict[str, dict[Kernel, Code]]) -> str:
    rows = []
    for arch, of in codes.items():
        for kernel, code in sorted(of.items(), key=lambda both: str(both[0])):
            rows += [of_kernel(arch, kernel, code)]
            for n, loop in enumerate(code.loops, 1):
                chain = loop.chain(2).all
                rows += [
                    (arch, f"... its {n}. read, a turn", "", len(loop.code), "", "", two(chain))
                ]
    head = "code kernel registers instructions without_chunks open all".split()
    return table([x.replace("_", " ") for x in head], rows)


def of_kernel(arch: str, kernel: Kernel, code: Code) -> tuple[object, ...]:
    warps = 1 if kernel.kind == "fast_warps" else 2
    chain = code.row.chain(warps)
    fixed = "" if code.loops else len(code.fixed.code)
    opened = "" if code.loops else two(chain.open)
    return arch, kernel, code.registers, len(code.row.code), fixed, opened, two(chain.all)


def of_paths(found: Found) -> str:
    rows = []
    for name, these in found.items():
        for size, l, p in these:
            shape = f"{l.blocks} x {l.threads}" + (f" in {l.cluster}" if l.cluster > 1 else "")
            flight = (
                [kb(p.in_flight), kb(prediction.asked_in_flight(p.gpu, size))] if p else ["", ""]
            )
            rounds = p.rounds if p else -(-size.rows // l.teams)
            rows += [(name, size, l.kernel.kind, shape, kb(l.bytes), l.resident, rounds, *flight)]
    head = ["GPU", "call", "kernel", "blocks x threads", "KB of a block", "blocks an SM", "rounds"]
    return table([*head, "KB in flight an SM", "Little asks for"], rows)


def of_times(these: Iterable[tuple[Size, Launch, Prediction | None]]) -> str:
    head = ["call", "memory", "issue", "busiest pipe", "latency", "first + tail", "**forward**"]
    head += ["backward", "share, forward", "**share, both**", "goal", "binds"]
    rows = []
    for size, launch, p in these:
        if p is None:
            rows += [(size, *[""] * 9, "", f"{launch.kernel.kind}: not modelled")]
            continue
        other = next(k for k in p.limits if k not in ("memory", "issue", "latency"))
        times = [two(p.limits["memory"]), two(p.limits["issue"])]
        times += [f"{two(p.limits[other])} ({other})", two(p.limits["latency"])]
        times += [two(p.first + p.tail), f"**{two(p.forward)}**", two(p.backward)]
        shares = [f"{p.share:.0%}", f"**{p.share_of_both:.0%}**"]
        rows += [(size, *times, *shares, verdict(p), p.binds)]
    return table(head, rows)


def by_hand(p: Prediction) -> str:
    """One row of the tables, with its numbers in the formulas."""
    g, row, l, size = p.gpu, p.row, p.launch, p.size
    elements, limits = size.inputs + size.gradients, p.limits
    ingest = row.in_flight / row.stages / gpus.INGEST / g.clock / 1e3
    way = f"({two(row.open)} + {g.loaded} + {two(ingest)}) / {row.stages}"
    count = f"{elements} x {size.rows} x {size.classes} x {launches.BYTES[size.type]} bytes"
    copied = two(prediction.needed(size) / prediction.rate(g))
    lines = [
        f"memory: {count} by {g.copy} TB/s: {two(limits['memory'])} us",
        f"rounds: {size.rows} rows by {l.blocks} / {l.cluster} = {l.teams} teams: {p.rounds}",
        f"issue: {p.rounds} rounds x {-(-l.threads // 128)} warps of a scheduler x "
        f"{row.busy['issue']:.0f} instructions by {g.clock} GHz: {two(limits['issue'])} us",
        f"period: max({two(row.all)}, {way}) = {two(prediction.period(g, row))} us",
        f"latency: that {p.rounds} times: {two(limits['latency'])} us",
        f"forward: {g.launch} + {two(p.first)} + {two(max(limits.values()))} + {two(p.tail)} = "
        f"{two(p.forward)} us",
        f"copy: {g.launch} + {g.near} + {copied} = {two(p.copy)} us",
        f"share of both: {two(p.copy)} / ({two(p.forward)} + {two(p.backward)}) = "
        f"{p.share_of_both:.0%}",
    ]
    return "\n".join(f"- {line}" for line in lines)


def page(found: Found, codes: dict[str, dict[Kernel, Code]], made_of: str) -> str:
    times = "\n\n".join(f"### {name}\n\n{of_times(these)}" for name, these in found.items())
    example = next(p for s, _, p in found["H100"] if (s.classes, s.type) == (32000, "bf16"))
    assert example
    parts = {
        "MADE_OF": made_of,
        "CONSTANTS": constants(),
        "CODE": of_code(codes),
        "PATHS": of_paths(found),
        "TIMES": times,
        "EXAMPLE": f"{example.size} on an H100:\n\n{by_hand(example)}",
    }
    text = WORDS.read_text()
    for key, value in parts.items():
        text = text.replace(f"@{key}@", value)
    return text


def commit() -> str:
    """With a mark where the kernels are others than it has."""
    said = [["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "csrc"]]
    of, changed = (
        subprocess.run(["git", "-C", ROOT, *x], capture_output=True, text=True, check=True).stdout
        for x in said
    )
    return of.strip() + (" and changes in csrc" if changed else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--cache", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found, codes = predictions(options.cache or Path(folder))
        text = page(found, codes, f"nvcc {row_code.nvcc()} from commit {commit()}")
    if options.out:
        options.out.write_text(text)
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    main()
