"""The sections of a recipe: every setting with its unit, its default and the values it refuses.

The sections `data`, `optim` and `run` stand in data.py, optim.py and run.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator


class RecipeError(ValueError):
    """A recipe that cannot be used; the text holds one problem a line."""


class Strict(BaseModel):
    """Base of all sections: unknown keys are refused, text and booleans are not numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    def unused(self, reason: str, section: str, *fields: str) -> list[str]:
        """One problem for each of `fields` that was changed although `reason` leaves it unread."""
        declared = type(self).model_fields
        changed = [f for f in fields if getattr(self, f) != declared[f].default]
        return [
            f"{section}.{f}: {json.dumps(getattr(self, f), default=str)} has no effect with "
            f"{reason}; leave it out or set it to {json.dumps(declared[f].default)}"
            for f in changed
        ]


class RecipeBase(Strict):
    """What the recipes of all tasks share; each section of a recipe is a field."""

    name: str = Field(min_length=1, description="file:row")
    description: str = ""

    def explain(self) -> str:
        """YAML of the recipe, every default filled in, each key with its meaning; loads again."""
        return "\n".join(_rendered(self, "")) + "\n"


# A path may be written as text, a tuple as a list; their members are as strict as the rest.
FilePath = Annotated[Path, Field(strict=False), AfterValidator(Path.expanduser)]
# Behind a list of words: one word alone is a list, too.
LISTED = BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
Pair = Annotated[tuple[float, float], Field(strict=False)]
Triple = Annotated[tuple[float, float, float], Field(strict=False)]


class Normalize(Strict):
    """Per-channel (RGB) statistics: an image of 0..255 becomes (image / 255 - mean) / std."""

    mean: Triple = Field(description="mean of each channel, images scaled to 0..1")
    std: Triple = Field(description="standard deviation of each channel, images scaled to 0..1")

    @model_validator(mode="after")
    def _positive(self) -> Normalize:
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, got {list(self.std)}")
        return self


IMAGENET = Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


class Network(Strict):
    """One network of a run."""

    name: str = Field(
        min_length=1,
        description="resnet8x4, torchvision:resnet18, timm:deit_tiny_patch16_224, run:FOLDER",
    )
    checkpoint: FilePath | None = Field(None, description="file of weights; null: random weights")
    match: Literal["names", "order"] = Field(
        "names",
        description="how a checkpoint's tensors find theirs; order: where names do not fit, by "
        "order and shape, which is printed",
    )
    cache: FilePath | None = Field(
        None, description="the teacher's: folder of its recorded answers, in place of its weights"
    )
    normalize: Normalize | None = Field(None, description="null: the statistics of data.normalize")
    trained_by: str | None = Field(
        None, description="recipe that trains it first, unless a checkpoint or run: gives weights"
    )
    trained_with: Annotated[tuple[str, ...], Field(strict=False), LISTED] = Field(
        (), description="words for that recipe, as in [run.epochs=60]"
    )

    @model_validator(mode="after")
    def _works(self) -> Network:
        if self.trained_with and self.trained_by is None:
            raise ValueError(f"trained_with: {list(self.trained_with)} needs trained_by, a recipe")
        if self.match != "names" and self.checkpoint is None:
            raise ValueError(f"match: {self.match} has no effect without a checkpoint; give one")
        if self.kept and self.checkpoint is not None:
            raise ValueError(
                f"checkpoint: {self.checkpoint} has no effect with name {self.name}, which comes "
                "with its weights; leave one of them out"
            )
        return self

    def anew(self) -> Network:
        """The same network with random weights."""
        return self.model_copy(update={"checkpoint": None, "match": "names", "cache": None})

    @property
    def kept(self) -> Path | None:
        """The run's folder of a name run:FOLDER."""
        return Path(self.name.removeprefix("run:")) if self.name.startswith("run:") else None


class SLT(Network):
    """What is trained beside a student, or the record of it."""

    name: str = Field("", description="as student.name; may be left out with record")
    record: FilePath | None = Field(
        None, description="SL-Ts: folder that a run with run.record wrote, in place of the networks"
    )

    @model_validator(mode="after")
    def _is_one(self) -> SLT:
        if self.record is None:
            if not self.name:
                raise ValueError("name: missing; give a network's name, or record=FOLDER")
            return self
        fields = ("checkpoint", "match", "normalize", "trained_by")
        if found := self.unused(f"record {self.record}", "slt", *fields):
            raise ValueError("\n".join(found))
        return self


Percent = Annotated[float, Field(ge=0, le=100)]
Which = Annotated[
    Literal["best", "last", "unknown"],
    Field(description="the epoch whose accuracy was published: the best one, or the last"),
]


class Cell(Strict):
    """A number in a published table, by the names that the paper gives its row and column."""

    table: str = Field(min_length=1, description="the table's name, as in slkd/1")
    row: str = Field(min_length=1)
    column: str = Field(min_length=1)
    top1: Percent = Field(description="top-1 accuracy, percent")
    spread: float | None = Field(None, ge=0, description="the published +-")
    which: Which = "unknown"
    source: str = Field(min_length=1, description="where the number stands")


class Expect(Strict):
    """The published result that a run is printed beside, and the tables that it stands in."""

    top1: Percent | None = Field(None, description="top-1 accuracy, percent")
    ap: Percent | None = Field(None, description="COCO box AP, percent")
    source: str = Field(min_length=1, description="where the number stands")
    spread: float | None = Field(None, ge=0, description="the published +-")
    which: Which = "unknown"
    table: str | None = Field(None, min_length=1, description="the table's name, as in slkd/1")
    row: str | None = Field(None, min_length=1, description="its row, in the paper's words")
    column: str | None = Field(None, min_length=1, description="its column, in the paper's words")
    also_in: Annotated[tuple[Cell, ...], Field(strict=False)] = Field(
        (), description="cells of further tables, with their own numbers"
    )

    @model_validator(mode="after")
    def _works(self) -> Expect:
        given = [name for name in ("table", "row", "column") if getattr(self, name) is not None]
        if 0 < len(given) < 3:
            raise ValueError(f"expect: table, row and column go together, got only {given}")
        if self.top1 is None and (given or self.spread is not None):
            raise ValueError("expect.top1: missing; the spread and the cell are that number's")
        places = [(cell.table, cell.row, cell.column) for cell in self.cells]
        if len(set(places)) < len(places):
            raise ValueError(f"expect.also_in: a cell stands twice, of {places}")
        return self

    @property
    def cells(self) -> tuple[Cell, ...]:
        """The cells of all tables that the recipe reproduces, the main one first."""
        if self.table is None:
            return self.also_in
        own = self.model_dump(exclude={"also_in", "ap"})
        return (Cell.model_validate(own), *self.also_in)


def _rendered(section: BaseModel, indent: str) -> Iterator[str]:
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield f"{indent}{name}:"
            yield from _rendered(value, indent + "  ")
            continue
        plain = json.loads(section.model_dump_json(include={name}))[name]
        text = yaml.safe_dump(plain, default_flow_style=True, width=10_000).removesuffix("\n...\n")
        line = f"{indent}{name}: {text.strip()}"
        yield f"{line}  # {field.description}" if field.description else line
