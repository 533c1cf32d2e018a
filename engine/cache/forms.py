"""In which form a cache holds the answers of a teacher: rows of as many bytes for each view.

N views, C classes. Every form is made from whole logits and gives what the losses take: the logits
(N, C), or a SparseTeacher of k of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...kernels.sampled import largest
from ...kernels.sparse import SparseTeacher
from ..recipe.cache import Cache

Answer = Tensor | SparseTeacher
Rows = NDArray[Any]  # (N,) of Form.row
INT8 = 127
HIGHEST = 65504.0  # of float16


@dataclass(frozen=True)
class Form:
    """One form, with all that decides its bytes; see recipe.cache.Cache for the settings."""

    form: str
    classes: int
    temperature: float | None  # None: whole logits of one teacher, which hold at any
    number: str = "float32"
    k: int = 0
    rest: str = "drop"
    draws: int = 0
    keep: int = 0
    label: bool = False
    taps: tuple[tuple[str, tuple[int, ...]], ...] = ()  # with the shape for one image
    tap_number: str = "float16"

    @property
    def whole(self) -> bool:
        """Whether all logits are there."""
        return self.form == "full"

    @property
    def exact(self) -> int:
        """Listed classes whose logit or probability is that of the teacher."""
        return (self.k if self.form == "top_k" else self.keep) + self.label

    @cached_property
    def row(self) -> np.dtype[Any]:
        """The bytes of a view."""
        if self.whole:
            number = {"float32": "<f4", "float16": "<f2", "int8": "i1"}[self.number]
            parts: list[Any] = [("logits", number, self.classes)]
            parts += [("scale", "<f4")] if self.number == "int8" else []
            tap = {"float32": "<f4", "float16": "<f2"}[self.tap_number]
            parts += [(f"tap{i}", tap, last(shape)) for i, (_, shape) in enumerate(self.taps)]
            return np.dtype(parts)
        index = "<u2" if self.classes <= 2**16 else "<u4"
        parts = [("classes", index, self.exact), ("values", "<f2", self.exact)]
        if self.form == "sampled":
            # A drawn class and how often, in one number: class * 2^bits + count.
            wide = (self.classes - 1).bit_length() + self.bits > 16
            parts += [("drawn", "<u4" if wide else "<u2", self.draws), ("rest", "<f2")]
        elif self.rest != "drop":
            parts += [("mass", "<f4")]
        return np.dtype(parts)

    @property
    def tensors(self) -> int:
        """How many `decode` makes."""
        if self.whole:
            return 1 + len(self.taps)
        return 2 + (self.form == "top_k" and self.rest != "drop")

    @property
    def bits(self) -> int:
        """Of a count of draws."""
        return self.draws.bit_length()

    def encode(
        self, logits: Tensor, target: Tensor, keys: Tensor, taps: Sequence[Tensor] = ()
    ) -> Rows:
        """The rows of logits (N, C) with labels (N,) and keys (N,), which decide the draws, and of
        the features, each (N, ...) as the form says.

        Raises ValueError for numbers that the form's do not hold.
        """
        rows = np.zeros(len(logits), self.row)
        logits = logits.float()
        if not logits.isfinite().all():
            raise ValueError("the teacher's logits are not finite; look at its weights and images")
        if self.whole:
            self._encode_whole(rows, logits)
        elif self.form == "top_k":
            self._encode_top(rows, logits, target)
        else:
            self._encode_drawn(rows, logits, target, keys)
        for i, (value, (name, _)) in enumerate(zip(taps, self.taps, strict=True)):
            if not value.isfinite().all():
                raise ValueError(f"the teacher's features at {name} are not finite; look at it")
            if self.tap_number == "float16" and (highest := value.abs().max().item()) > HIGHEST:
                raise ValueError(
                    f"cache.tap_number: float16 does not hold a feature of {highest:.6g} at "
                    f"{name}; use float32"
                )
            rows[f"tap{i}"] = channels_last(value.float()).numpy()
        return rows

    def decode(self, rows: Rows) -> tuple[Tensor, ...]:
        """Tensors with a row for each view, from which `answer` makes what the losses take."""
        if self.whole:
            logits = torch.from_numpy(np.array(rows["logits"]))
            if self.number == "int8":
                logits = logits * torch.from_numpy(np.array(rows["scale"]))[:, None]
            taps = [np.array(rows[f"tap{i}"]) for i in range(len(self.taps))]
            return (logits, *(channels_first(torch.from_numpy(tap)) for tap in taps))
        classes, values = rows["classes"].astype(np.int64), rows["values"].astype(np.float32)
        if self.form == "top_k":
            mass = [torch.from_numpy(np.array(rows["mass"]))] if self.rest != "drop" else []
            return (torch.from_numpy(values), torch.from_numpy(classes), *mass)
        packed = rows["drawn"].astype(np.int64)
        counts = packed & (2**self.bits - 1)
        with np.errstate(divide="ignore"):
            drawn = np.log(counts / self.draws) + rows["rest"].astype(np.float64)[:, None]
        assert self.temperature is not None
        log_q = np.concatenate([values, drawn], axis=1) * self.temperature
        index = np.concatenate([classes, packed >> self.bits], axis=1)
        return torch.from_numpy(log_q.astype(np.float32)), torch.from_numpy(index)

    def answer(self, made: tuple[Tensor, ...]) -> Answer:
        """What the losses take, of the tensors of `decode`."""
        return made[0] if self.whole else SparseTeacher(*made)

    def _encode_whole(self, rows: Rows, logits: Tensor) -> None:
        if self.number == "int8":
            scale = logits.abs().amax(1) / INT8
            scale = torch.where(scale > 0, scale, 1.0)
            rows["scale"] = scale.numpy()
            logits = (logits / scale[:, None]).round()
        elif self.number == "float16" and (highest := logits.abs().max().item()) > HIGHEST:
            raise ValueError(
                f"cache.number: float16 does not hold a logit of {highest:.6g}; use float32"
            )
        rows["logits"] = logits.numpy()

    def _encode_top(self, rows: Rows, logits: Tensor, target: Tensor) -> None:
        order = logits
        if self.label:  # first in the list, wherever it would stand
            order = logits.scatter(1, target[:, None], torch.inf)
        index = order.topk(self.exact, dim=1).indices
        # Of the largest, which no loss notices: numbers near 0 have the most digits.
        values = logits.gather(1, index) - logits.amax(1, keepdim=True)
        rows["classes"], rows["values"] = index.numpy(), values.clamp(min=-HIGHEST).numpy()
        if self.rest != "drop":
            assert self.temperature is not None
            softmax = (logits.double() / self.temperature).softmax(1)
            mass = softmax.scatter(1, index, 0.0).sum(1)
            # Below 1 in float32 as well, where a mass of 1 would leave nothing to the listed.
            rows["mass"] = mass.clamp(max=1 - 2**-24).numpy()

    def _encode_drawn(self, rows: Rows, logits: Tensor, target: Tensor, keys: Tensor) -> None:
        assert self.temperature is not None
        made = SparseTeacher.sample(
            logits.double(),
            self.draws,
            temperature=self.temperature,
            keep=self.keep,
            seed=keys,
            target=target if self.label else None,
        )
        log_q = made.values / self.temperature  # (N, exact + draws)
        kept = largest(logits, self.keep)
        if self.label:
            kept = kept.scatter(1, target[:, None], True)
        log_p = (logits.double() / self.temperature).log_softmax(1)
        rest = log_p.masked_fill(kept, -torch.inf).logsumexp(1)
        # A label among the largest leaves a place, which has the class that was drawn most often.
        exact, drawn = log_q.split([self.exact, self.draws], 1)
        counts = ((drawn - rest[:, None]).exp() * self.draws).round().long()
        index = made.indices
        rows["classes"], rows["values"] = index[:, : self.exact].numpy(), exact.numpy()
        rows["drawn"] = (index[:, self.exact :] * 2**self.bits + counts).numpy()
        rows["rest"] = rest.numpy()


def last(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of an image's map with its channels last, as networks have it in memory."""
    return (*shape[1:], shape[0]) if len(shape) == 3 else tuple(shape)


