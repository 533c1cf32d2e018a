"""Measures one item of the benchmark: every provider on the same logits, in turns."""

import functools
from collections.abc import Callable, Iterator, Sequence

import torch

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
    item: Item, device: str, provider: str, why: Exception | str, **where: str
) -> Record:
    if isinstance(why, Exception):
        why = f"{type(why).__name__}: {' '.join(str(why).split())}"
    line = {"kind": "absent", **item.facts(), "device": device, **where}
    return line | {"provider": provider, "why_not": why[:300]}


def in_ms(times: Times) -> Record:
    """Medians and percentiles of the phases; those of both bear no prefix, absent ones are None."""
    found: Record = {}
    for phase, prefix in (("both", ""), ("forward", "forward_"), ("backward", "backward_")):
        taken = times.get(phase)
        for name, q in (("median_ms", 0.5), ("p20_ms", 0.2), ("p80_ms", 0.8)):
            found[prefix + name] = quantile(taken, q) * 1e3 if taken else None
    return found


def measure(
    item: Item,
    providers: Sequence[str],
    device: str,
    turns: Sequence[str],
    seconds: float,
    budget: Budget,
) -> Iterator[Record]:
    """The records of one item: a line each provider, turn and clock, or why there is none."""
    case, dtype = CASES[item.case], DTYPES[item.dtype]
    traffic = case.elements * item.rows * item.classes * dtype.itemsize
    count = sets_beyond_cache(traffic, device)
    size = (item.rows, item.classes, dtype, device)
    missing = functools.partial(why_missing, item, device)
    try:
        sets = [case.arguments(*size, seed=k) for k in range(count)]
        exact = truth(case, sets[0])
    except torch.OutOfMemoryError as error:
        yield missing("all", error)
        return
    clocks = ["host"] if device == "cpu" else ["eager", "graph"][: 1 + (traffic <= GRAPH_BYTES)]
    runs: Runs = {(turn, clock): {} for turn in turns for clock in clocks}
    counted: dict[str, Record] = {}
    for provider in providers:
        why = budget.why_not(provider)
        loss = why or loss_of(provider, item.case, case)
        if isinstance(loss, str):
            yield missing(provider, loss)
            continue
        began = budget.now()
        own = sets
        if (provider, item.case) in OVERWRITES:
            own = [case.arguments(*size, seed=k) for k in range(count)]
        work = of_loss(loss, own, case.trained)
        # One provider that fails, for want of memory for example, leaves the others their run.
        try:
            counted[provider] = errors(loss, exact, sets[0])
            counted[provider] |= gauges(work, device, traced=provider == "compiled")
        except Exception as error:
            yield missing(provider, error)
            continue
        for (turn, clock), group in runs.items():
            try:
                group[provider] = runner(work, turn, clock)
            except Exception as error:
                yield missing(provider, error, turn=turn, clock=clock)
        budget.took(provider, budget.now() - began)
    del exact
    copy = of_copy(traffic, device, count)
    for (turn, clock), group in runs.items():
        group["copy"] = runner(copy, turn, clock)

    samples: dict[tuple[str, str, str], Times] = {}
    start, fewest = budget.now(), 0
    while fewest < LEAST or (budget.now() - start < seconds and fewest < MOST):
        for (turn, clock), group in runs.items():
            for provider, run in list(group.items()):
                try:
                    times = run()
                except Exception as error:
                    del group[provider]
                    samples.pop((turn, clock, provider), None)
                    yield missing(provider, error, turn=turn, clock=clock)
                    continue
                kept = samples.setdefault((turn, clock, provider), {})
                for phase, found in times.items():
                    kept.setdefault(phase, []).extend(found)
        fewest = min((len(times["both"]) for times in samples.values()), default=MOST)
        if budget.spent() >= budget.share:
            break
    medians = {key: quantile(times["both"], 0.5) for key, times in samples.items()}
    for (turn, clock, provider), times in samples.items():
        median, copied = medians[turn, clock, provider], medians.get((turn, clock, "copy"))
        record: Record = {"kind": "loss", **item.facts(), "device": device}
        record |= {"turn": turn, "clock": clock}
        record |= {"provider": provider, "samples": len(times["both"]), **in_ms(times)}
        record |= {"model_bytes": traffic, "gb_per_s": traffic / median / 1e9}
        record |= {"share_of_copy": copied / median if copied else None}
        yield record | counted.get(provider, {})
