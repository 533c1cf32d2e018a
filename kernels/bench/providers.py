"""Who can compute a case of the benchmark: kdfuse's backends, and the peers that are installed.

A provider's loss takes the case's arguments (logits, then labels) and returns a 0-dim loss. Where
one cannot run the reason is kept, so that a record never lacks a peer without a word.
The signatures of the peers outside PyTorch are those of Liger-Kernel 0.8, quack 0.6 and NVIDIA
apex of 2026.
"""

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from .. import backends
from .peers import Case

Loss = Callable[..., Any]

BACKENDS = ("cpu", "cuda", "triton", "reference")
PEERS = ("eager", "compiled", "liger", "quack", "apex")


def liger_kd() -> Loss:
    """KL at T = 4 from log-probabilities: the softmaxes around it are the user's, so timed too."""
    from liger_kernel.transformers import LigerKLDIVLoss

    divergence = LigerKLDIVLoss(reduction="batchmean")
    return lambda z, t, y: (
        16.0 * divergence(F.log_softmax(z / 4.0, dim=1), F.softmax(t / 4.0, dim=1))
    )


def liger_jsd() -> Loss:
    from liger_kernel.transformers import LigerJSD

    divergence = LigerJSD(beta=0.5)
    return lambda z, t, y: divergence(F.log_softmax(z, dim=1), F.log_softmax(t, dim=1))


def liger_ce() -> Loss:
    from liger_kernel.transformers import LigerCrossEntropyLoss

    return LigerCrossEntropyLoss()


def quack_ce() -> Loss:
    from quack.cross_entropy import cross_entropy

    return cross_entropy


def apex_ce() -> Loss:
    from apex.contrib.xentropy import SoftmaxCrossEntropyLoss

    # smoothing 0; padding_idx defaults to 0, which would leave class 0 out of the loss
    return lambda z, y: SoftmaxCrossEntropyLoss.apply(z, y, 0.0, -100).float().mean()


# peer -> (its package, how to get it, case -> maker of its loss)
OUTSIDE: dict[str, tuple[str, str, dict[str, Callable[[], Loss]]]] = {
    "liger": (
        "liger_kernel",
        "pip install liger-kernel",
        {"kd": liger_kd, "jsd": liger_jsd, "ce": liger_ce},
    ),
    "quack": ("quack", "pip install quack-kernels", {"ce": quack_ce}),
    "apex": (
        "apex",
        "build NVIDIA/apex with its xentropy from source; the apex on PyPI is another project",
        {"ce": apex_ce},
    ),
}
# These write the gradient over the logits that they were given: they get copies of their own.
OVERWRITES = {("liger", "ce")}


def why_not(provider: str, device: str) -> str:
    """Why a provider cannot run here on `device`, "" where it can."""
    if provider in ("reference", "eager", "compiled"):
        return ""
    if provider in BACKENDS:
        if (provider == "cpu") != (device == "cpu"):
            return f"it does not take logits on device {device}"
        return backends.REASONS[provider]()
    package, cure, _ = OUTSIDE[provider]
    spec = importlib.util.find_spec(package)
    if spec is None:
        return f"{package} is not installed; {cure}"
    folders = spec.submodule_search_locations or []
    if provider == "apex" and not any((Path(f) / "contrib").is_dir() for f in folders):
        return f"the {package} installed here is not NVIDIA's; {cure}"
    return "" if device == "cuda" else "its kernels need a GPU"


def loss_of(provider: str, name: str, case: Case) -> Loss | str:
    """The provider's loss of the case, or why it has none."""
    if provider in BACKENDS:
        if case.fused is None:
            return "kdfuse has no such loss"
        return functools.partial(case.fused, backend=provider)
    if provider == "eager":
        return case.eager
    if provider == "compiled":
        torch._dynamo.reset()
        return torch.compile(case.eager, dynamic=False)
    _, _, makers = OUTSIDE[provider]
    if name not in makers:
        return f"it has no such loss; it is measured in {', '.join(makers)}"
    try:
        return makers[name]()
    except ImportError as error:
        return f"it cannot be imported: {error}"


def absent(asked: list[str], device: str) -> dict[str, str]:
    """Every provider that takes no part in a run, and why."""
    reasons = {p: why_not(p, device) or "not asked for" for p in (*BACKENDS, *PEERS)}
    return {p: why for p, why in reasons.items() if p not in asked or why_not(p, device)}
