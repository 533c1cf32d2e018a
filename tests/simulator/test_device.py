"""The host twins of the kernels' instructions (csrc/core/device.h): the function that PTX states.

16-bit numbers: all of them. `make gpu` runs the same instructions on a GPU beside these twins.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

SOURCE = Path(__file__).with_name("device.cu")
NAMES = "from_bf16 from_f16 to_bf16 larger_f32 larger_bf16 larger_f16 above_bf16 above_f16".split()
NAMES += ["add_counts_bf16", "add_counts_f16", "to_f16"]
ALL = torch.arange(1 << 16, dtype=torch.int32)
pytestmark = pytest.mark.slow(5)


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    made = tmp_path_factory.mktemp("twins") / "twins.so"
    compiler = shutil.which("g++") or shutil.which("c++")
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-shared", "-fPIC", "-x", "c++"]
    flags += [f"-I{SOURCE.parent / 'include'}"]
    subprocess.run([compiler, *flags, str(SOURCE), "-o", str(made)], check=True)
    library = ctypes.CDLL(str(made))

    def run(name, a, b=None):
        a = a.numpy().astype(np.uint32) if isinstance(a, torch.Tensor) else a.astype(np.uint32)
        b = np.zeros_like(a) if b is None else np.asarray(b).astype(np.uint32)
        out = np.empty_like(a)
        at = [x.ctypes.data_as(ctypes.c_void_p) for x in (a, b, out)]
        library.run_host(NAMES.index(name), *at, ctypes.c_int64(len(a)))
        return out

    return run


def halves(dtype):
    """Every number of a 16-bit type, in float32."""
    return ALL.to(torch.int16).view(dtype).float().numpy()


def pairs(numbers):
    """Each of all 16-bit patterns beside each of these."""
    x, y = np.meshgrid(np.arange(1 << 16, dtype=np.uint32), np.asarray(numbers, np.uint32))
    return x.ravel(), y.ravel()


SPECIAL = {
    torch.bfloat16: [0, 0x8000, 1, 0x8001, 0x7F7F, 0x7F80, 0xFF80, 0x7FC0, 0x3F80, 0xBF80, 0x4049],
    torch.float16: [0, 0x8000, 1, 0x8001, 0x7BFF, 0x7C00, 0xFC00, 0x7E00, 0x3C00, 0xBC00, 0x4248],
}
KIND = {torch.bfloat16: "bf16", torch.float16: "f16"}
each_type = pytest.mark.parametrize("dtype", SPECIAL, ids=str)


@each_type
def test_widening(twin, dtype):
    wide = twin(f"from_{KIND[dtype]}", ALL).view(np.float32)
    assert np.array_equal(wide, halves(dtype), equal_nan=True)
    assert np.array_equal(np.signbit(wide), np.signbit(halves(dtype)))


@each_type
def test_rounding(twin, dtype):
    """Every upper half of a float32 number, with the lower halves that decide its rounding."""
    upper, lower = pairs([0, 1, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    bits = upper << 16 | lower
    x = torch.from_numpy(bits.view(np.float32))
    rounded, name = x.to(dtype), f"to_{KIND[dtype]}"
    got = torch.from_numpy(twin(name, bits, np.zeros_like(bits)).astype(np.uint32) & 0xFFFF)
    got = got.to(torch.int32).to(torch.int16).view(dtype)
    assert torch.equal(got.isnan(), x.isnan())
    assert torch.equal(got[~x.isnan()].view(torch.int16), rounded[~x.isnan()].view(torch.int16))
    # The second number stands in the upper half.
    other = twin(name, np.zeros_like(bits), bits) >> 16
    assert np.array_equal(other, twin(name, bits, np.zeros_like(bits)) & 0xFFFF)


@each_type
def test_the_larger_of_two(twin, dtype):
    """maxNum of IEEE 754: a number beside NaN; +0 above -0."""
    x, y = pairs(SPECIAL[dtype])
    number = halves(dtype)
    got = twin(f"larger_{KIND[dtype]}", x | y << 16, y | x << 16)
    low, high = number[got & 0xFFFF], number[got >> 16]
    true = np.fmax(number[x], number[y])
    assert np.array_equal(low, true, equal_nan=True) and np.array_equal(high, true, equal_nan=True)
    zeros = (number[x] == 0) & (number[y] == 0)
    both = np.signbit(number[x]) & np.signbit(number[y])
    assert np.array_equal(np.signbit(low[zeros]), both[zeros])


def test_the_larger_of_two_float32(twin):
    patterns = np.uint32([0, 1 << 31, 1, 0x7F800000, 0xFF800000, 0x7FC00000, 0x3F800000])
    x, y = (
        v.ravel()
        for v in np.meshgrid(np.append(patterns, np.arange(0, 2**32, 2**19 + 1)), patterns)
    )
    x, y = x.astype(np.uint32), y.astype(np.uint32)
    got = twin("larger_f32", x, y).view(np.float32)
    with np.errstate(invalid="ignore"):
        assert np.array_equal(got, np.fmax(x.view(np.float32), y.view(np.float32)), equal_nan=True)


@each_type
def test_above_a_threshold(twin, dtype):
    """1 for a number that is greater or unordered: NaN, or the threshold NaN."""
    x, y = pairs(SPECIAL[dtype])
    number = halves(dtype)
    got = twin(f"above_{KIND[dtype]}", x | x << 16, y | y << 16)
    with np.errstate(invalid="ignore"):
        true = ~(number[x] <= number[y])
    assert np.array_equal(number[got & 0xFFFF], true.astype(np.float32))
    assert np.array_equal(got & 0xFFFF, got >> 16)


@each_type
def test_sums_of_counts(twin, dtype):
    as_words = torch.arange(257).float().to(dtype).view(torch.int16).int() & 0xFFFF
    counts = as_words.numpy().astype(np.uint32)
    x, y = (v.ravel() for v in np.meshgrid(np.arange(257), np.arange(257)))
    kept = x + y <= 256
    x, y = x[kept], y[kept]
    got = twin(f"add_counts_{KIND[dtype]}", counts[x] | counts[y] << 16, counts[y])
    assert np.array_equal(got & 0xFFFF, counts[x + y]) and np.array_equal(got >> 16, counts[y])
