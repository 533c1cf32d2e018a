"""The parameter groups of an optimiser: what decays, and at which share of the rate it learns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ..recipe.optim import Optim


def decay_groups(
    optim: Optim, modules: Iterable[nn.Module], scales: Mapping[nn.Parameter, float] | None = None
) -> list[dict[str, Any]]:
    """The trainable parameters of `modules`, those without weight decay in groups of their own.

    These are what a module names in `no_weight_decay` (a tuple of its parameters' names, or
    timm's method of that name with dotted names), and with optim.decay = "matrices" everything
    that has one dimension or none: biases and the parameters of norms.

    With `scales` (see `layer_scales`) a group holds those of one scale, its "lr_scale", which is 1
    for what `scales` does not name; the smallest comes first.
    """
    found: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for module in modules:
        excluded = {
            f"{path}.{name}" if path else name
            for path, inner in module.named_modules()
            for name in _undecayed(inner)
        }
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                vector = optim.decay == "matrices" and parameter.ndim < 2
                scale = (scales or {}).get(parameter, 1.0)
                found.setdefault((vector or name in excluded, scale), []).append(parameter)
    groups: list[dict[str, Any]] = []
    for (free, scale), parameters in sorted(found.items(), key=lambda entry: entry[0]):
        group: dict[str, Any] = {"params": parameters}
        if free:
            group["weight_decay"] = 0.0
        if scales is not None:
            group["lr_scale"] = scale
        groups.append(group)
    return groups


def _undecayed(module: nn.Module) -> Iterable[str]:
    named: Any = getattr(module, "no_weight_decay", ())
    return named() if callable(named) else named


def layer_scales(decay: float, network: nn.Module) -> dict[nn.Parameter, float]:
    """For each parameter of a network decay ** (depth - layer): 1 at the output, least at the stem.

    Clark et al. 2020 (ELECTRA), with the layers of BEiT (Bao et al. 2022) as timm numbers them for
    each of its networks: every block is one, and so is the stem; what follows the last block is
    the last layer or shares it. Raises ValueError for a network that numbers no layers.
    """
    matcher: Any = getattr(network, "group_matcher", None)
    if matcher is None:
        raise ValueError(
            f"optim.layer_decay: {decay} needs a student that says which layer a parameter belongs "
            f"to (group_matcher), as networks timm:NAME do; {type(network).__name__} does not; "
            "take one of those or set optim.layer_decay=null"
        )
    from timm.models import group_parameters  # the network is timm's

    layers = group_parameters(network, matcher(coarse=False), reverse=True)
    depth = max(layers.values())
    return {p: decay ** (depth - layers[name]) for name, p in network.named_parameters()}
