"""Which image, which crop and which flip stand at each position of an epoch: pure arithmetic.

Every number is a hash of (seed, epoch, position), so a run can stop and go on anywhere, and any
number of processes sees one global order. B: positions asked for, n: images of the set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..recipe.data import Data
from ..recipe.schema import Normalize

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15
ATTEMPTS = 10  # of random_resized_crop before it falls back to the centre
DRAWS = 2 * ATTEMPTS + 3  # areas, ratios, top, left, flip
# Streams of draws that must not meet.
ORDER, AUGMENT, MIX, RANK, RANDAUGMENT, ERASE, RECORD, SLTS, ITEM = 1, 2, 3, 4, 5, 6, 7, 8, 9

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Changes:
    """What is done to the B crops of a plan: `ops` in turn, then noise over `box`."""

    ops: Ints  # (B, K) places in augment.OPS; -1: none
    levels: Floats  # (B, K) strengths, -10 to 10; ops of one direction take the absolute value
    box: NDArray[np.int32]  # (B, 4) top, left, height, width in pixels of the crop; 0 x 0: none
    noise: NDArray[np.uint64]  # (B,) keys of the noise
    normalize: Normalize  # the images' mean, and with it their spread, which the noise has


@dataclass(frozen=True)
class Plan:
    """What a loader does for B images: cut `box`, resize it to `scaled`, cut `size` x `size` at
    `window` of that, mirror where `flip`, do `changes`. A box that reaches outside its image takes
    zeros there.
    """

    index: Ints  # (B,) row of the manifest
    box: NDArray[np.int32]  # (B, 4) top, left, height, width in source pixels
    flip: NDArray[np.bool_]  # (B,)
    scaled: NDArray[np.int32]  # (B, 2) height, width
    window: NDArray[np.int32]  # (B, 2) top, left
    changes: Changes | None = None


def key(*words: int) -> int:
    """A 64-bit key of several integers; every word changes every bit."""
    state = np.zeros(1, np.uint64)
    for word in words:
        state = _mix(state ^ np.array([word & MASK], np.uint64))
    return int(state[0])


def uniforms(stream: int, counters: NDArray[Any]) -> Floats:
    """Draws in [0, 1) of the stream with this key, one for each non-negative counter."""
    return (_hash(stream, counters) >> np.uint64(11)) * 2.0**-53


def keys(stream: int, counters: NDArray[Any]) -> Ints:
    """A key of its own, any int64, of the stream for each non-negative counter."""
    return _hash(stream, counters).view(np.int64)


def permutation(seed: int, epoch: int, n: int) -> Ints:
    """Order of the n images in an epoch, int64 (n,)."""
    return np.argsort(_hash(key(seed, epoch, ORDER), np.arange(n)), kind="stable").astype(np.int64)


def places(positions: Ints, batch: int, repeats: int) -> Ints:
    """Places in the epoch's order of the images at these positions, (B,).

    In each global batch of G positions ceil(G / repeats) images follow one another again and again
    (repeated augmentation, Hoffer et al., CVPR 2020, "Augment your batch"): position p has the one
    at p % ceil(G / repeats). Copies lie apart, and an epoch goes over 1 / repeats of its order.
    """
    images = -(-batch // repeats)
    step, within = np.divmod(positions, batch)
    return step * images + within % images


def plan(
    data: Data,
    sizes: NDArray[np.int32],  # (n, 2) height, width
    seed: int,
    epoch: int,
    positions: Ints,  # (B,)
    *,
    index: Ints | None = None,  # (B,)
) -> Plan:
    """The crops and flips at these positions of an epoch.

    `index` holds the rows at these positions where the caller has them already (repeated, or
    unreadable files replaced); without it they are `permutation(seed, epoch, n)[positions]`.
    """
    if index is None:
        index = permutation(seed, epoch, len(sizes))[positions]
    counters = positions[:, None] * DRAWS + np.arange(DRAWS)
    u = uniforms(key(seed, epoch, AUGMENT), counters)  # (B, DRAWS)
    flip = (u[:, -1] < 0.5) & data.flip
    if data.augment == "none":
        return _whole(data, sizes, index, flip)
    height, width = sizes[index].astype(np.int64).T
    if data.augment == "pad_crop":
        box = _pad_crop(data, height, width, u)
    else:
        box = _random_resized_crop(data, height, width, u)
    scaled = np.full((len(index), 2), data.size, np.int32)
    return Plan(index, box, flip, scaled, np.zeros_like(scaled))


def eval_plan(data: Data, sizes: NDArray[np.int32], index: Ints) -> Plan:
    """The evaluation view of these rows: resize, centre crop, no flip."""
    return _whole(data, sizes, index, np.zeros(len(index), np.bool_))


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The splitmix64 step: adds the golden ratio, then mixes; a bijection of 64-bit words."""
    x = x + np.uint64(GOLDEN)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _hash(stream: int, counters: NDArray[Any]) -> NDArray[np.uint64]:
    return _mix(np.uint64(stream) ^ _mix(counters.astype(np.uint64)))


