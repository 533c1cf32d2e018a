"""What `kdfuse cache` records of a teacher's answers, and in which form."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from .schema import LISTED, Network, Strict

Form = Literal["full", "top_k", "sampled"]


class Cache(Strict):
    """How `kdfuse cache` and a run with run.record record; runs read it from what was recorded."""

    views: int | None = Field(
        None, ge=1, description="views of each image, then the first again; null: one an epoch"
    )
    form: Form = Field(
        "full", description="full: all logits; top_k: the largest; sampled: random classes"
    )
    number: Literal["float32", "float16", "int8"] = Field(
        "float16", description="full: type of the logits; int8: with a scale for each row"
    )
    k: int = Field(10, ge=1, description="top_k: how many logits")
    rest: Literal["spread", "bucket", "drop"] = Field(
        "spread", description="top_k: the mass of all others: shared evenly, as one, left out"
    )
    draws: int = Field(12, ge=1, description="sampled: how many classes are drawn")
    keep: int = Field(0, ge=0, description="sampled: how many of the largest stay exact")
    label: bool = Field(
        False, description="top_k, sampled: the label's probability is there, whatever it is"
    )
    temperature: float | None = Field(
        None, gt=0, description="T of the probabilities; null: the method's"
    )
    taps: Annotated[tuple[str, ...], Field(strict=False), LISTED] = Field(
        (), description="points or module paths of the teacher whose features are kept as well"
    )
    tap_number: Literal["float32", "float16"] = Field("float16", description="type of features")
    teachers: Annotated[tuple[Network, ...], Field(strict=False)] = Field(
        (), description="further teachers, whose probabilities are averaged with the first one's"
    )

    @model_validator(mode="after")
    def _options_have_effect(self) -> Cache:
        of = {
            "full": ("number",),
            "top_k": ("k", "rest", "label"),
            "sampled": ("draws", "keep", "label"),
        }
        every = dict.fromkeys(name for names in of.values() for name in names)
        unread = [name for name in every if name not in of[self.form]]
        found = self.unused(f"cache.form {self.form}", "cache", *unread)
        if not self.taps:
            found += self.unused("no cache.taps", "cache", "tap_number")
        elif self.teachers:
            found.append("cache.taps: features are those of one teacher; leave cache.teachers out")
        elif len(set(self.taps)) < len(self.taps):
            found.append(f"cache.taps: a point stands twice in {list(self.taps)}")
        elif self.form != "full":
            found.append("cache.taps: methods of features take whole logits; set cache.form=full")
        if found:
            raise ValueError("\n".join(found))
        return self
