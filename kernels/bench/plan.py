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

    Once they are spent no item is begun. Within an item a provider whose set-up (compiling, above
    all) would not leave `seconds` of its share for the timing is left out, but for kdfuse's
    kernels and eager PyTorch. Without a budget every share is endless.
    """

    ALWAYS = ("cpu", "cuda", "triton", "eager")

    def __init__(
        self,
        total: float | None,
        count: int,
        seconds: float,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.now = now
        self.start = now()
        self.end = math.inf if total is None else self.start + total
        self.left = count
        self.seconds = seconds
        self.share = math.inf
        self.set_up: dict[str, float] = {}  # what each provider's set-up took the last time

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
        last = self.set_up.get(provider, 0.0)
        if provider in self.ALWAYS or self.spent() + last + self.seconds <= self.share:
            return ""
        return (
            f"the budget: of {self.share:.1f} s for this item {self.spent():.1f} s were spent, its "
            f"last set-up took {last:.1f} s, and {self.seconds:.1f} s are for the timing"
        )

    def took(self, provider: str, seconds: float) -> None:
        self.set_up[provider] = seconds
