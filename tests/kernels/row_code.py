"""What the compiled kernels of model.py say of a row: registers, instructions, chains.

modelled_rows.cu is compiled with -lineinfo; the path of a row is found as test_instructions.py
does. A path that is made for all chunks of a thread is cut where a row gives it fewer.
"""

import functools
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import sass
import scoreboard
from sass import CSRC, Instruction, Kernel, Place
from test_instructions import BESIDE, compile_cuda

SOURCE = Path(__file__).with_name("modelled_rows.cu")
EACH_CHUNK = "for (int u = 0; u < kChunks; ++u)"
# Of rows that are read twice: what few of their chunks go through, beside moves of single classes.
RARE = (
    ("two_pass.h", "drop_label"),
    ("two_pass.h", "move"),
)


@dataclass(frozen=True)
class Part:
    """Some instructions, for which the warps of a team run through them."""

    code: tuple[Instruction, ...]
    fp32_lanes: int

    @functools.cached_property
    def busy(self) -> dict[str, int]:
        """Cycles that a warp takes of each pipe; issue: the number of all instructions."""
        found = dict.fromkeys((*scoreboard.PIPES, "fp32"), 0)
        for i in self.code:
            found[scoreboard.pipe(i.name)] += scoreboard.holds(i.name, self.fp32_lanes)
        return {**found, "issue": len(self.code)}

    @functools.cache  # noqa: B019 (few of them live, as long as the program)
    def chain(self, warps: int) -> scoreboard.Chain:
        return scoreboard.chain(list(self.code), warps, self.fp32_lanes)


@dataclass(frozen=True)
class Code:
    """Of a kernel. row: a row with all its chunks, without its loops where it is read twice; plain:
    the same of a warp that sends nothing to other blocks; fixed: the row without what it does for
    each chunk; loops: of a row that is read twice."""

    registers: int
    shared: int  # bytes that the launcher does not ask for
    row: Part
    plain: Part
    fixed: Part
    loops: tuple[Part, ...] = ()

    @functools.cached_property
    def copied(self) -> int:
        """Bytes of a thread that it copies ahead in a row with all its chunks."""
        return 16 * sum(i.name.startswith(scoreboard.FETCH) for i in self.row.code)


def nvcc() -> str:
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"V[\d.]+", said)
    return found[0] if found else "unknown"


@functools.cache
def codes(arch: str, fp32_lanes: int, folder: Path) -> dict[Kernel, Code]:
    """Of the kernels of modelled_rows.cu; its cubin is made in `folder`, where there is none."""
    cubin = folder / f"{arch}.cubin"
    if not cubin.exists():
        done = compile_cuda(SOURCE, arch, cubin, "-lineinfo", "-cubin")
        assert done.returncode == 0, done.stderr
    used = sass.resources(str(cubin), arch)
    return {
        kernel: _code(kernel, code, used[kernel], fp32_lanes)
        for kernel, code in sass.listing(cubin).items()
        if len(code) > 100  # a kernel without code is a return
    }


def _code(kernel: Kernel, code: list[Instruction], used: dict[str, int], lanes: int) -> Code:
    around = sass.loop_of(code, sass.line_of("grid.h", "rows.run(row, ahead.take())"))
    beside = set().union(*(sass.lines_of(*function) for function in BESIDE))
    if kernel.kind in ("fast_blocks", "fast_clusters"):  # at T = 4
        beside.add(sass.line_of("coefficients.h", "if constexpr (squarings < 0)"))
    plain = sass.row_path(around, beside)
    row = fixed = sass.row_path(around, beside - sass.lines_of("team.h", "send"))
    loops: tuple[Part, ...] = ()
    if kernel.kind == "fast_streams":
        inside = around[:-1]  # the jump back of the loop over the rows may be of the second read
        rare = set().union(*(sass.lines_of(*function) for function in RARE))
        loops = tuple(
            Part(tuple(sass.row_path(sass.loop_of(inside, line), rare, sass.moves_one)), lanes)
            for line in map(_first_loop, ("sum_up", "write_gradient"))
        )
        assert all(map(_moves_and_makes, loops)), f"{kernel}: a turn that is none of its row's"
    else:
        chunks = _chunk_lines()
        fixed = [i for i in row if not i.places & chunks]
    parts = (Part(tuple(code), lanes) for code in (row, plain, fixed))
    return Code(used["REG"], used["SHARED"], *parts, loops)


def _moves_and_makes(turn: Part) -> bool:
    """Whether it reads a chunk of both inputs in 16 bytes for every three powers of each class."""
    names = [i.name for i in turn.code]
    moved = 16 * sum(name.startswith("LDG.E.128") for name in names)
    classes = names.count("MUFU.EX2") / 3
    return classes > 0 and moved in (2 * classes * 2, 2 * classes * 4)


def _first_loop(function: str) -> Place:
    """Of a function of rows that are read twice: the line of the loop over a row's chunks."""
    lines = (CSRC / "two_pass.h").read_text().split("\n")
    own = sorted(n for _, n in sass.lines_of("two_pass.h", function))
    return "two_pass.h", next(n for n in own if "< at.span.chunks;" in lines[n - 1])


@functools.cache
def _chunk_lines() -> set[Place]:
    """Of the loops over the chunks of a thread."""
    found: set[Place] = set()
    for path in CSRC.glob("*.h"):
        lines = path.read_text().split("\n")
        for first, line in enumerate(lines):
            if EACH_CHUNK in line:
                found |= {(path.name, n) for n in _block(lines, first)}
    assert found, "no loop over chunks in csrc/cuda"
    return found


def _block(lines: list[str], first: int) -> range:
    """The lines of a statement, counted from 1."""
    depth = 0
    for last in range(first, len(lines)):
        depth += lines[last].count("{") - lines[last].count("}")
        if depth == 0 and lines[last].rstrip().endswith((";", "}")):
            return range(first + 1, last + 2)
    raise AssertionError("a statement without an end")
