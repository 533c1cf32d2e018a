"""Recorded answers as what the teacher would have given."""

from __future__ import annotations

import torch
from torch import Tensor

from ..methods import Outputs
from .forms import Form


def told(form: Form, answers: tuple[Tensor, ...], images: Tensor) -> Outputs:
    """The teacher's part of the outputs, of the tensors of `Form.decode`, on the images' device.

    Its maps are float32 and lie in memory as the images (N, 3, H, W) do, as if it had seen them.
    """
    last = images.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    count = len(answers) - len(form.taps)
    found, out = form.answer(answers[:count]), Outputs(student=torch.empty(0))
    for (name, _), value in zip(form.taps, answers[count:], strict=True):
        value = value.float()
        out.teacher_taps[name] = (
            value.contiguous(memory_format=layout) if value.dim() == 4 else value
        )
    if isinstance(found, Tensor):
        out.teacher = found
    else:
        out.listed = found
    return out
