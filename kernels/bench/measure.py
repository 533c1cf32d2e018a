"""Measures one item of the benchmark: every provider on the same logits, in turns."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .gauges import errors, gauges, truth
from .peers import CASES
from .plan import DTYPES, Budget, Item
from .providers import OVERWRITES, loss_of
from .report import Record
from .timing import (
    Replay,
    Times,
    Work,
    of_copy,
    of_loss,
    on_device,
    on_host,
    quantile,
    sets_beyond_cache,
)

LEAST = 15  # samples: a median of fewer does not outlive a stall of the machine
MOST = 400
GRAPH_BYTES = 2**26  # of the byte model: beyond, the launches hide behind the kernels

Runs = dict[tuple[str, str], dict[str, Callable[[], Times]]]  # by turn and clock, then provider


def runner(work: Work, turn: str, clock: str) -> Callable[[], Times]:
    """What takes one turn of a provider and returns its times; captures it where that is asked."""
    if clock == "graph":
        return Replay(work, turn)
    return functools.partial(on_host if clock == "host" else on_device, work, turn)


def why_missing(
    item: Item, device: str, provider: str, why: BaseException | str, **where: str
) -> Record:
    """The record of what is not measured."""
    if isinstance(why, BaseException):
        # A capture that fails names its cause in the error before.
        chain = [e for e in (why, why.__context__) if e is not None]
        parts = [f"{type(e).__name__}: {' '.join(str(e).split())}"[:200] for e in chain]
        why = ", after ".join(parts)
    line = {"kind": "absent", **item.facts(), "device": device, **where}
    return line | {"provider": provider, "why_not": why}


def in_ms(times: Times) -> Record:
    """Medians and percentiles of the phases; those of both bear no prefix, absent ones are None."""
    found: Record = {}
    for phase, prefix in (("both", ""), ("forward", "forward_"), ("backward", "backward_")):
        taken = times.get(phase)
        for name, q in (("median_ms", 0.5), ("p20_ms", 0.2), ("p80_ms", 0.8)):
            found[prefix + name] = quantile(taken, q) * 1e3 if taken else None
    return found


@dataclass
class Bout:
    """An item being measured. Every record goes to `keep`: a measurement, or why there is none."""

    item: Item
    device: str
    budget: Budget
    keep: Callable[[Record], None]
    runs: Runs = field(default_factory=dict)
    counted: dict[str, Record] = field(default_factory=dict)  # by provider

    def missing(self, provider: str, why: BaseException | str, **where: str) -> None:
        self.keep(why_missing(self.item, self.device, provider, why, **where))

    def traffic(self) -> int:
        item = self.item
        return CASES[item.case].model_bytes(item.rows, item.classes, DTYPES[item.dtype])

    def sets(self, count: int) -> list[list[Tensor]]:
        item = self.item
        size = (item.rows, item.classes, DTYPES[item.dtype], self.device)
        return [CASES[item.case].arguments(*size, seed=k) for k in range(count)]

    def set_up(self, providers: Sequence[str], turns: Sequence[str]) -> None:
        """Inputs, errors and counts of the providers, and what takes their turns.

        Raises:
            torch.OutOfMemoryError: no room for the inputs or their float64 truth.
        """
        case, traffic = CASES[self.item.case], self.traffic()
        count = sets_beyond_cache(traffic, self.device)
        sets = self.sets(count)
        exact = truth(case, sets[0])
        clocks = ["host"] if self.device == "cpu" else ["events"]
        if self.device == "cuda" and traffic <= GRAPH_BYTES:
            clocks.append("graph")
        self.runs = {(turn, clock): {} for turn in turns for clock in clocks}
        for provider in providers:
            loss = self.budget.why_not(provider) or loss_of(provider, self.item.case, case)
            if isinstance(loss, str):
                self.missing(provider, loss)
                continue
            began = self.budget.now()
            # One provider that fails, for want of memory for example, leaves the others their run.
            try:
                self.counted[provider] = errors(loss, exact, sets[0])
                overwrites = (provider, self.item.case) in OVERWRITES
                work = of_loss(loss, self.sets(count) if overwrites else sets, case.trained)
                self.counted[provider] |= gauges(work, self.device, provider == "compiled")
                self.enter(provider, work)
            except Exception as error:
                self.missing(provider, error)
            self.budget.took(provider, self.budget.now() - began)
        self.enter("copy", of_copy(traffic, self.device, count))

    def enter(self, provider: str, work: Work) -> None:
        for (turn, clock), group in self.runs.items():
            try:
                group[provider] = runner(work, turn, clock)
            except Exception as error:
                self.missing(provider, error, turn=turn, clock=clock)

    def round(self) -> dict[tuple[str, str, str], Times]:
        """One turn of each provider in each way; one that fails takes no part any more."""
        taken = {}
        for (turn, clock), group in self.runs.items():
            for provider, run in list(group.items()):
                try:
                    taken[turn, clock, provider] = run()
                except Exception as error:
                    del group[provider]
                    self.missing(provider, error, turn=turn, clock=clock)
        return taken

    def samples(self) -> dict[tuple[str, str, str], Times]:
        """The times of all rounds, of those who took part in the last one."""
        if self.device == "cuda":
            self.round()  # fills the allocator's caches, which captures have emptied
        start = self.budget.now()
        found: dict[tuple[str, str, str], Times] = {}
        while True:
            taken = self.round()
            for key, times in taken.items():
                for phase, seconds in times.items():
                    found.setdefault(key, {}).setdefault(phase, []).extend(seconds)
            found = {key: found[key] for key in taken}
            fewest = min((len(times["both"]) for times in found.values()), default=MOST)
            enough = fewest >= LEAST and self.budget.now() - start >= self.budget.seconds
            if enough or fewest >= MOST or self.budget.spent() >= self.budget.share:
                return found


def measure(
    item: Item,
    providers: Sequence[str],
    device: str,
    turns: Sequence[str],
    budget: Budget,
    keep: Callable[[Record], None],
) -> None:
    """Hands the records of one item to `keep`: one for each provider, turn and clock."""
    bout = Bout(item, device, budget, keep)
    try:
        bout.set_up(providers, turns)
    except torch.OutOfMemoryError as error:
        bout.missing("all", error)
        return
    samples, traffic = bout.samples(), bout.traffic()
    medians = {key: quantile(times["both"], 0.5) for key, times in samples.items()}
    for (turn, clock, provider), times in samples.items():
        median, copied = medians[turn, clock, provider], medians.get((turn, clock, "copy"))
        record: Record = {"kind": "loss", **item.facts(), "device": device}
        record |= {"turn": turn, "clock": clock}
        record |= {"provider": provider, "samples": len(times["both"]), **in_ms(times)}
        record |= {"model_bytes": traffic, "gb_per_s": traffic / median / 1e9}
        record |= {"share_of_copy": copied / median if copied else None}
        keep(record | bout.counted.get(provider, {}))
