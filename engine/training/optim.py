"""The optimiser of a network, and its learning rate at any moment."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

from ..recipe.schema import Optim


def decay_groups(optim: Optim, modules: Iterable[nn.Module]) -> list[dict[str, Any]]:
    """The trainable parameters of `modules`, those without weight decay in a group of their own.

    These are what a module names in `no_weight_decay` (a tuple of its parameters' names, or
    timm's method of that name with dotted names), and with optim.decay = "matrices" everything
    that has one dimension or none: biases and the parameters of norms.
    """
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for module in modules:
        excluded = {
            f"{path}.{name}" if path else name
            for path, inner in module.named_modules()
            for name in _undecayed(inner)
        }
        for name, parameter in module.named_parameters():
            vector = optim.decay == "matrices" and parameter.ndim < 2
            if parameter.requires_grad:
                (free if vector or name in excluded else decayed).append(parameter)
    groups: list[dict[str, Any]] = [{"params": decayed}] if decayed else []
    return groups + ([{"params": free, "weight_decay": 0.0}] if free else [])


def _undecayed(module: nn.Module) -> Iterable[str]:
    named: Any = getattr(module, "no_weight_decay", ())
    return named() if callable(named) else named


def build_optimizers(
    optim: Optim, trained: Mapping[str, Iterable[nn.Module]]
) -> dict[str, torch.optim.Optimizer]:
    """An optimiser for each name, of the trainable parameters of its modules."""
    return {name: build_optimizer(optim, decay_groups(optim, own)) for name, own in trained.items()}


def build_optimizer(
    optim: Optim, parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]]
) -> torch.optim.Optimizer:
    """The optimiser that `optim` describes, for parameters or groups of them.

    It is torch's fused one where torch has that for the device and type of all parameters.
    """
    params: list[Any] = list(parameters)
    grouped = [g["params"] if isinstance(g, dict) else [g] for g in params]
    flat = [parameter for group in grouped for parameter in group]
    devices = _get_fused_kernels_supported_devices()
    fused = all(p.device.type in devices and p.is_floating_point() for p in flat)
    if optim.name == "adamw":
        return torch.optim.AdamW(
            params, lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay, fused=fused
        )
    return torch.optim.SGD(
        params,
        lr=optim.lr,
        momentum=optim.momentum,
        nesterov=optim.nesterov,
        weight_decay=optim.weight_decay,
        fused=fused,
    )


def lr_at(optim: Optim, epochs: int, epoch: float) -> float:
    """The learning rate at `epoch` finished epochs (a step's: its number / steps per epoch).

    Warm-up grows linearly from 0 to the schedule's own rate. "step" multiplies by gamma from each
    milestone on; "cosine" falls from the end of the warm-up to min_lr at `epochs`. Raises
    ValueError when the warm-up leaves the cosine no epoch.
    """
    rate = optim.lr
    if optim.schedule == "step":
        rate *= optim.gamma ** sum(epoch >= milestone for milestone in optim.milestones)
    if optim.schedule == "cosine":
        span = epochs - optim.warmup_epochs
        if span <= 0:
            raise ValueError(
                f"optim.warmup_epochs: {optim.warmup_epochs} leaves none of run.epochs={epochs} "
                "for the cosine; lower it"
            )
        done = min(max(epoch - optim.warmup_epochs, 0.0) / span, 1.0)
        rate = optim.min_lr + (optim.lr - optim.min_lr) * (1 + math.cos(math.pi * done)) / 2
    if epoch < optim.warmup_epochs:
        rate *= epoch / optim.warmup_epochs
    return rate


def set_lr(optimizer: torch.optim.Optimizer, lr: float | Tensor) -> None:
    """Give every parameter group of `optimizer` the learning rate `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def saved(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Its state for a checkpoint, with rates as numbers."""
    state = optimizer.state_dict()
    groups = [group | {"lr": float(group["lr"])} for group in state["param_groups"]]
    return state | {"param_groups": groups}


def clip_gradients(optimizer: torch.optim.Optimizer, norm: float) -> None:
    """Scale all gradients of `optimizer` together to an L2 norm of at most `norm`.

    A norm that is not finite makes the weights NaN, which stops the run at its next checkpoint:
    asking for it here would wait for the device.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    nn.utils.clip_grad_norm_(parameters, norm, error_if_nonfinite=False)
