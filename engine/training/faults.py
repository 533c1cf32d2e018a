"""Steps that did not count: how many, how many in a row, and what the first of a row was."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .ranks import Group


class Row(NamedTuple):
    """Steps in a row that did not count."""

    first: int  # its first step, counted from 1
    steps: int  # of the longest row since the last log record
    terms: dict[int, list[str]]  # by process: what of its loss was not finite in the first step

    def in_words(self) -> str:
        """Where the row begins, and with what."""
        return (
            f"from step {self.first} on, whose loss or gradients are not finite "
            f"({self.terms_in_words()})"
        )

    def terms_in_words(self) -> str:
        """Which terms of the loss were not finite in the first step."""
        found = [f"rank {rank}: {', '.join(terms)}" for rank, terms in self.terms.items()]
        return "; ".join(found) or "every term of the loss is finite"


class Faults:
    """Counts in float64 on the device, read only for a log record or a checkpoint."""

    def __init__(self, group: Group, limit: int) -> None:
        """`limit`: the longest row that may be; 0: none."""
        self.group, self.limit = group, limit
        # Since the last record; in a row until now; in the longest row since the last record.
        self.counts = torch.zeros(3, dtype=torch.float64, device=group.device)
        self.first = self.counts.new_zeros(())  # step of the last row
        self.terms = self.counts.new_zeros(0)  # of that step, in this process

    def add(self, step: Tensor, bad: Tensor, terms: Tensor) -> None:
        """Take down a step with its terms (n,), without waiting for the device.

        `bad` (0-dim, bool): it does not count. Behind a row that was too long nothing is.
        """
        if len(self.terms) != len(terms):
            self.terms = self.terms.new_zeros(len(terms))
        _, row, longest = self.counts.unbind()
        self.counts[:2].add_(bad)
        row.mul_(bad)
        begins = (row == 1) & (longest <= self.limit)
        torch.where(begins, step, self.first, out=self.first)
        torch.where(begins, terms, self.terms, out=self.terms)
        torch.maximum(row, longest, out=longest)

    def too_many(self) -> bool:
        """Whether a row was longer than the limit, in any process."""
        return self.group.min(self.limit - self.counts[2]).item() < 0

    def read(self) -> int:
        """The steps since the last record that did not count, at a new one."""
        skipped, row, longest = self.counts.unbind()
        found = int(skipped.item())
        skipped.zero_()
        longest.copy_(row)
        return found

    def last(self, names: Sequence[str]) -> Row:
        """The last row, or the one that was too long, in all processes; `names` of the terms."""
        fine = self.terms.isfinite().tolist()
        broken = [name for name, good in zip(names, fine, strict=True) if not good]
        found = self.group.all((int(self.first.item()), int(self.counts[2].item()), broken))
        first = min(step for step, _, _ in found if step > 0)
        return Row(
            first,
            max(longest for _, longest, _ in found),
            {rank: terms for rank, (step, _, terms) in enumerate(found) if step == first and terms},
        )

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of this process."""
        held = {"counts": self.counts, "first": self.first, "terms": self.terms}
        return {name: value.cpu() for name, value in held.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        device = self.group.device
        self.counts, self.first = state["counts"].to(device), state["first"].to(device)
        self.terms = state["terms"].to(device)
