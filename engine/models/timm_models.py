"""timm's models by name, always without its weights: a run never downloads."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from torch import nn


def maker(name: str) -> Callable[[int], nn.Module]:
    """What makes the model `name` of timm with random weights for a number of classes.

    Raises ValueError where timm is not installed or does not know the name.
    """
    try:
        import timm
    except ImportError as error:
        raise ValueError(
            f"name: timm:{name} needs timm, which cannot be imported ({error}): pip install timm"
        ) from error
    known = timm.list_models()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"; did you mean {', '.join(f'timm:{n}' for n in near)}?" if near else ""
        raise ValueError(f"name: timm has no model {name!r}{hint}")
    return lambda classes: timm.create_model(name, pretrained=False, num_classes=classes)