def _whole(data: Data, sizes: NDArray[np.int32], index: Ints, flip: NDArray[np.bool_]) -> Plan:
    """The whole image, short side to `eval_resize`, then the centre; torchvision's rounding."""
    whole = sizes[index].astype(np.int64)
    if data.eval_resize is None:
        scaled = np.full_like(whole, data.size)
    else:
        scaled = data.eval_resize * whole // whole.min(axis=1, keepdims=True)
    window = np.rint((scaled - data.size) / 2)
    box = np.concatenate([np.zeros_like(whole), whole], axis=1)
    return Plan(index, _int32(box), flip, _int32(scaled), _int32(window))


def _pad_crop(data: Data, height: Ints, width: Ints, u: Floats) -> NDArray[np.int32]:
    """A window of `size` x `size` anywhere in the image with `padding` pixels on each side."""
    margin = 2 * data.padding - data.size + 1
    top = _below(u[:, -3], height + margin) - data.padding
    left = _below(u[:, -2], width + margin) - data.padding
    side = np.full_like(top, data.size)
    return _int32(np.stack([top, left, side, side], axis=1))


def _random_resized_crop(data: Data, height: Ints, width: Ints, u: Floats) -> NDArray[np.int32]:
    """Ten tries at a box of random area and log-uniform ratio, then the largest centred box."""
    (small, large), (narrow, wide) = data.scale, data.ratio
    area = (height * width)[:, None] * (small + (large - small) * u[:, :ATTEMPTS])
    share = u[:, ATTEMPTS : 2 * ATTEMPTS]
    ratio = np.exp(np.log(narrow) + (np.log(wide) - np.log(narrow)) * share)
    w = np.rint(np.sqrt(area * ratio)).astype(np.int64)  # (B, ATTEMPTS)
    h = np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (w > 0) & (h > 0) & (w <= width[:, None]) & (h <= height[:, None])
    found, first = fits.any(axis=1), fits.argmax(axis=1)[:, None]
    fall_h = np.where(width < narrow * height, np.rint(width / narrow), height).astype(np.int64)
    fall_w = np.where(width > wide * height, np.rint(height * wide), width).astype(np.int64)
    h = np.where(found, np.take_along_axis(h, first, axis=1)[:, 0], fall_h)
    w = np.where(found, np.take_along_axis(w, first, axis=1)[:, 0], fall_w)
    top = np.where(found, _below(u[:, -3], height - h + 1), (height - h) // 2)
    left = np.where(found, _below(u[:, -2], width - w + 1), (width - w) // 2)
    return _int32(np.stack([top, left, h, w], axis=1))


def _below(u: Floats, bound: Ints) -> Ints:
    """Integers in [0, bound) from draws in [0, 1)."""
    return (u * bound).astype(np.int64)


def _int32(values: NDArray[Any]) -> NDArray[np.int32]:
    return values.astype(np.int32)
