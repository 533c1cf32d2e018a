"""The sections of a recipe: every setting with its unit, its default and the values it refuses.

The sections `data` and `run` stand in data.py and run.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator


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
    normalize: Normalize | None = Field(None, description="null: the statistics of data.normalize")
    trained_by: str | None = Field(
        None, description="recipe that trains it first, unless a checkpoint or run: gives weights"
    )
    trained_with: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        (), description="words for that recipe, as in [run.epochs=60]"
    )

    @model_validator(mode="after")
    def _works(self) -> Network:
        if self.trained_with and self.trained_by is None:
            raise ValueError(f"trained_with: {list(self.trained_with)} needs trained_by, a recipe")
        if self.kept and self.checkpoint is not None:
            raise ValueError(
                f"checkpoint: {self.checkpoint} has no effect with name {self.name}, which comes "
                "with its weights; leave one of them out"
            )
        return self

    @property
    def kept(self) -> Path | None:
        """The run's folder of a name run:FOLDER."""
        return Path(self.name.removeprefix("run:")) if self.name.startswith("run:") else None


# What an optimiser reads beside lr and weight_decay.
READ_BY = {
    "sgd": ("momentum", "nesterov"),
    "adamw": ("betas",),
    "lamb": ("betas", "adapt"),
    "lars": ("momentum", "nesterov", "trust", "adapt"),
}
ALL_READ = tuple(dict.fromkeys(field for fields in READ_BY.values() for field in fields))


class Optim(Strict):
    """The optimiser of the student (and of each SL-T, which has its own) and its schedule."""

    name: Literal["sgd", "adamw", "lamb", "lars"] = Field(
        "sgd", description="lamb and lars (large batches) need timm"
    )
    lr: float = Field(gt=0, description="learning rate, at the global batch that scale says")
    scale: Literal["none", "linear", "sqrt"] = Field(
        "none",
        description="none: lr is for run.batch; linear, sqrt: for scale_batch, and lr and min_lr "
        "are multiplied by run.batch / scale_batch or its square root",
    )
    scale_batch: int = Field(256, ge=1, description="linear, sqrt: images of the batch of lr")
    layer_decay: float | None = Field(
        None,
        gt=0,
        le=1,
        description="factor of the rate from each layer of the student to the one before it; "
        "networks of timm; null: one rate for all",
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="sgd, lars")
    nesterov: bool = Field(False, description="sgd, lars: look-ahead momentum")
    betas: Pair = Field((0.9, 0.999), description="adamw, lamb: decay of the two moments, per step")
    trust: float = Field(1e-3, gt=0, description="lars: trust coefficient (eta in the paper)")
    adapt: Literal["all", "decayed"] = Field(
        "all",
        description="lamb, lars: tensors whose rate follows their norms; all: as in the papers; "
        "decayed: those with weight decay, the rest at lr",
    )
    weight_decay: float = Field(
        5e-4, ge=0, description="sgd, lars: L2 term; adamw, lamb: decay beside the moments"
    )
    decay: Literal["all", "matrices"] = Field(
        "all", description="what decays; matrices: not biases, nor the parameters of norms"
    )
    schedule: Literal["step", "cosine", "constant"] = "step"
    milestones: Annotated[tuple[float, ...], Field(strict=False)] = Field(
        (), description="step: the rate drops after so many finished epochs"
    )
    gamma: float = Field(0.1, gt=0, le=1, description="step: factor of each drop")
    warmup_epochs: float = Field(0.0, ge=0, description="epochs of linear growth from 0")
    min_lr: float = Field(0.0, ge=0, description="cosine: rate at the end")
    ema: float | None = Field(
        None, gt=0, lt=1, description="decay per step of the averaged student; null: no average"
    )
    clip: float | None = Field(
        None, gt=0, description="largest norm of all gradients of an optimiser; null: not clipped"
    )

    @model_validator(mode="after")
    def _works(self) -> Optim:
        read = READ_BY[self.name]
        unread = [field for field in ALL_READ if field not in read]
        found = self.unused(f"optim.name {self.name}", "optim", *unread)
        if "nesterov" in read and self.nesterov and self.momentum == 0:
            found.append("optim.nesterov: needs optim.momentum above 0")
        if self.adapt == "decayed" and "adapt" in read and self.weight_decay == 0:
            found.append(
                "optim.adapt: decayed leaves nothing to adapt with optim.weight_decay 0; set "
                "optim.adapt=all, or a weight decay"
            )
        if self.scale == "none":
            found += self.unused("optim.scale none", "optim", "scale_batch")
        if not all(0 <= beta < 1 for beta in self.betas):
            found.append(f"optim.betas: each in [0, 1), got {list(self.betas)}")
        if self.schedule != "step":
            found += self.unused(f"schedule {self.schedule}", "optim", "milestones", "gamma")
        if self.schedule != "cosine":
            found += self.unused(f"schedule {self.schedule}", "optim", "min_lr")
        if self.min_lr > self.lr:
            found.append(f"optim.min_lr: {self.min_lr} is above optim.lr {self.lr}")
        rising = all(a < b for a, b in zip(self.milestones, self.milestones[1:], strict=False))
        if not rising or (self.milestones and self.milestones[0] <= 0):
            found.append(f"optim.milestones: positive and rising, got {list(self.milestones)}")
        if found:
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
