"""Whether the weights of two processes are the same."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch.utils._pytree import keystr, tree_flatten_with_path

OWN = ("running_mean", "running_var")  # of BatchNorm: each process has its own


def digest(held: Any) -> str:
    """sha256 of all tensors in nested dicts and lists, with their places; not of what is OWN."""
    found = hashlib.sha256()
    for where, value in tree_flatten_with_path(held)[0]:
        place = keystr(where)
        if place.rstrip("']").endswith(OWN):
            continue
        found.update(place.encode())
        if isinstance(value, torch.Tensor):
            value = value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        found.update(value if isinstance(value, bytes) else repr(value).encode())
    return found.hexdigest()
