"""The machine code of CUDA kernels: their instructions, and those that a row's path takes.

cuobjdump and nvdisasm stand beside nvcc or in triton. A kernel is known by its mangled name.
"""

import functools
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CSRC = Path(__file__).resolve().parents[2] / "csrc/cuda"
OPS = (CSRC.parent / "losses/all.def").read_text()
LOSSES = tuple(re.findall(r"^KDFUSE_(?:TAUGHT|OTHER)\((\w+)", OPS, re.MULTILINE))
TAUGHT = dict(re.findall(r"^KDFUSE_TAUGHT\((\w+), (\w+)\)", OPS, re.MULTILINE))
TYPES = ("f32", "f64", "bf16", "f16")  # as in csrc/core/types.h
Place = tuple[str, int]  # a file's name and a line of it


@dataclass(frozen=True)
class Kernel:
    """kind: as in csrc/cuda/kernels.h. variant: labels, none ("bare") or class probabilities
    ("soft"); labels beside a teacher of another type ("mixed") or "two"; the number of SL-Ts."""

    kind: str
    loss: str
    type: str
    variant: str = "labelled"

    def __str__(self) -> str:
        return "-".join((self.kind, self.loss, self.type, self.variant))


@dataclass(frozen=True)
class Instruction:
    at: int
    name: str  # with its modifiers: "LDG.E.128.CONSTANT"
    condition: str = ""  # of a jump: "@!P0", "UP0", or ""
    target: int | None = None  # of a jump
    places: frozenset[Place] = frozenset()  # the line, and those that it was inlined from
    operands: str = ""

    @property
    def jumps(self) -> bool:
        """Lanes that stand apart (BRA.DIV) come together elsewhere and return."""
        return self.name in ("BRA", "BRA.U", "BRA.CONV")


def tool(name: str) -> str | None:
    """The path of cuobjdump or nvdisasm."""
    nvcc = shutil.which("nvcc")
    near = [Path(os.path.realpath(nvcc)).parent] if nvcc else []
    triton = importlib.util.find_spec("triton")
    if triton and triton.origin:
        near.append(Path(triton.origin).parent / "backends/nvidia/bin")
    places = [shutil.which(name), *(str(folder / name) for folder in near)]
    return next((p for p in places if p and Path(p).is_file()), None)


def said_by(name: str, *words: object) -> str:
    command = [tool(name), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def kernel_of(mangled: str) -> Kernel | None:
    """None: no kernel of rows."""
    kind = re.search(r"\d((?:fast|general)_[a-z]+)I", mangled)
    if not kind:
        return None
    slkd = re.search(r"SlkdI?(?:KernelsI)?LNS_5DTypeE(\d)E(?:T_)?Li(\d)E", mangled)
    if slkd:
        return Kernel(kind[1], "slkd", TYPES[int(slkd[1])], slkd[2])
    names = {f"{len(facts)}{facts}": op for op, facts in {**TAUGHT, "tf_nkd": "TfNkd"}.items()}
    facts = "|".join(names)
    student = re.search(
        rf"NS_({facts})ENS_5ShapeILNS_5DTypeE(\d)ELi1ELi(\d)ELNS_6LabelsE(\d)ELb([01])E", mangled
    )
    if student:
        loss, dtype, teachers, labels, other = student.groups()
        variant = ("bare", "labelled", "soft")[int(labels)]
        if teachers == "2":
            variant = "two"
        elif other == "1" and variant != "soft":
            variant = "mixed"
        return Kernel(kind[1], names[loss], TYPES[int(dtype)], variant)
    row = re.search(
        rf"7GeneralI([fd])NS_.*?(?:10taught_rowINS_({facts})E|\d([a-z_]+)_rowI)", mangled
    )
    assert row, f"no known kernel: {mangled}"
    return Kernel(kind[1], names.get(row[2], row[3]), "f32" if row[1] == "f" else "f64", "any")


@functools.cache
def resources(binary: str, arch: str) -> dict[Kernel, dict[str, int]]:
    """REG, STACK, LOCAL, SHARED, ... of each kernel of rows."""
    found = {}
    text = said_by("cuobjdump", "-res-usage", "-arch", arch, binary)
    for name, numbers in re.findall(r"Function (\S+):\n\s+(.+)", text):
        kernel = kernel_of(name)
        if kernel:
            values = re.findall(r"([A-Z]+)(?:\[\d\])?:(\d+)", numbers)
            found[kernel] = {k: int(v) for k, v in values}
    return found


INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ +)?([A-Z0-9_.]+)([^;]*);", re.ASCII)


