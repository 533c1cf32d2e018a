"""Launches of the Triton kernels: their shapes from a table, their compiled code from a cache.

A launch through Triton's own front costs tens of microseconds of Python, more than these kernels
take; a compiled kernel is called directly where Triton's internals are known.
"""

from typing import Any

import torch
from torch import Tensor

from .lang import INTERPRETED, VERSION, driver, knobs

# Releases of Triton whose CompiledKernel.run has the arguments that `launch` gives it. On ROCm code
# also depends on a tensor's size, which is not in the key below.
DIRECT = (3, 6) <= VERSION <= (3, 9) and torch.version.hip is None
# Contraction is off (rows.py); debug keeps the assertion that labels are inside the classes.
OPTIONS = {"enable_fp_fusion": False, "debug": True, "sanitize_overflow": False, "num_stages": 2}

# Rows of one block, by the power of 2 that holds C: warps, so that a thread has 8 classes (16 bytes
# of bfloat16) at a time. Derived from compiled code (no spills, test_triton_build.py), not
# measured.
ONE_BLOCK = {128: 1, 256: 1, 512: 2, 1024: 4, 2048: 8, 4096: 16}
# More numbers than this in all inputs of a row do not stay in registers; one of float64 is four.
HELD = 16384
# Longer rows go by in tiles.
TILES = (1024, 4)


def power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def shape(classes: int, inputs: int, wide: bool) -> tuple[int, bool, int]:
    """Classes of a block, whether it holds the row, and its warps. wide: float64."""
    block = max(128, power_of_two(classes))
    if block * inputs * (4 if wide else 1) <= HELD and block in ONE_BLOCK:
        return block, True, ONE_BLOCK[block]
    block, warps = TILES
    return (block // 2 if wide else block), False, warps


def ranking_shape(classes: int) -> tuple[int, int]:
    """Block and warps of a row whose classes are compared with each other."""
    block = max(128, power_of_two(classes))
    return block, ONE_BLOCK[block]


_KERNELS: dict[tuple, Any] = {}


def _facts(args: tuple, nested: bool = False) -> tuple:
    """What Triton compiles for beside the constants: types, alignment of pointers, long numbers.

    Within tuples it also compiles for 1 and for multiples of 16; other whole numbers are in their
    kernel's do_not_specialize.
    """
    return tuple(
        (x.dtype, x.data_ptr() % 16 == 0)
        if isinstance(x, Tensor)
        else _facts(x, True)
        if isinstance(x, tuple)
        else (x.bit_length() > 31, nested and x == 1, nested and x % 16 == 0)
        if isinstance(x, int)
        else x is None
        for x in args
    )


def launch(kernel: Any, programs: int, args: tuple, constants: tuple, warps: int, at: Tensor):
    """Runs `kernel` on the current stream of the device of `at`.

    args: its tensors and numbers, constants: its constexprs, both in the order of its signature.
    """
    if INTERPRETED:
        kernel[(programs,)](*args, *constants)
        return
    device = at.get_device()
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch(kernel, programs, args, constants, warps, at)
    key = (kernel, device, warps, constants, _facts(args))
    compiled = _KERNELS.get(key)
    if compiled is None:
        compiled = kernel[(programs,)](*args, *constants, num_warps=warps, **OPTIONS)
        if DIRECT:
            _KERNELS[key] = compiled
        return
    stream = driver.active.get_current_stream(device)
    compiled.run(
        programs,
        1,
        1,
        stream,
        compiled.function,
        compiled.packed_metadata,
        compiled.launch_metadata((programs,), stream, *args, *constants),
        knobs.runtime.launch_enter_hook,
        knobs.runtime.launch_exit_hook,
        *args,
        *constants,
    )


_COUNTERS: dict[tuple[int, int], Tensor] = {}


def counter(at: Tensor) -> Tensor:
    """(1,) int32 at 0, where every launch leaves it: one for each stream, whose launches queue up.

    A graph has its own, which each replay sets to 0: it may run beside the stream that it was
    captured on.
    """
    if at.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=at.device)
    key = (at.get_device(), torch.cuda.current_stream(at.device).cuda_stream)
    if key not in _COUNTERS:
        made = torch.zeros(1, dtype=torch.int32, device=at.device)
        if in_private_pool(made.data_ptr()):
            return made
        _COUNTERS[key] = made
    return _COUNTERS[key]


_PRIVATE: set[range] = set()  # addresses of segments that were found to be of somebody's pool


def in_private_pool(address: int) -> bool:
    """Whether memory belongs to a pool of somebody, who may recycle it whole, as CUDA graphs do.

    A segment that was is looked up once: a pool's counter is made anew in every call.
    """
    if any(address in known for known in _PRIVATE):
        return True
    for segment in torch.cuda.memory_snapshot():
        held = range(segment["address"], segment["address"] + segment["total_size"])
        if address in held:
            private = tuple(segment.get("segment_pool_id", (0, 0))) != (0, 0)
            if private:
                _PRIVATE.add(held)
            return private
    return False
