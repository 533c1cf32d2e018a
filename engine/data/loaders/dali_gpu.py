"""What DALI made on a GPU, handed over to PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def gpu_of(device: torch.device) -> int:
    """The number of a CUDA device."""
    return torch.cuda.current_device() if device.index is None else device.index


def taken(images: Any, stream: torch.cuda.Stream) -> Tensor:
    """A batch of DALI's as a tensor of its own, (B, H, W, 3) uint8, on the GPU of `stream`.

    DALI takes its memory back when the last view of it is let go of, and knows nothing of what
    PyTorch's streams still have to read there: later images would stand in an earlier batch. So it
    is copied, on a stream of our own that this waits for. On the current stream the copy would wait
    for all steps queued there, and so would this.
    """
    reader = torch.cuda.current_stream(stream.device)
    with torch.cuda.stream(stream):
        view = torch.from_dlpack(images.as_tensor())  # whole already: `run` waited for it
        copy = view.clone()
    stream.synchronize()
    copy.record_stream(reader)  # or its memory is used anew while the step still reads
    return copy