@functools.cache
def names(binary: str, arch: str, only: tuple[Kernel, ...] = ()) -> dict[Kernel, list[str]]:
    """The instructions of each kernel of rows in order, without NOP, by name alone.

    only: these kernels, in a fraction of the time that all of them take.
    """
    found = {}
    words = ["-sass", "-arch", arch]
    if only:
        usage = said_by("cuobjdump", "-res-usage", "-arch", arch, binary)
        mangled = re.findall(r"Function (\S+):\n", usage)
        words += ["-fun", ",".join(name for name in mangled if kernel_of(name) in only)]
    text = said_by("cuobjdump", *words, binary)
    for part in text.split("Function : ")[1:]:
        kernel = kernel_of(part.split("\n", 1)[0])
        if kernel:
            found[kernel] = [m[2] for m in INSTRUCTION.findall(part) if m[2] != "NOP"]
    return found


def listing(cubin: Path) -> dict[Kernel, list[Instruction]]:
    """The kernels of rows of a cubin made with -lineinfo, in full."""
    found = {}
    text = said_by("nvdisasm", "-gi", "-c", cubin)
    for part in re.split(r"^\.text\.", text, flags=re.MULTILINE)[1:]:
        kernel = kernel_of(part.split(":", 1)[0])
        if kernel:
            found[kernel] = _instructions(part.split("\n"))
    return found


PLACE = re.compile(r'File "([^"]+)", line (\d+)(?: inlined at "([^"]+)", line (\d+))?')


def _instructions(lines: list[str]) -> list[Instruction]:
    labels: dict[str, int] = {}
    waiting: list[str] = []
    raw = []
    places: set[Place] = set()
    fresh = True
    for line in lines:
        place = PLACE.search(line) if line.lstrip().startswith("//##") else None
        if place:
            if fresh:
                places, fresh = set(), False
            for path, number in ((place[1], place[2]), (place[3], place[4])):
                if path:
                    places.add((Path(path).name, int(number)))
            continue
        label = re.match(r"(\.L_\w+):", line)
        if label:
            waiting.append(label[1])
        found = INSTRUCTION.search(line)
        if found:
            at = int(found[1], 16)
            labels.update(dict.fromkeys(waiting, at))
            waiting.clear()
            fresh = True
            to = re.search(r"(!?UP\d, )?`\((\.L_\w+)\)", found[4])
            condition = (found[2] or "") + (to[1] or "" if to else "")
            raw.append((at, found[3], condition, to and to[2], frozenset(places), found[4].strip()))
    return [
        Instruction(at, name, condition.strip(), labels.get(to or ""), where, operands)
        for at, name, condition, to, where, operands in raw
        if name != "NOP"
    ]


def lines_of(file: str, function: str) -> set[Place]:
    """The lines of every function of that name that `file` of csrc/cuda defines."""
    lines = (CSRC / file).read_text().split("\n")
    found: set[Place] = set()
    marks = "KDFUSE_(?:HD|MEMBER|DEVICE|DEVICE_MEMBER)|__device__"
    for first, line in enumerate(lines):
        if not re.match(rf"\s*(?:{marks}) .*\b{function}\(", line):
            continue
        depth = 0
        for last in range(first, len(lines)):
            depth += lines[last].count("{") - lines[last].count("}")
            found.add((file, last + 1))
            if depth == 0 and "}" in lines[last]:
                break
    assert found, f"csrc/cuda/{file} defines no {function}()"
    return found


