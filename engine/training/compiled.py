"""torch.compile for the networks of a run: those that are chosen, counted, or an error."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from time import perf_counter
from typing import Any, cast

import torch
from torch import nn

# Training and evaluation, each at its own batch size, with and without gradients.
GRAPHS = 4

Call = Callable[..., Any]


class Compilations:
    """What dynamo compiles: for which network, how often, and how long it takes."""

    def __init__(self) -> None:
        self.say: Callable[[str], object] = print  # told when a graph begins to be compiled
        self.running = ""  # the network that was called last
        self.graphs: Counter[str] = Counter()  # of the phase at hand, by network
        self.seconds = 0.0
        self._began = 0.0
        self._phases: set[str] = set()

    def named(self, name: str, compiled: Call) -> Call:
        """The same call; what is compiled in it counts under this name."""

        def called(*args: Any, **kwargs: Any) -> Any:
            self.running = name
            return compiled(*args, **kwargs)

        return called

    @contextmanager
    def phase(self, phase: str, note: Callable[[str], object]) -> Iterator[None]:
        """A part of a run that comes again and again: its graphs are made the first time.

        Tells `note` of a network that takes several graphs, and of one that is compiled again.
        """
        self.graphs.clear()
        yield
        for name, count in self.graphs.items():
            if phase in self._phases:
                note(
                    f"{name} was compiled {count} times again in a later {phase}: something that "
                    "its code reads has changed; TORCH_LOGS=recompiles says what"
                )
            elif count > 1:
                note(
                    f"{name} compiles badly: {phase} takes {count} graphs of it and not one; "
                    "TORCH_LOGS=graph_breaks says where, run.compile_only can leave it out"
                )
        self._phases.add(phase)

    def start(self, args: Any) -> None:
        """As a callback of dynamo."""
        self._began = perf_counter()
        if args.callback_trigger.name == "DYNAMO":
            self.graphs[self.running] += 1
            self.say(f"compiling {self.running}, {self.seconds:.0f} s so far")

    def end(self, args: Any) -> None:
        """As a callback of dynamo."""
        self.seconds += perf_counter() - self._began


_now = Compilations()  # dynamo's state is the process's, too


@contextmanager
def compiling(compile: bool) -> Iterator[Compilations]:
    """What dynamo compiles within, which is forgotten afterwards; its limits are as they were."""
    global _now
    found = _now = Compilations()
    if not compile:
        yield found
        return
    import torch._dynamo.config as dynamo  # seconds, which only those pay who compile
    from torch._dynamo.callback import callback_handler

    was = dynamo.recompile_limit, dynamo.fail_on_recompile_limit_hit
    callback_handler.register_start_callback(found.start)
    callback_handler.register_end_callback(found.end)
    try:
        yield found
    finally:
        callback_handler.remove_start_callback(found.start)
        callback_handler.remove_end_callback(found.end)
        dynamo.recompile_limit, dynamo.fail_on_recompile_limit_hit = was
        torch.compiler.reset()  # the limits count over the process, whatever run it was


def compile_all(networks: Mapping[str, nn.Module], dynamic: bool | None = False) -> None:
    """Compile each network in place, so that its state-dict keys stay, when it is first called.

    Training and evaluation batches have one shape each, for which dynamic shapes would only make
    slower kernels. Dynamo counts graphs over all instances of a class, and with its own limit
    would run the fifth network of a class as it is; here the limit follows from the number of
    networks, and hitting it is an error.
    """
    import torch._dynamo.config as dynamo

    dynamo.recompile_limit = max(dynamo.recompile_limit, GRAPHS * len(networks))
    dynamo.fail_on_recompile_limit_hit = True
    for name, network in networks.items():
        network.compile(dynamic=dynamic)
        network._compiled_call_impl = _now.named(name, cast(Call, network._compiled_call_impl))


def compile_call(name: str, function: Call) -> Call:
    """The same of a function over the networks' outputs."""
    return _now.named(name, torch.compile(function, dynamic=False))
