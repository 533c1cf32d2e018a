"""Logit standardisation (Sun et al., CVPR 2024): only the shape of a row is compared."""

import torch
from torch import Tensor


def standardised(logits: Tensor) -> Tensor:
    """Float32 z-scores of each row of logits (N, C): (z - mean) / (std + 1e-7).

    The deviation is the unbiased one and carries gradient, as released: the gradient has neither a
    part along the constant row nor one along the scores themselves.
    """
    std, mean = torch.std_mean(logits.float(), 1, keepdim=True)
    return (logits.float() - mean) / (std + 1e-7)
