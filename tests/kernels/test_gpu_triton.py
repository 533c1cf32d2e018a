"""The Triton kernels on a device, with the CPU ops as the oracle."""

import pytest
import torch
from calls import FULL, NAMES, WITH_PROBABILITIES, WITH_TOP_K, cast, make, probabilities
from on_gpu import RANKS, compare, run, same_bits, to_gpu

from kdfuse.kernels import backends

WHY_NOT = backends.backends()["triton"] or backends.backends()["cpu"]
WHY_NOT = WHY_NOT or ("" if torch.cuda.is_available() else "torch sees no CUDA device")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unfit(name: str, c: int, dtype: torch.dtype) -> bool:
    return name == "uskd" and c > min(4096, RANKS.get(dtype, c))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n, c", [(7, 3), (70, 100), (1030, 1000), (7, 1001), (3, 21841)])
@pytest.mark.parametrize("name", NAMES)
def test_shapes(name, n, c, dtype):
    if unfit(name, c, dtype):
        pytest.skip("too long to be ranked")
    compare(name, cast(make(name, n, c), dtype), backend="triton")


@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@pytest.mark.parametrize("name", NAMES)
def test_reductions_and_upstream_gradients(name, reduction):
    case = cast(make(name, 70, 100), torch.float32)
    case.target[::5] = -100
    upstream = torch.linspace(-3, 2, 70) if reduction == "none" else torch.tensor(0.3)
    for stored in (True, False):
        more = {"reduction": reduction, "stored_gradient": stored}
        compare(name, case, upstream, backend="triton", **more)


@pytest.mark.parametrize("name", WITH_PROBABILITIES)
def test_class_probabilities(name):
    case = cast(make(name, 9, 250), torch.float32)
    case.target = probabilities(9, 250).float()
    compare(name, case, backend="triton")


@pytest.mark.parametrize("rest", ("spread", "drop", "zero"))
@pytest.mark.parametrize("name", WITH_TOP_K)
def test_top_k_teachers(name, rest):
    from test_sparse import lists

    case = cast(make(name, 70, 1000), torch.float32)
    case.teachers = [lists(case, 64, rest)]
    compare(name, case, backend="triton")


@pytest.mark.parametrize("name", NAMES)
def test_same_bits_every_time(name):
    case = to_gpu(cast(make(name, 1030, 100), torch.float32))
    same_bits(*(run(name, case, "triton", **FULL[name]) for _ in range(2)))
