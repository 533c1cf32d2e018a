"""The optimisers of a run's networks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

from ..recipe.optim import Optim
from .groups import decay_groups, layer_scales
from .largebatch import lamb, lars
from .scalars import Scalars


def build_optimizers(
    optim: Optim, trained: Mapping[str, Iterable[nn.Module]], students: Iterable[nn.Module]
) -> dict[str, torch.optim.Optimizer]:
    """An optimiser for each name, of the trainable parameters of its modules.

    optim.layer_decay is of the `students` among them; all else learns at the whole rate. Raises
    ValueError for a student without layers to tell apart, and what `build_optimizer` raises.
    """
    scales: dict[nn.Parameter, float] | None = None
    if optim.layer_decay is not None:
        scales = {}
        for student in students:
            scales |= layer_scales(optim.layer_decay, student)
    return {
        name: build_optimizer(optim, decay_groups(optim, own, scales))
        for name, own in trained.items()
    }


def build_optimizer(
    optim: Optim, parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]]
) -> torch.optim.Optimizer:
    """The optimiser that `optim` describes, for parameters or groups of them.

    SGD and AdamW are torch's fused ones where torch has those for the device and type of all
    parameters. Raises ValueError where a package that the optimiser needs is absent.
    """
    params: list[Any] = list(parameters)
    grouped = [g["params"] if isinstance(g, dict) else [g] for g in params]
    flat = [parameter for group in grouped for parameter in group]
    if optim.name == "lamb":
        return lamb(optim, params, flat)
    if optim.name == "lars":
        return lars(optim, params)
    devices = _get_fused_kernels_supported_devices()
    fused = all(p.device.type in devices and p.is_floating_point() for p in flat)
    if optim.name == "adamw":
        return torch.optim.AdamW(
            params, lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay, fused=fused
        )
    sgd = torch.optim.SGD(
        params,
        lr=optim.lr,
        momentum=optim.momentum,
        nesterov=optim.nesterov,
        weight_decay=optim.weight_decay,
        fused=fused,
    )
    if optim.momentum:
        # A fused first step that is skipped would leave them as memory was. -0 + g is g, and so is
        # the sum of the first step, to the bit; 0 + g is not where g is -0.
        for parameter in flat:
            sgd.state[parameter]["momentum_buffer"] = torch.full_like(parameter.detach(), -0.0)
    return sgd


def class_of(optimizers: Mapping[str, torch.optim.Optimizer]) -> str:
    """The class of a run's optimisers, with its module: torch.optim.sgd.SGD."""
    kinds = {type(optimizer) for optimizer in optimizers.values()}
    return ", ".join(sorted(f"{kind.__module__}.{kind.__qualname__}" for kind in kinds))


def rates(optimizers: Iterable[torch.optim.Optimizer], lr: float) -> dict[str, float]:
    """The learning rate `lr`, and its part for each scale of parameter groups, by name."""
    scales = {scale_of(group) for optimizer in optimizers for group in optimizer.param_groups}
    return {"lr": lr} | {rate_name(scale): lr * scale for scale in sorted(scales)}


def scale_of(group: Mapping[str, Any]) -> float:
    scale: float = group.get("lr_scale", 1.0)
    return scale


def rate_name(scale: float) -> str:
    return "lr" if scale == 1 else f"lr*{scale!r}"


def set_lr(optimizer: torch.optim.Optimizer, lr: float, now: Scalars) -> None:
    """Give every parameter group of `optimizer` its part of the learning rate `lr`.

    To torch's optimisers as the tensors of `now`, which has what `rates` gives; others would read
    a tensor back from the device, and get numbers.
    """
    reads_tensors = type(optimizer).__module__.startswith("torch.")
    for group in optimizer.param_groups:
        scale = scale_of(group)
        group["lr"] = now.rate(rate_name(scale)) if reads_tensors else lr * scale


def saved(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Its state for a checkpoint, with rates as numbers."""
    state = optimizer.state_dict()
    groups = [group | {"lr": float(group["lr"])} for group in state["param_groups"]]
    return state | {"param_groups": groups}


def clip_gradients(optimizer: torch.optim.Optimizer, norm: float) -> None:
    """Scale all gradients of `optimizer` together to an L2 norm of at most `norm`.

    Asking whether the norm is finite would wait for the device; guard.py looks at the gradients.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    nn.utils.clip_grad_norm_(parameters, norm, error_if_nonfinite=False)
