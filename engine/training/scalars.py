"""Everything that changes a step from outside its batch, as one small tensor on the device.

A step that reads its numbers there launches the same work every time: nothing in it is a number of
Python's, which a compiled or captured step would have for good.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor


class Scalars(Mapping[str, Tensor]):
    """0-dim float32 tensors by name, that `write` changes in place."""

    def __init__(self, device: torch.device) -> None:
        # The fused optimisers read float32 on a GPU; on a CPU a rate stays what Python made of it.
        self._exact_type = torch.float32 if device.type == "cuda" else torch.float64
        self._exact = torch.zeros(0, dtype=self._exact_type, device=device)
        self._single = torch.zeros(0, device=device)
        self._at: dict[str, int] = {}

    def write(self, values: Mapping[str, float]) -> None:
        """The numbers of the coming step, of the same names each time."""
        if not self._at:
            self._at = {name: i for i, name in enumerate(values)}
            self._exact = self._exact.new_zeros(len(values))
            alike = self._exact_type == torch.float32
            self._single = self._exact if alike else self._single.new_zeros(len(values))
        if list(values) != list(self._at):
            raise ValueError(f"a step's numbers are {list(self._at)}, got {list(values)}")
        # From pageable memory the driver has its copy before this returns: nothing waits, and the
        # host's may be freed.
        made = torch.tensor(list(values.values()), dtype=self._exact_type)
        self._exact.copy_(made, non_blocking=True)
        if self._single is not self._exact:
            self._single.copy_(self._exact)

    def rate(self, name: str) -> Tensor:
        """The number as an optimiser takes its learning rate."""
        return self._exact[self._at[name]]

    def __getitem__(self, name: str) -> Tensor:
        return self._single[self._at[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._at)

    def __len__(self) -> int:
        return len(self._at)
