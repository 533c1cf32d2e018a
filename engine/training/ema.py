"""The exponential moving average of a network's weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

AVERAGED = "averaged"  # the name of a step's `share`: one for all averages, which begin together


class EMA:
    """A copy of a network, `module`, whose parameters are an exponential moving average.

    The n-th update (from 0) keeps min(decay, (1 + n) / (10 + n)) of the average, so that the
    random start is soon forgotten. Buffers, the integer ones too, are copied. `module` is in eval
    mode, has no gradients, is not compiled, and is evaluated like any network.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.module = copy.deepcopy(model).eval().requires_grad_(False)

    def share(self) -> float:
        """What the coming update, which is counted here, takes of the new weights.

        Counted as the schedule counts steps: with those that are skipped.
        """
        keep = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        return 1 - keep

    @torch.no_grad()
    def update(self, model: nn.Module, share: Tensor) -> None:
        """Take in `share` (0-dim) of the weights of `model`, of the structure at the start."""
        average: list[Tensor] = list(self.module.parameters())
        current: list[Tensor] = list(model.parameters())
        if share.is_cuda:  # where a lerp with a share for each would be a launch for each
            change = torch._foreach_sub(current, average)
            torch._foreach_mul_(change, share)
            torch._foreach_add_(average, change)
        else:
            torch._foreach_lerp_(average, current, [share] * len(average))
        buffers = list(self.module.buffers())
        if buffers:
            torch._foreach_copy_(buffers, list(model.buffers()))

    def state_dict(self) -> dict[str, Any]:
        """The averaged weights ("module") and the number of updates ("updates")."""
        return {"module": self.module.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict()`. Raises RuntimeError when the networks differ."""
        self.module.load_state_dict(state["module"])
        self.updates = state["updates"]
