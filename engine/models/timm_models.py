"""timm's models by name, always without its weights: a run never downloads."""

from __future__ import annotations

import difflib

from torch import nn


def build(name: str, num_classes: int) -> nn.Module:
    """The model `name` of timm with random weights and `num_classes` outputs.

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
    return timm.create_model(name, pretrained=False, num_classes=num_classes)
