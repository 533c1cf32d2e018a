"""--beside: each case once more with further words, in the same run and in turn with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .cases import Case, chosen

# What changes a step while its images, its student and the device stay what they are.
SECTIONS = ("method", "optim")
KEYS = (
    "data.cutmix",
    "data.mixup",
    "data.smoothing",
    "run.accumulate",
    "run.amp",
    "run.batch",
    "run.capture",
    "run.channels_last",
    "run.compile",
    "run.compile_only",
    "run.deterministic",
    "run.speed",
    "run.tf32",
    "run.threads",
    "slt.record",
    "teacher.cache",
)


def with_words(
    recipe: str | None,
    words: Sequence[str],
    names: Sequence[str] | None,
    device: str | None,
    further: Sequence[str],
) -> list[Case]:
    """The cases of `chosen`, each followed by the same with `further` words on top of its own.

    A case of which they change nothing stays alone, which is printed. Raises ValueError where that
    is every case, and for words that leave the two nothing to be compared by.
    """
    for word in further:
        check(word)
    cases = chosen(recipe, words, names, device)
    if not further:
        return cases
    others = chosen(recipe, [*words, *further], names, device)
    found, same = [], []
    for case, other in zip(cases, others, strict=True):
        found.append(case)
        if other.key == case.key:
            same.append(case.name)
            continue
        if other.recipe.run.threads is None and case.recipe.run.threads is not None:
            raise ValueError(
                f"--beside run.threads=null: {case.name} takes run.threads="
                f"{case.recipe.run.threads} of the process; give the other number"
            )
        found.append(replace(other, words=tuple(further), without=case))
    if same:
        nothing = f"{' '.join(further)}: changes nothing of {', '.join(same)}"
        if len(same) == len(cases):
            raise ValueError(f"--beside {nothing}; give words that do")
        print(nothing, flush=True)
    return found


def check(word: str) -> None:
    key = word.partition("=")[0]
    if key not in KEYS and key.partition(".")[0] not in SECTIONS:
        may = ", ".join([*(f"{name}.*" for name in SECTIONS), *KEYS])
        raise ValueError(
            f"--beside {word}: both sides have the same images, student and device; what may "
            f"differ is {may}"
        )
