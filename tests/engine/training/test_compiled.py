"""Compiling: every network of a class gets its graph, and the process is left as it was."""

import pytest
import torch
import torch._dynamo.config as dynamo
from torch import nn
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.utils import counters

from kdfuse.engine.training.compiled import compile_all, compiling

pytestmark = pytest.mark.slow(8)


class Layer(nn.Module):
    """Networks of one class, each of its own shape, as resnet8 to resnet110 are."""

    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(4, width)

    def forward(self, x):
        return self.linear(x)


def run(networks):
    x = torch.ones(2, 4)
    for mode in (True, False):
        for network in networks:
            network.train(mode)(x).sum().backward()


def test_the_fifth_network_of_a_class_is_compiled_too():
    networks = [Layer(3 + i) for i in range(6)]
    with compiling(True):
        counters.clear()
        compile_all(networks)
        run(networks)
        assert counters["stats"]["unique_graphs"] >= len(networks)
        graphs = dict(counters["stats"])
        run(networks)
        assert dict(counters["stats"]) == graphs  # nothing is compiled again


def test_a_network_that_would_run_as_it_is_is_an_error():
    networks = [Layer(3 + i) for i in range(4)]
    with compiling(True):
        compile_all(networks)
        dynamo.recompile_limit = 2
        with pytest.raises(FailOnRecompileLimitHit):
            run(networks)


def test_limits_are_those_of_before_afterwards():
    before = dynamo.recompile_limit, dynamo.fail_on_recompile_limit_hit
    with compiling(True):
        compile_all([Layer(3) for _ in range(50)])
        assert dynamo.recompile_limit > before[0] and dynamo.fail_on_recompile_limit_hit
    assert (dynamo.recompile_limit, dynamo.fail_on_recompile_limit_hit) == before
