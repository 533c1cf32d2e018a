"""torch.compile for the networks of a run: all of them, or an error."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

# Training and evaluation, each at its own batch size, with and without gradients.
GRAPHS = 4


@contextmanager
def compiling(compile: bool) -> Iterator[None]:
    """What dynamo has compiled within is forgotten afterwards, and its limits are as they were."""
    if not compile:
        yield
        return
    import torch._dynamo.config as dynamo  # seconds, which only those pay who compile

    was = dynamo.recompile_limit, dynamo.fail_on_recompile_limit_hit
    try:
        yield
    finally:
        dynamo.recompile_limit, dynamo.fail_on_recompile_limit_hit = was
        torch.compiler.reset()  # the limits count over the process, whatever run it was


def compile_all(networks: Sequence[nn.Module], dynamic: bool | None = False) -> None:
    """Compile each network in place, so that its state-dict keys stay, when it is first called.

    Training and evaluation batches have one shape each, for which dynamic shapes would only make
    slower kernels. Dynamo counts graphs over all instances of a class, and with its own limit
    would run the fifth network of a class as it is; here the limit follows from the number of
    networks, and hitting it is an error.
    """
    import torch._dynamo.config as dynamo

    dynamo.recompile_limit = max(dynamo.recompile_limit, GRAPHS * len(networks))
    dynamo.fail_on_recompile_limit_hit = True
    for network in networks:
        network.compile(dynamic=dynamic)
