"""JPEGs to a batch by torchvision's decoder, on any device; files of other kinds are PIL's.

torchvision deprecates `decode_jpeg` since 0.29, so it is imported when first used.
"""

from __future__ import annotations

import io
from collections.abc import Container, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..contents import Encoded
from ..images import UnreadableError, jpeg_bytes
from ..manifest import Manifest
from ..plan import Plan
from .vision import render


@dataclass(frozen=True)
class Jpeg:
    """A file for the device's decoder."""

    data: Tensor  # (bytes,) uint8, on the CPU


File = Jpeg | Tensor  # or what PIL made of it, (size, size, 3) uint8, on the CPU


def read(manifest: Manifest, plan: Plan, i: int, size: int, refused: Container[int]) -> File | str:
    """The file of row i of a plan; a text: why it is bad.

    What is no JPEG of grey or YCbCr, and the rows `refused`, PIL decodes here and now.
    """
    row, content = int(plan.index[i]), manifest.content
    assert isinstance(content, Encoded)
    if row not in refused and manifest.changed(row) is None:
        found = jpeg_bytes(partial(content.open, row))
        if found is not None:
            data, facts = found
            if [facts.height, facts.width] == manifest.sizes[row].tolist():
                return Jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    return by_pil(manifest, plan, i, size)


def by_pil(manifest: Manifest, plan: Plan, i: int, size: int) -> Tensor | str:
    """Row i of a plan as decode=cpu makes it, (size, size, 3) uint8; a text: why it is bad."""
    try:
        image = manifest.read(int(plan.index[i]))
    except UnreadableError as error:
        return str(error)
    return torch.from_numpy(np.array(render(image, plan, i, size)))


def batch_of(
    files: Sequence[File], plan: Plan, size: int, device: torch.device
) -> tuple[Tensor, list[int]]:
    """The batch of a plan, (B, size, size, 3) uint8 on `device`, and the places left undone in it,
    whose JPEG is refused. Raises RuntimeError as `decoded` does.
    """
    out = torch.empty(len(files), size, size, 3, dtype=torch.uint8, device=device)
    jpegs = {i: file.data for i, file in enumerate(files) if isinstance(file, Jpeg)}
    refused = []
    for i, image in zip(jpegs, decoded(list(jpegs.values()), device), strict=True):
        if image is None:
            refused.append(i)
        else:
            out[i] = render(image, plan, i, size).permute(1, 2, 0)
    for i, file in enumerate(files):
        if isinstance(file, Tensor):
            out[i] = file
    return out, refused


def decoded(jpegs: list[Tensor], device: torch.device) -> list[Tensor | None]:
    """Whole images, (3, height, width) uint8 on `device`, in one call; None: it is refused.

    One that cannot be decoded fails the call, so each is tried alone then. RuntimeError where none
    of them is at fault, as when memory is short.
    """
    if not jpegs:
        return []
    try:
        return [*_decode(jpegs, device)]
    except RuntimeError as error:
        alone = [_alone(jpeg, device) for jpeg in jpegs]
        if all(image is not None for image in alone):
            raise RuntimeError(
                f"torchvision cannot decode {len(jpegs)} JPEGs on {device} in one call, though "
                f"each alone; lower run.batch or set data.decode=cpu: {error}"
            ) from error
        return alone


def check_decoder(device: torch.device) -> None:
    """ValueError where torchvision decodes no JPEG on `device`, as when built without nvJPEG."""
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG")
    try:
        _decode([torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)], device)
    except (ImportError, AttributeError, RuntimeError) as error:
        why = str(error).partition("\n")[0]
        raise ValueError(
            f"data.decode=gpu with data.loader=torchvision: torchvision cannot decode a JPEG on "
            f"{device} ({why}); install a torchvision with nvJPEG, as its wheels for CUDA are, or "
            "set data.loader=dali or data.decode=cpu"
        ) from error


def _alone(jpeg: Tensor, device: torch.device) -> Tensor | None:
    try:
        return _decode([jpeg], device)[0]
    except RuntimeError:
        return None


def _decode(jpegs: list[Tensor], device: torch.device) -> list[Tensor]:
    """A RuntimeError where one cannot be decoded."""
    from torchvision.io import ImageReadMode, decode_jpeg

    try:
        return decode_jpeg(jpegs, mode=ImageReadMode.RGB, device=device)
    except RuntimeError:
        if device.type == "cuda":  # what failed may still write to memory that is free by now
            torch.cuda.synchronize(device)
        raise
