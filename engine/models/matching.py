"""Weights whose names are not the network's: paired by order and shape, where a user says so."""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import groupby, zip_longest
from pathlib import Path

import torch
from torch import Tensor, nn

COUNTER = ".num_batches_tracked"  # of BatchNorm; files of old versions have none


class Unmatched(ValueError):
    """What keeps weights from being paired, in words."""


def in_order(weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, str]:
    """The file's name for each of the network's, by their order; the shapes have to be equal.

    Both are paired without the step counters of BatchNorm, which follow their running variances
    and may be missing. An order that is another within equal shapes cannot be seen. Raises
    Unmatched naming the first pair that differs, or two tensors for one that the network has under
    two names.
    """
    own = model.state_dict(keep_vars=True)
    wanted = [key for key in own if not key.endswith(COUNTER)]
    given = [key for key in weights if not key.endswith(COUNTER)]
    for number, (name, key) in enumerate(zip_longest(given, wanted), 1):
        theirs = _described(name, weights) if name else "nothing more"
        mine = _described(key, own) if key else "nothing more"
        if not name or not key or _kind(weights[name]) != _kind(own[key]):
            raise Unmatched(
                f"{len(given)} tensors for {len(wanted)}; the first that differs is number "
                f"{number}: {theirs} in the file, {mine} in the network"
            )
    pairs = dict(zip(wanted, given, strict=True))
    first: dict[int, str] = {}
    for key, name in pairs.items():
        other = pairs[first.setdefault(id(own[key]), key)]
        if not torch.equal(weights[name], weights[other]):
            raise Unmatched(
                f"{other} and {name} differ in the file, and the network has one tensor for both"
            )
    counted = {}
    for key, name in pairs.items():
        counted[key] = name
        mine, theirs = (place.rpartition(".")[0] + COUNTER for place in (key, name))
        if key.endswith(".running_var") and mine in own and theirs in weights:
            counted[mine] = theirs
    return counted


def renamed(
    weights: Mapping[str, Tensor], model: nn.Module, name: str, path: str | Path
) -> dict[str, Tensor]:
    """The weights of a file under the names of the network `name`; prints what was paired.

    Raises ValueError as `in_order` does.
    """
    try:
        pairs = in_order(weights, model)
    except Unmatched as error:
        raise ValueError(f"checkpoint {path}: match=order: does not fit {name}: {error}") from error
    if os.environ.get("RANK", "0") == "0":
        told = "\n  ".join(_in_words(pairs))
        print(f"{name} <- {path}, by order and shape:\n  {told}", flush=True)
    return {key: weights[given] for key, given in pairs.items()}


def _in_words(pairs: Mapping[str, str]) -> list[str]:
    """The pairs in words, a line for tensors of one module that are of one in the file, too."""

    def modules(pair: tuple[str, str]) -> tuple[str, str]:
        return pair[0].rpartition(".")[0], pair[1].rpartition(".")[0]

    found = []
    for (mine, theirs), group in groupby(pairs.items(), modules):
        ends = [(key.rpartition(".")[2], name.rpartition(".")[2]) for key, name in group]
        tensors = ", ".join(key if key == name else f"{key} <- {name}" for key, name in ends)
        found.append(f"{mine or 'the network'} <- {theirs or 'the file'}: {tensors}")
    return found


def _kind(tensor: Tensor) -> tuple[torch.Size, bool]:
    return tensor.shape, tensor.is_floating_point()


def _described(name: str, held: Mapping[str, Tensor]) -> str:
    shape = " x ".join(map(str, held[name].shape)) or "a number"
    return f"{name} ({shape}{'' if held[name].is_floating_point() else ', whole numbers'})"
