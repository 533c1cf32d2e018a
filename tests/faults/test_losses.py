"""Losses of drawn shapes, types, layouts, numbers and settings, each held to float64 formulas."""

import numpy as np
import pytest
import torch
from calls import (
    FULL,
    NAMES,
    PAIR,
    SCALED,
    WITH_PROBABILITIES,
    Case,
    cast,
    check,
    make,
    probabilities,
    weights_of,
)

from kdfuse.kernels import backends

CALLS = 100  # of a case
TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BACKENDS = [name for name in ("cpu", "reference") if not backends.backends()[name]]


def drawn(random: np.random.Generator) -> tuple[str, Case, dict]:
    """A loss, what it is given, and its settings."""
    name = str(random.choice(NAMES))
    n = int(random.choice([1, 2, 3, 5, 17]))
    c = int(random.choice([2, 3, 4, 7, 8, 9, 31, 33, 64, 100, 257, 1000]))
    count = int(random.integers(1, 4))
    case = make(name, n, c, seed=int(random.integers(2**31)), teachers=count, slts=count)
    keep = {key: value for key, value in FULL[name].items() if key != "fusion"}
    for key in weights_of(name):
        keep[key] = round(float(random.uniform(0, 3)), 3)
    if "temperature" in keep:
        keep["temperature"] = round(float(random.uniform(0.5, 20)), 3)
    if name in SCALED:
        keep["t_squared"] = bool(random.integers(2))
    if name == "slkd":
        keep["detach_slts"] = bool(random.integers(2))
    if c == 2:
        keep |= PAIR.get(name, {})
    if name in WITH_PROBABILITIES and random.random() < 0.25 and c > 2:
        case.target = probabilities(n, c, seed=int(random.integers(2**31)))
    elif case.target is not None and random.random() < 0.25:
        case.target[random.integers(n)] = -100
    dtype = TYPES[int(random.integers(len(TYPES)))]
    if name == "uskd" and c > 257:  # whose ranks bfloat16 would join
        dtype = torch.float32
    case = cast(case, dtype)
    if name != "uskd" and random.random() < 0.2:
        for x in (*case.students, *case.teachers):  # almost equal, or far beyond an exponential
            x.mul_(float(random.choice([1e-3, 64.0])))
    return name, laid_out(random, case), keep


def laid_out(random: np.random.Generator, case: Case) -> Case:
    """The same logits in other places: whole, every other row or column, or turned round."""

    def moved(x):
        n, c = x.shape
        how = random.integers(4)
        if how == 1:
            return torch.empty(2 * n, c, dtype=x.dtype)[::2].copy_(x)
        if how == 2:
            return torch.empty(n, 2 * c, dtype=x.dtype)[:, ::2].copy_(x)
        return x.t().contiguous().t() if how == 3 else x

    return Case([moved(x) for x in case.students], [moved(x) for x in case.teachers], case.target)


@pytest.mark.cases(3, 100)
def test_any_call_is_its_formula(case):
    random = np.random.default_rng([2024, case])
    for number in range(CALLS):
        name, given, keep = drawn(random)
        backend = BACKENDS[int(random.integers(len(BACKENDS)))]
        shape, dtype = tuple(given.students[0].shape), given.students[0].dtype
        where = f"case {case}, call {number}: {name} {shape} {dtype} {backend} {keep}"
        try:
            check(name, given, backend=backend, seed=number, cancels=True, **keep)
        except Exception as error:
            raise AssertionError(where) from error
