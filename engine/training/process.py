"""What a run sets in its process: threads, determinism, and the random number generators."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.plan import RANK, key
from ..recipe.run import LEFT_OPEN, Run

ENGINE = Path(__file__).resolve().parents[1]
WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def settings(run: Run) -> Iterator[None]:
    """Threads, determinism and TF32 of the process as the run wants them, then as they were; and
    warnings in a line, without the code that gave them.

    Raises ValueError for a run whose numerics are left open; `speed.settled` settles them.
    """
    if open_ones := [name for name in LEFT_OPEN if getattr(run, name) is None]:
        raise ValueError(f"run.{open_ones[0]} is left open: settle it for a device first")
    workspace = os.environ.get(WORKSPACE)
    threads, cudnn = torch.get_num_threads(), torch.backends.cudnn
    deterministic, benchmark = torch.are_deterministic_algorithms_enabled(), cudnn.benchmark
    matmul, tf32 = torch.backends.cuda.matmul, cudnn.allow_tf32
    of_matmul = matmul.allow_tf32
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    # Read when cuBLAS starts; without it, deterministic matrix products are refused.
    os.environ.setdefault(WORKSPACE, ":4096:8")
    if run.threads is not None:
        torch.set_num_threads(run.threads)
    torch.use_deterministic_algorithms(bool(run.deterministic))
    cudnn.benchmark = not run.deterministic
    cudnn.allow_tf32 = matmul.allow_tf32 = bool(run.tf32)
    # It would write each new tensor once more than needed, to find reads of what nobody wrote.
    memory.fill_uninitialized_memory = False
    shown, warnings.formatwarning = warnings.formatwarning, _in_a_line
    try:
        yield
    finally:
        if workspace is None:
            os.environ.pop(WORKSPACE, None)
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        cudnn.benchmark = benchmark
        cudnn.allow_tf32, matmul.allow_tf32 = tf32, of_matmul
        memory.fill_uninitialized_memory = fill
        warnings.formatwarning = shown


def _in_a_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: Any = None
) -> str:
    if Path(filename).resolve().is_relative_to(ENGINE):
        return f"warning: {message}\n"
    return f"{filename}:{lineno}: {category.__name__}: {message}\n"


def seed_weights(seed: int) -> None:
    """Start every generator for the random weights, the same in every process of a run."""
    _seed(seed)


def seed_training(seed: int, rank: int) -> None:
    """Start every generator for what is drawn in training (dropout, negatives).

    Runs and processes draw apart: the seed of one run is not that of the next one's next process.
    """
    _seed(key(seed, rank, RANK))


def capture() -> dict[str, Any]:
    """The state of Python's, NumPy's and torch's generators; CUDA's for the current device.

    Tensors and plain values, for a checkpoint.
    """
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "numpy": [
            str(name),
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore(state: dict[str, Any]) -> None:
    """Go on from a `capture()`; CUDA's state is used where both ends have a CUDA device."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _seed(value: int) -> None:
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)
