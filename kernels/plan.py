"""In which order a benchmark measures, and how its time is shared out."""

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Item:
    """One case on (rows, classes) logits of one type, by all providers."""

    case: str
    rows: int
    classes: int
    dtype: str

    def facts(self) -> dict[str, str | int]:
        size: dict[str, str | int] = {"rows": self.rows, "classes": self.classes}
        return {"case": self.case, **size, "dtype": self.dtype}


def items(cases: Sequence[str], sizes: Sequence[tuple[int, int]], dtypes: Sequence[str]):
    """Every combination; those first whose parts stand first in the three lists."""
    places = itertools.product(range(len(cases)), range(len(sizes)), range(len(dtypes)))
    return [Item(cases[c], *sizes[s], dtypes[d]) for c, s, d in sorted(places, key=sum)]


class Budget:
    """Seconds for a whole run, shared evenly among the items that are still to come.

    A provider's set-up (compiling, above all) may take half of an item's share; one that took
    longer before is left out of the item. Without a budget every share is endless.
    """

    def __init__(
        self, seconds: float | None, count: int, now: Callable[[], float] = time.perf_counter
    ) -> None:
        self.now = now
        self.end = math.inf if seconds is None else now() + seconds
        self.left = count
        self.start = now()
        self.share = math.inf
        self.set_up: dict[str, float] = {}  # the longest set-up of each provider

    def begin(self) -> bool:
        """Whether there is time for one item more; opens its share."""
        self.start = self.now()
        self.share = (self.end - self.start) / max(self.left, 1)
        self.left -= 1
        return self.share > 0

    def spent(self) -> float:
        return self.now() - self.start

    def why_not(self, provider: str) -> str:
        """Why a provider's set-up does not fit into the item's share, "" where it does."""
        longest = self.set_up.get(provider, 0.0)
        if self.spent() + longest <= self.share / 2:
            return ""
        return (
            f"the budget: its set-up has taken {longest:.1f} s before, "
            f"and half of this item's {self.share:.1f} s had {self.spent():.1f} s spent"
        )

    def took(self, provider: str, seconds: float) -> None:
        self.set_up[provider] = max(seconds, self.set_up.get(provider, 0.0))
