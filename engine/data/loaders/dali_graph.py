"""What DALI runs: the operators that do the plan, and on which device each stands."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .decoding import Mode

# Bytes a pixel that nvJPEG's buffers take: what DALI's ImageNet example asks for, 211025920 on the
# device and 140544512 on the host, over the 5980 x 6430 pixels that it names as the largest image.
DEVICE_BYTES, HOST_BYTES = 211025920 / (5980 * 6430), 140544512 / (5980 * 6430)
DEVICE_LEAST, HOST_LEAST = 16 << 20, 8 << 20  # DALI's defaults


class Devices(NamedTuple):
    """Where the images are decoded, and where resized; None: not by DALI."""

    decode: Literal["cpu", "mixed"]
    resize: Literal["cpu", "gpu"] | None


DEVICES: dict[Mode, Devices] = {
    "cpu": Devices("cpu", None),
    "hybrid": Devices("cpu", "gpu"),
    "gpu": Devices("mixed", "gpu"),
}


def import_dali() -> Any:
    """nvidia.dali, imported when first used: it takes a second and may be absent."""
    try:
        import nvidia.dali as dali
    except ImportError as error:
        raise ValueError(
            "data.loader=dali needs NVIDIA DALI, which cannot be imported "
            f"({error}): pip install nvidia-dali-cuda130, or set data.loader=torchvision"
        ) from error
    return dali


def graph(
    feed: Any,
    devices: Devices,
    size: int,
    *,
    pads: bool,
    packed: bool,
    mixed: dict[str, Any],
) -> tuple[Any, Any]:
    """The outputs of a pipeline, made inside `with` of it: uint8, (h, w, 3) an image, and the
    lengths of the files in bytes, (1,) each.

    `feed` gives each step the files and the boxes, and where DALI resizes also `scaled`, `window`
    and `flip` of the plan (see Feed); the images then are size x size, else the boxes as they are.
    `pads`: boxes may reach outside, where zeros are. `packed`: fed are the files' bytes, else their
    paths. `mixed`: options of a decoder on the GPU, see `mixed_options`. EXIF is ignored.
    """
    dali = import_dali()
    fn, types = dali.fn, dali.types
    inputs: list[tuple[int, Any]] = [(1, types.UINT8), (1, types.INT32)]  # dimensions, type
    if devices.resize is not None:
        inputs += [(1, types.FLOAT), (1, types.INT32), (0, types.INT32)]
    source, box, *rest = fn.external_source(
        feed,
        num_outputs=len(inputs),
        ndim=[ndim for ndim, _ in inputs],
        dtype=[dtype for _, dtype in inputs],
    )
    file = source if packed else fn.io.file.read(source)
    place = {"start": box[0:2], "shape": box[2:4], "axes": (0, 1)}
    decode = {"device": devices.decode, "output_type": types.RGB, "adjust_orientation": False}
    if devices.decode == "mixed":
        decode |= mixed
    if pads:
        where = "gpu" if devices.decode == "mixed" else "cpu"
        whole = fn.decoders.image(file, **decode)
        image = fn.slice(whole, out_of_bounds_policy="pad", device=where, **place)
    else:
        image = fn.decoders.image_slice(file, **place, **decode)
    if devices.resize is None:
        return image, file.shape()
    scaled, window, flip = rest
    on = {"device": devices.resize}
    if devices.resize == "gpu" and devices.decode == "cpu":
        image = image.gpu()
    # Antialiased and linear is the triangle filter of PIL's BILINEAR. At an image's border DALI
    # repeats the last pixel, where PIL and PyTorch leave out what lies outside.
    image = fn.resize(image, size=scaled, interp_type=types.INTERP_LINEAR, antialias=True, **on)
    image = fn.slice(image, start=window, shape=(size, size), axes=(0, 1), **on)
    return fn.flip(image, horizontal=flip, **on), file.shape()


def mixed_options(sizes: NDArray[np.int32], hw_decoder_load: float) -> dict[str, Any]:
    """Options of a decoder on the GPU for images of these sizes, (n, 2) height and width.

    Its buffers are made for the largest image at once: one that grows in the middle of a run stops
    the GPU, or finds no memory. Each thread has one on the device and two on the host.
    """
    height, width = sizes.max(axis=0).tolist()
    pixels = int(sizes.astype(np.int64).prod(axis=1).max())
    return {
        "hw_decoder_load": hw_decoder_load,
        "device_memory_padding": max(int(DEVICE_BYTES * pixels), DEVICE_LEAST),
        "host_memory_padding": max(int(HOST_BYTES * pixels), HOST_LEAST),
        "preallocate_height_hint": height,
        "preallocate_width_hint": width,
        "jpeg_fancy_upsampling": True,  # colours between pixels as the CPU's decoder makes them
    }
