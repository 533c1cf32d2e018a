"""LAMB and LARS: a tensor's step follows the norm of its weights, so that large batches train.

Both give each parameter tensor a trust ratio of norms, 1 where a norm is 0; optim.adapt says which
tensors. Neither bounds the ratio, as the papers (timm's trust_clip is off).
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from ..recipe.optim import Optim


def lamb(optim: Optim, groups: list[Any], parameters: Sequence[torch.Tensor]) -> Optimizer:
    """You et al. 2020, algorithm 2 with phi(z) = z; `parameters` are those of all groups.

    Moments are corrected for their bias, eps is 1e-6 (timm's and apex's), and the clipping of all
    gradients to norm 1 that both have by default is off: optim.clip says. It is NVIDIA apex's
    FusedLAMB where that is installed with its kernels and takes all parameters (float32 or float16
    on CUDA), else timm's Lamb. Raises ValueError where timm is needed and absent.
    """
    settings: dict[str, Any] = {
        "lr": optim.lr,
        "betas": optim.betas,
        "eps": 1e-6,
        "weight_decay": optim.weight_decay,
        "bias_correction": True,
        "grad_averaging": True,
    }
    everywhere = optim.adapt == "all"
    if all(p.is_cuda and p.dtype in (torch.float32, torch.float16) for p in parameters):
        fused = fused_lamb()
        if fused is not None:
            # It has no word for "off"; no norm is above infinity.
            return fused(groups, **settings, max_grad_norm=float("inf"), use_nvlamb=everywhere)
    return timm_optim("lamb").Lamb(groups, **settings, max_grad_norm=None, always_adapt=everywhere)


def lars(optim: Optim, groups: list[Any]) -> Optimizer:
    """You et al. 2017, algorithm 1, by timm's Lars: SGD whose gradient of a tensor w, decay added,
    is multiplied by trust * |w| / (|g| + weight_decay * |w| + 1e-8).

    Where that ratio is 1, `trust` has no part in it. As in torch's SGD the rate multiplies the
    momentum's sum, where the paper sums what it has multiplied: they differ while the rate changes.
    Raises ValueError where timm is absent.
    """
    return timm_optim("lars").Lars(
        groups,
        lr=optim.lr,
        momentum=optim.momentum,
        nesterov=optim.nesterov,
        weight_decay=optim.weight_decay,
        trust_coeff=optim.trust,
        eps=1e-8,
        always_adapt=optim.adapt == "all",
    )


def timm_optim(name: str) -> Any:
    """The module timm.optim, for the optimiser `name`. ValueError where timm is absent."""
    import torch._dynamo.config as dynamo

    # Its import lifts dynamo's limit for the process to a million graphs of a function.
    limit = dynamo.recompile_limit
    try:
        import timm.optim
    except ImportError as error:
        raise ValueError(
            f"optim.name: {name} needs timm, which cannot be imported ({error}): pip install timm"
        ) from error
    finally:
        dynamo.recompile_limit = limit
    return timm.optim


def is_nvidias_apex() -> bool | None:
    """Whether the apex that is installed is NVIDIA's; None where none is.

    Told by its folders: PyPI's project of that name fails when it is imported.
    """
    spec = importlib.util.find_spec("apex")
    if spec is None or not spec.submodule_search_locations:
        return None
    return any((Path(place) / "optimizers").is_dir() for place in spec.submodule_search_locations)


def fused_lamb() -> Any:
    """The class FusedLAMB of NVIDIA's apex; None where that is absent, or not whole (a warning)."""
    if not is_nvidias_apex():
        return None
    try:
        from apex.multi_tensor_apply import multi_tensor_applier
        from apex.optimizers import FusedLAMB
    except ImportError as error:
        why = f"cannot be imported ({error})"
    else:
        if multi_tensor_applier.available:
            return FusedLAMB
        why = "is built without its CUDA kernels"
    warnings.warn(f"optim.name: lamb is timm's, for the apex here {why}", stacklevel=2)
    return None
