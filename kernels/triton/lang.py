"""The one place that imports Triton: what is missing without it has a name, and ops still import.

TRITON_INTERPRET=1, read when this is imported, runs the kernels on CPU tensors, slowly: for tests.
"""

from types import SimpleNamespace
from typing import Any

try:
    import triton
    import triton.language as tl
    from triton import knobs
    from triton.runtime import driver
except ImportError as error:
    MISSING = f"triton cannot be imported ({error}); pip install triton (Linux)"
    VERSION: tuple[int, ...] = (0, 0)
    INTERPRETED = False
    driver = knobs = None
    # Annotations and module constants of kernels are evaluated; the kernels themselves never run.
    tl = SimpleNamespace(constexpr=lambda value: value, int64=None)

    def jit(function: Any = None, **_: Any) -> Any:
        return function if function is not None else lambda kept: kept
else:
    MISSING = ""
    VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
    INTERPRETED = bool(knobs.runtime.interpret)
    jit = triton.jit
