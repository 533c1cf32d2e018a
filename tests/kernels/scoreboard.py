"""How long the warps of a team take for a path of machine code: issue in order, results after
their latency, pipes that are busy for a while, barriers. Of one of an SM's four parts.
"""

import re
from dataclasses import dataclass, field

from gpus import L2, LATENCY, MEETING, PIPES
from sass import Instruction

REGISTER = re.compile(r"\b(U?[RP])(\d+)(\.64)?\b")
DOUBLE = re.compile(r"D(ADD|MUL|FMA|SETP)|F2F\.F64|MUFU\.\w*64")
SPECIAL = ("MUFU", "F2F", "F2I", "I2F", "FRND")
SHARED = ("SHFL", "LD", "ST", "ATOM", "RED")
FP32 = ("FFMA", "FADD", "FMUL", "IMAD", "HFMA2", "HADD2", "HMUL2")
FREE = ("LDC", "LDGDEPBAR", "LDCU")  # constants and what else begins like an access
FETCH = ("LDGSTS", "UBLKCP")


def pipe(name: str) -> str:
    """What an instruction keeps busy."""
    if name.startswith(FREE):
        return "issue"
    if name.startswith("D") and DOUBLE.match(name):
        return "double"
    for pipe, names in (("special", SPECIAL), ("shared", SHARED), ("fp32", FP32)):
        if name.startswith(names):
            return pipe
    control = ("U", "B", "S2", "CS2R", "EXIT", "MEMBAR", "ERRBAR", "CGAERRBAR", "CCTL", "DEPBAR")
    return "issue" if name.startswith(control) else "alu"


def holds(name: str, fp32_lanes: int) -> int:
    """Cycles of its pipe."""
    kind = pipe(name)
    if kind == "fp32":
        return 128 // fp32_lanes
    return PIPES[kind] * (4 if kind == "shared" and ".128" in name else 1)


def latency(name: str) -> int:
    if name.startswith(("LDG.", "MEMBAR.ALL.GPU", "MEMBAR.SC.GPU")):
        return L2
    return LATENCY[pipe(name)]


def registers(name: str, operands: str, condition: str) -> tuple[set[str], set[str]]:
    """What an instruction writes, and what it reads."""
    parts = [part.strip() for part in operands.split(",")]
    leading = 1
    if "SETP" in name or name.startswith("SHFL") or name.startswith("R2P"):
        leading = 2
    while leading < len(parts) and re.fullmatch(r"U?P\d", parts[leading]):
        leading += 1  # a carry
    if name.startswith(("ST", "LDGSTS", "BAR", "BRA", "RED", "MEMBAR", "UBLKCP")):
        leading = 0
    wide = 4 if ".128" in name else 2 if ".64" in name or DOUBLE.match(name) else 1
    written = _named(",".join(parts[:leading]), wide if not name.startswith("LDGSTS") else 1)
    read = _named(",".join(parts[leading:]), wide if name.startswith(("ST", "D")) else 1)
    return written, read | _named(condition, 1)


def _named(text: str, wide: int) -> set[str]:
    found = set()
    for kind, number, pair in REGISTER.findall(text):
        count = 1 if kind.endswith("P") else max(wide, 2 if pair else 1)
        found |= {f"{kind}{int(number) + k}" for k in range(count)}
    return found


@dataclass
class _Warp:
    at: int = 0  # the next instruction
    free: int = 0  # from when on it may issue
    ready: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Chain:
    """Cycles from the begin of a path until all copies of the next row are sent for, and in all."""

    open: int
    all: int


def chain(path: list[Instruction], warps: int, fp32_lanes: int) -> Chain:
    """warps: of a team in one part of an SM, which alone is at work."""
    code = [(i.name, *registers(i.name, i.operands, i.condition)) for i in path]
    fetches = [k for k, i in enumerate(path) if i.name.startswith(FETCH)]
    team, busy = [_Warp() for _ in range(warps)], dict.fromkeys((*PIPES, "fp32"), 0)
    slot = opened = 0
    while any(w.at < len(code) for w in team):
        waiting = [w for w in team if w.at < len(code)]
        if all(code[w.at][0].startswith(tuple(MEETING)) for w in waiting):
            name = code[waiting[0].at][0]
            cost = next(c for start, c in MEETING.items() if name.startswith(start))
            met = max(w.free for w in waiting) + cost
            for w in waiting:
                w.at, w.free = w.at + 1, met
            continue
        ways = [w for w in waiting if not code[w.at][0].startswith(tuple(MEETING))]
        times = [_earliest(w, code[w.at], busy) for w in ways]
        at, w = min(zip(times, ways, strict=True), key=lambda both: both[0])
        at = max(at, slot)
        name, written, _ = code[w.at]
        if fetches and w.at == fetches[-1]:
            opened = max(opened, at)
        busy[pipe(name)] = at + holds(name, fp32_lanes)
        w.ready.update(dict.fromkeys(written, at + latency(name)))
        slot, w.at, w.free = at + 1, w.at + 1, at + (L2 if name.startswith("MEMBAR.ALL.GPU") else 1)
    ends = [max([w.free, *w.ready.values()]) for w in team]
    return Chain(opened, max(ends))


def _earliest(w: _Warp, instruction: tuple[str, set[str], set[str]], busy: dict[str, int]) -> int:
    name, written, read = instruction
    known = [w.ready[r] for r in read | written if r in w.ready]
    return max([w.free, busy[pipe(name)], *known])
