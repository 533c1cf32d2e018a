"""Batches on their way to the device: all of them, in order, one ahead of the step."""

import pytest
import torch

from kdfuse.engine.data.batch import Batch
from kdfuse.engine.data.loaders.feed import on_device, one_ahead


def counted(asked, count, fails=None):
    """0, 1, ...; `asked` says how many were asked for. An error instead of number `fails`."""
    for number in range(count):
        asked.append(number)
        if number == fails:
            raise RuntimeError("the loader's")
        yield number


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_each_comes_when_the_next_is_under_way(count):
    asked, found = [], []
    for number in one_ahead(counted(asked, count)):
        assert len(asked) == min(number + 2, count)
        found.append(number)
    assert found == list(range(count))


@pytest.mark.parametrize("fails", [0, 1, 3])
def test_an_error_comes_after_what_was_before_it(fails):
    found = []
    with pytest.raises(RuntimeError, match="the loader's"):
        for number in one_ahead(counted([], 5, fails)):
            found.append(number)
    assert found == list(range(fails))


def test_nothing_is_asked_for_after_it_is_closed():
    asked = []
    ahead = one_ahead(counted(asked, 5))
    assert next(ahead) == 0
    ahead.close()
    assert asked == [0, 1]


def test_a_cpu_has_the_batches_themselves():
    batches = [Batch(torch.zeros(2, 3, 4, 4), torch.arange(2), torch.arange(2), 2)] * 3
    found = list(on_device(iter(batches), torch.device("cpu")))
    assert all(a is b for a, b in zip(found, batches, strict=True))