def line_of(file: str, text: str) -> Place:
    """The one line of a file of csrc/cuda that holds `text`."""
    found = [n for n, x in enumerate((CSRC / file).read_text().split("\n"), 1) if text in x]
    assert len(found) == 1, f"{len(found)} lines of csrc/cuda/{file} hold {text!r}"
    return file, found[0]


def loop_of(code: list[Instruction], line: Place) -> list[Instruction]:
    """The loop around the statement at `line`: from its first instruction to its jump back."""
    jumps = [i for i in code if i.jumps and i.target is not None and line in i.places]
    back = [(i.at - i.target, i) for i in jumps if i.target is not None and i.target <= i.at]
    assert back, f"no loop at {line}"
    end = max(back, key=lambda found: found[0])[1]
    assert end.target is not None
    return [i for i in code if end.target <= i.at <= end.at]


def moves_one(i: Instruction) -> bool:
    """Whether it moves less than 16 bytes from or to global memory."""
    return i.name.startswith(("LDG", "STG")) and ".128" not in i.name


def row_path(
    loop: list[Instruction],
    beside: set[Place],
    shunned: Callable[[Instruction], bool] = lambda _: False,
) -> list[Instruction]:
    """The instructions of a turn of the loop that goes round inner loops and shunned instructions,
    leaves out what it can of what stands `beside` the path (lines of functions), and runs through
    all it can of the rest.
    """
    blocks = _blocks(loop)
    starts = [block[0].at for block in blocks]
    inner = {m for n in range(len(blocks) - 1) for m in _turns(blocks, starts, n)}
    ahead: dict[int, tuple[int, int | None]] = {}  # what a block and all after it weigh; the next
    for n in reversed(range(len(blocks))):
        ways = [m for m in _ways(blocks, starts, n) if m in ahead]
        if not ways and n + 1 < len(blocks):
            continue  # leads out of the loop
        then = max(ways, key=lambda m: ahead[m][0], default=None)
        weight = sum(-1 if i.places & beside else 1 for i in blocks[n])
        weight -= len(loop) * (n in inner or any(map(shunned, blocks[n])))
        ahead[n] = weight + (ahead[then][0] if then is not None else 0), then
    path: list[Instruction] = []
    at: int | None = 0
    while at is not None:
        assert at not in inner, f"a loop at {sorted(blocks[at][-1].places)} on the path of a row"
        path += blocks[at]
        at = ahead[at][1]
    return path


def _blocks(loop: list[Instruction]) -> list[list[Instruction]]:
    starts = {i.target for i in loop}
    blocks: list[list[Instruction]] = []
    ends = True
    for i in loop:
        if ends or i.at in starts:
            blocks.append([])
        blocks[-1].append(i)
        ends = i.jumps or i.name.startswith(("CALL", "EXIT", "RET"))
    return blocks


def _ways(blocks: list[list[Instruction]], starts: list[int], n: int) -> list[int]:
    """The blocks that may follow block n, of those that lie ahead of it."""
    last = blocks[n][-1]
    leaves = last.name.startswith(("EXIT", "RET")) or (last.jumps and last.condition == "")
    ways = [] if leaves or n + 1 == len(blocks) else [n + 1]
    if last.jumps and last.target in starts[n + 1 :]:
        ways.append(starts.index(last.target))
    return ways


def _turns(blocks: list[list[Instruction]], starts: list[int], n: int) -> range:
    """The blocks of the loop that block n ends, if it does."""
    last = blocks[n][-1]
    if last.jumps and last.target in starts[: n + 1]:
        return range(starts.index(last.target), n + 1)
    return range(0)
