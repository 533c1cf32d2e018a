"""What compiling is worth on this machine, in words of a recipe: of one table's records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ....kernels.bench.report import Record

KEY = "run.compile="
ROLES = {"student": "student", "teacher": "teacher", "slt": "slts"}  # by part: in run.compile_only


@dataclass(frozen=True)
class Times:
    """Milliseconds of a step, over its blocks."""

    p20: float
    median: float
    p80: float


@dataclass(frozen=True)
class Gain:
    compiled: Times
    eager: Times

    @property
    def times(self) -> float:
        return self.eager.median / self.compiled.median

    @property
    def pays(self) -> bool:
        return self.compiled.p80 < self.eager.p20

    @property
    def costs(self) -> bool:
        return self.eager.p80 < self.compiled.p20

    def __str__(self) -> str:
        unclear = "" if self.pays or self.costs else " (p20-p80 overlap)"
        return f"{self.times:.2f}{unclear}"


def sentence(group: Sequence[Record]) -> str | None:
    """Whether compiling pays, and what a recipe has to say for it; None where nobody asked.

    It pays for a network, or a case, whose blocks it moves beyond those without it: the slower of
    the compiled (p80) are faster than the faster of the eager (p20).
    """
    found: dict[str, Gain] = {}
    for one, other in pairwise(group):
        alone = [word.startswith(KEY) for word in other.get("beside", ())] == [True]
        if alone and one["case"] == other["case"] and one["compile"] != other["compile"]:
            compiled, eager = (other, one) if other["compile"] else (one, other)
            found |= gains(compiled, eager)
    if not found:
        return None
    words = settings(found)
    said = f"pays here: {words}" if words else f"{KEY}true does not pay here"
    names = sorted(found, key=lambda name: name not in ROLES)  # networks, then all together
    return f"{said}; once compiled, over eager: {', '.join(f'{n} {found[n]}' for n in names)}"


def gains(compiled: Record, eager: Record) -> dict[str, Gain]:
    """Of each network that the case is made of, and of the case, by name."""
    parts = {
        part: Gain(times(compiled, part), times(eager, part))
        for part in compiled.get("parts_ms", ())
    }
    return parts | {compiled["case"]: Gain(times(compiled), times(eager))}


def times(record: Record, part: str | None = None) -> Times:
    found = (record[f"{'parts' if part else 'step'}_ms{q}"] for q in ("_p20", "", "_p80"))
    return Times(*(of[part] if part else of for of in found))


def settings(found: dict[str, Gain]) -> str | None:
    """The words of a recipe with which it pays; None: there are none."""
    roles = [name for name in ROLES if name in found]
    paying = [name for name in roles if found[name].pays]
    cases = [gain.pays for name, gain in found.items() if name not in ROLES]
    if cases and paying in ([], roles):  # all networks or none: as the cases were measured
        return f"{KEY}true" if all(cases) else None
    only = ",".join(ROLES[name] for name in paying)
    return f"{KEY}true run.compile_only=[{only}]" if only else None
