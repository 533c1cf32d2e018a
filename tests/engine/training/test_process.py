"""What a run sets in its process: random numbers that are nobody else's, settings given back."""

import itertools
import random
import warnings

import numpy as np
import torch

from kdfuse.engine.recipe.run import Run
from kdfuse.engine.training import process
from kdfuse.engine.training.process import (
    capture,
    restore,
    seed_training,
    seed_weights,
    settings,
)


def drawn():
    return random.random(), np.random.random(), torch.rand(()).item()


def test_runs_and_processes_draw_apart():
    """The second process of a run does not draw what the first one of the next seed's run does."""
    found = set()
    for seed, rank in itertools.product(range(8), range(8)):
        seed_training(seed, rank)
        first = drawn()
        seed_training(seed, rank)
        assert drawn() == first
        found.add(first)
    for seed in range(8):
        seed_weights(seed)
        found.add(drawn())
    for place in zip(*found, strict=True):
        assert len(set(place)) == 8 * 8 + 8


def test_a_warning_is_shown_without_the_code_that_gave_it():
    run = Run(epochs=1, batch=1, amp="off", tf32=False, compile=False, deterministic=True)
    before = warnings.formatwarning
    with settings(run):
        own = warnings.formatwarning("lost", UserWarning, process.__file__, 3)
        other = warnings.formatwarning("old", FutureWarning, warnings.__file__, 3)
    assert own == "warning: lost\n"
    assert other == f"{warnings.__file__}:3: FutureWarning: old\n"
    assert warnings.formatwarning is before


def test_the_largest_seed_is_taken():
    seed_weights(2**63 - 1)
    seed_training(2**63 - 1, 1023)


def test_a_restored_state_draws_the_same():
    seed_training(3, 1)
    state = capture()
    first = drawn()
    restore(state)
    assert drawn() == first
