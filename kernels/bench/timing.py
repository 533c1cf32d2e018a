"""The clocks of the benchmark.

Three times of a loss are taken: its forward pass as in training (with grad, so a loss that stores
its gradients makes them here), its backward pass alone (autograd.grad on the graph that a forward
pass has just made), and both.

host   On a CPU: a forward and a backward pass, one after the other; both is their sum. A warm turn
       is two calls that are not counted, since in training the logits have just been written, and
       four that are. A cold one is a single call, which finds the caches as the provider before
       left them.
events On a GPU: CUDA events around calls that Python enqueues, so where a kernel is shorter than
       its enqueuing this is the time of the host; of the copy, too (see graph for small sizes). A
       warm turn is as above, on one set of inputs. A cold one takes every input set once; together
       they are three times the L2 cache, and every set's outputs stay until its next turn, so
       neither reads nor writes meet what is cached. All forward passes go before the first
       backward pass.
graph  On a GPU: the calls of a turn captured into one CUDA graph (16 where the turn is warm); the
       time of a replay over their number, without the host. The backward pass is part of "both".
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Calls of a turn, not counted and counted: on the provider's own caches, or on those of the last.
TURNS = {"warm": (2, 4), "cold": (0, 1)}
GRAPH_CALLS = 16
Times = dict[str, list[float]]  # "forward", "backward", "both": seconds


@dataclass(frozen=True)
class Work:
    """What a provider does on each of its input sets; `backward` is None for a copy."""

    sets: Sequence[Any]
    forward: Callable[[Any], Any]
    backward: Callable[[Any, Any], Any] | None = None  # of what forward returned, and the set

    def both(self, chosen: Any) -> Any:
        made = self.forward(chosen)
        return made if self.backward is None else self.backward(made, chosen)


def of_loss(loss: Callable[..., Tensor], sets: Sequence[list[Tensor]], trained: int) -> Work:
    return Work(
        sets,
        lambda arguments: loss(*arguments),
        lambda value, arguments: torch.autograd.grad(value, arguments[:trained]),
    )


def of_copy(traffic: int, device: str, count: int) -> Work:
    """A copy that reads and writes `traffic` bytes together, `count` pairs of buffers."""
    sources = [torch.ones(traffic // 2, dtype=torch.uint8, device=device) for _ in range(count)]
    return Work([(x, torch.empty_like(x)) for x in sources], lambda pair: pair[1].copy_(pair[0]))


def on_host(work: Work, turn: str) -> Times:
    uncounted, counted = TURNS[turn]
    times: Times = {"forward": [], "backward": [], "both": []}
    chosen = work.sets[0]
    for _ in range(uncounted):  # the last provider's data leaves the caches
        work.both(chosen)
    for _ in range(counted):
        start = time.perf_counter()
        made = work.forward(chosen)
        middle = time.perf_counter()
        if work.backward:
            work.backward(made, chosen)
            end = time.perf_counter()
            times["forward"].append(middle - start)
            times["backward"].append(end - middle)
            times["both"].append(end - start)
        else:
            times["both"].append(middle - start)
        del made
    return times


class Events:
    """Collects pairs of CUDA events by name and reads them all after one synchronisation."""

    def __init__(self) -> None:
        self.pairs: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {}

    def around(self, name: str, call: Callable[..., Any], *arguments: Any) -> Any:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        made = call(*arguments)
        end.record()
        self.pairs.setdefault(name, []).append((start, end))
        return made

    def seconds(self, calls: int = 1) -> Times:
        torch.cuda.synchronize()
        return {
            name: [start.elapsed_time(end) / 1e3 / calls for start, end in pairs]
            for name, pairs in self.pairs.items()
        }


def on_device(work: Work, turn: str) -> Times:
    """Eager calls between CUDA events."""
    events = Events()
    if turn == "warm":
        uncounted, counted = TURNS["warm"]
        for _ in range(uncounted):
            work.both(work.sets[0])
        for _ in range(counted):
            events.around("both", work.both, work.sets[0])
        if work.backward:
            for _ in range(counted):
                made = events.around("forward", work.forward, work.sets[0])
                events.around("backward", work.backward, made, work.sets[0])
        return events.seconds()
    kept: list[Any] = [None] * len(work.sets)
    for k, chosen in enumerate(work.sets):
        kept[k] = events.around("both", work.both, chosen)
    if work.backward:
        for k, chosen in enumerate(work.sets):
            kept[k] = events.around("forward", work.forward, chosen)
        for k, chosen in enumerate(work.sets):
            kept[k] = events.around("backward", work.backward, kept[k], chosen)
    return events.seconds()


class Replay:
    """One turn of a provider as CUDA graphs: forward alone, and forward and backward.

    Raises:
        RuntimeError: a call cannot be captured, since it waits for the device, for example.
    """

    def __init__(self, work: Work, turn: str) -> None:
        sets = work.sets if turn == "cold" else [work.sets[0]] * GRAPH_CALLS
        self.calls = len(sets)
        self.graphs: dict[str, torch.cuda.CUDAGraph] = {}
        self.kept: list[Any] = []  # what cold graphs write: outputs that do not share memory
        phases: dict[str, Callable[[Any], Any]] = {"both": work.both}
        if work.backward:
            phases["forward"] = work.forward
        here = torch.cuda.current_stream()
        for name, call in phases.items():
            side = torch.cuda.Stream()
            side.wait_stream(here)
            with torch.cuda.stream(side):  # lazy set-up may not fall into the capture
                for _ in range(3):
                    call(sets[0])
            here.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # The outer context comes back to this stream where a capture fails, in any PyTorch.
            with torch.cuda.stream(here), torch.cuda.graph(graph):
                for chosen in sets:
                    made = call(chosen)
                    if turn == "cold":
                        self.kept.append(made)
            self.graphs[name] = graph

    def __call__(self) -> Times:
        events = Events()
        for name, graph in self.graphs.items():
            graph.replay()
            for _ in range(5):
                events.around(name, graph.replay)
        return events.seconds(self.calls)


def sets_beyond_cache(traffic: int, device: str) -> int:
    """How many input sets of `traffic` bytes exceed three times the L2 cache; one on a CPU."""
    if device == "cpu":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, -(-3 * cache // traffic))


def copy_speed(device: str) -> float:
    """GB/s, read and written, of a copy far larger than the caches: 1 GiB, or 64 MiB on a CPU."""
    work = of_copy(2**31 if device == "cuda" else 2**27, device, 1)
    clock = on_device if device == "cuda" else on_host
    times = [t for _ in range(3) for t in clock(work, "warm")["both"]]
    return 2 * work.sets[0][0].numel() / quantile(times, 0.5) / 1e9


def quantile(times: Sequence[float], q: float) -> float:
    return sorted(times)[min(int(q * len(times)), len(times) - 1)]