def channels_last(value: Tensor) -> Tensor:
    return value.permute(0, 2, 3, 1) if value.dim() == 4 else value


def channels_first(value: Tensor) -> Tensor:
    return value.permute(0, 3, 1, 2) if value.dim() == 4 else value


def form_of(
    cache: Cache,
    classes: int,
    temperature: float | None,
    shapes: Mapping[str, Sequence[int]] = MappingProxyType({}),
) -> Form:
    """The form of a recipe's section for a data set; `temperature` is the method's, if it has one,
    `shapes` are those of the section's taps for a batch of one image.

    Raises ValueError for settings that do not fit so many classes, and without a temperature where
    the form needs one.
    """
    listed = {"full": 0, "top_k": cache.k + cache.label}.get(
        cache.form, cache.keep + cache.label + cache.draws
    )
    if listed >= classes:
        raise ValueError(
            f"cache.form={cache.form} would list {listed} of {classes} classes; lower "
            f"{'cache.k' if cache.form == 'top_k' else 'cache.draws'} or set cache.form=full"
        )
    of_one = cache.form == "full" and not cache.teachers
    wanted = None if of_one else cache.temperature or temperature
    if of_one and cache.temperature is not None:
        raise ValueError(
            f"cache.temperature={cache.temperature} has no effect on the whole logits of one "
            "teacher; leave it out"
        )
    needs_none = of_one or (cache.form == "top_k" and cache.rest == "drop" and not cache.teachers)
    if wanted is None and not needs_none:
        raise ValueError(
            f"cache.temperature: missing; cache.form={cache.form} holds probabilities at one "
            "temperature, and this recipe's method has none"
        )
    read = {
        "full": ("number",),
        "top_k": ("k", "rest", "label"),
        "sampled": ("draws", "keep", "label"),
    }[cache.form]
    taps = tuple((name, tuple(shape[1:])) for name, shape in shapes.items())
    given = {name: getattr(cache, name) for name in read}
    return Form(cache.form, classes, wanted, **given, taps=taps, tap_number=cache.tap_number)


FIELDS = tuple(field.name for field in fields(Form))
