"""Teachers that do not learn: folded for speed, and known by their weights."""

from __future__ import annotations

import hashlib
import warnings

from torch import nn

from ..models import FoldError, fold_batchnorm, fold_dirac


def folded(teacher: nn.Module) -> nn.Module:
    """The teacher with its BatchNorm folded; itself, with a warning, where that cannot be done."""
    try:
        return fold_batchnorm(fold_dirac(teacher))
    except FoldError as error:
        warnings.warn(f"the teacher runs with its BatchNorm layers unfolded: {error}", stacklevel=2)
        return teacher


def digest(networks: list[nn.Module]) -> str:
    """sha256 of all weights and buffers."""
    found = hashlib.sha256()
    for network in networks:
        for name, value in network.state_dict().items():
            found.update(name.encode())
            found.update(value.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()
