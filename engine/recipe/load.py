"""A recipe: what a run trains, on what and how; read from YAML, checked before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError, model_validator

from ..detection.method import METHODS as DETECTION_METHODS
from ..detection.recipe import DetectionRecipe
from . import problems, yamlfile
from .cache import Cache
from .data import Data
from .method import KNOWN, AnyMethod
from .misfits import misfits
from .optim import Optim
from .run import Run
from .schema import SLT, Expect, Network, RecipeBase, RecipeError, Strict

SHIPPED = Path(__file__).resolve().parents[2] / "recipes"

LEARNER = r"^[a-z][a-z0-9_]*$"


class Also(Strict):
    """Another student or other settings, trained on the same batches and teacher outputs."""

    method: AnyMethod
    student: Network
    slt: SLT | None = Field(None, description="null: the teacher's network, random weights")


class Recipe(RecipeBase):
    """Everything that decides what a run computes."""

    method: AnyMethod
    data: Data
    student: Network
    teacher: Network | None = None
    slt: SLT | None = Field(
        None,
        description="SL-Ts, peers or a teacher in training; null: the teacher's, random weights",
    )
    assistants: Annotated[tuple[Network, ...], Field(strict=False)] = Field(
        (), description="further frozen teachers, for the methods that read them"
    )
    also: dict[Annotated[str, Field(pattern=LEARNER)], Also] = Field(
        {}, description="name: method and student that share loader and teacher with this one"
    )
    optim: Optim
    run: Run
    cache: Cache = Cache.model_validate({})
    expect: Expect | None = None

    @model_validator(mode="after")
    def _sections_fit(self) -> Recipe:
        if found := misfits(self):
            raise ValueError("\n".join(found))
        return self

    def learners(self, main: str) -> dict[str, Also]:
        """All students with their methods by name, this recipe's own first as `main`."""
        own = Also.model_construct(method=self.method, student=self.student, slt=self.slt)
        return {main: own, **self.also}

    @classmethod
    def load(cls, name_or_path: str | Path, overrides: Iterable[str] = ()) -> Any:
        """As the function `load`; a recipe of another task comes back as what that task has."""
        return load(name_or_path, overrides)

    def without_files(self) -> Recipe:
        """The same without the files of weights that it starts from."""
        plain = self.model_dump()
        for part in (plain, *plain["also"].values()):
            for role in ("student", "teacher", "slt"):
                if part.get(role):
                    part[role] |= {"checkpoint": None, "match": "names", "cache": None}
        for assistant in plain["assistants"]:
            assistant |= {"checkpoint": None, "match": "names"}
        return type(self).model_validate(plain)


AnyRecipe = Recipe | DetectionRecipe

TASKS: dict[str | None, tuple[type[AnyRecipe], Mapping[str, type[Strict]]]] = {
    None: (Recipe, KNOWN),  # classification, which recipes do not name
    "detection": (DetectionRecipe, DETECTION_METHODS),
}


def load(name_or_path: str | Path, overrides: Iterable[str] = ()) -> AnyRecipe:
    """The recipe of a shipped name (`cifar100/kd:resnet56-resnet20`) or of a YAML file.

    A file is given by its path, with `:row` behind it where it has several rows; its `task` says
    of which kind it is. Each override is a word `a.b=c`, c in YAML. Raises FileNotFoundError for
    a path that is not there and RecipeError, one problem a line, for all else.
    """
    path, file_name, row = _locate(str(name_or_path))
    raw, name = _pick_row(yamlfile.read(path), file_name, row)
    raw.setdefault("name", name)
    return from_sections(raw, overrides)


def from_sections(raw: dict[str, Any], overrides: Iterable[str] = ()) -> AnyRecipe:
    """The recipe of plain sections, `name` among them, and words `a.b=c`. Raises RecipeError."""
    name, written, words = raw["name"], _method(raw), list(overrides)
    raw = dict(raw)
    found = _apply(raw, words)
    task = raw.get("task")
    if task not in tuple(TASKS):  # a list is no key
        wanted = "detection, or no such key for classification"
        raise RecipeError(f"task: got {problems.shown(task)}, wants {wanted}")
    model, methods = TASKS[task]
    try:
        recipe = model.model_validate(raw)
    except ValidationError as error:
        switched = any(word.startswith("method.name=") for word in words)
        if switched and _method(raw) in methods and _method(raw) != written:
            found.append(
                f"method.name: {name} is written for {written}, and its other options stay; "
                f"start from a recipe of {_method(raw)}, or replace the section whole: "
                f"method='{{name: {_method(raw)}}}'"
            )
        found += _explain(error, raw, model, methods)
    if found:
        raise RecipeError("\n".join(dict.fromkeys(found)))
    return recipe


def recipes() -> list[str]:
    """Names of all recipes that come with the package, as `Recipe.load` takes them."""
    return [
        f"{file}:{row}" if row else file
        for file, path in _shipped().items()
        for row in yamlfile.read(path).get("rows") or [""]
    ]


def _method(raw: dict[str, Any]) -> str | None:
    method = raw.get("method")
    name = method.get("name") if isinstance(method, dict) else None
    return name if isinstance(name, str) else None


def _shipped() -> dict[str, Path]:
    files = sorted(SHIPPED.rglob("*.yaml"))
    return {path.relative_to(SHIPPED).with_suffix("").as_posix(): path for path in files}


def _locate(text: str) -> tuple[Path, str, str]:
    """Path of the file, its name in the recipe's name, and the row asked for ('' if none)."""
    head, _, row = text.rpartition(":") if ":" in text else (text, "", "")
    if text.endswith((".yaml", ".yml")):
        head, row = text, ""
    if head.endswith((".yaml", ".yml")):
        return Path(head), Path(head).stem, row
    shipped = _shipped()
    if head not in shipped:
        if "." in text and text.partition(".")[0] in Recipe.model_fields:
            raise RecipeError(f"no recipe {text}; a setting is given its value as {text}=VALUE")
        hint = problems.nearest(text, [*shipped, *recipes()])
        raise RecipeError(
            f"no recipe {text}{hint}; kdfuse recipes --all lists them, and one of your own is a "
            "path, MINE.yaml"
        )
    return shipped[head], head, row


def _pick_row(raw: dict[str, Any], file: str, row: str) -> tuple[dict[str, Any], str]:
    """Shared settings and row merged, and the recipe's name."""
    rows = raw.pop("rows", None)
    if rows is None:
        if row:
            raise RecipeError(f"{file} has no rows, so no row {row}")
        return raw, file
    if not isinstance(rows, dict) or not rows:
        raise RecipeError(f"{file}: rows: wants row names with their settings, got {rows!r}")
    if not row and len(rows) > 1:
        raise RecipeError(f"{file} has several rows, say which: {', '.join(rows)}")
    row = row or next(iter(rows))
    if row not in rows:
        hint = problems.nearest(row, list(rows))
        raise RecipeError(f"{file} has no row {row}{hint} (rows: {', '.join(rows)})")
    settings = rows[row] or {}
    if not isinstance(settings, dict):
        raise RecipeError(f"{file}:{row}: wants keys and values, got {settings!r}")
    return _merged(raw, settings), f"{file}:{row}"


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in over.items():
        both = isinstance(out.get(key), dict) and isinstance(value, dict)
        out[key] = _merged(out[key], value) if both else value
    return out


def _apply(raw: dict[str, Any], overrides: Iterable[str]) -> list[str]:
    """Write the words into `raw`; the problems of those that cannot be read."""
    found = []
    for word in overrides:
        key, sign, text = word.partition("=")
        if not sign or not all(key.split(".")):
            found.append(f"{word}: wants the form key=value, as in optim.lr=0.1")
            continue
        try:
            value = yamlfile.parse(text)
        except RecipeError as error:
            found.append(f"{key}: {error}")
            continue
        *parents, last = key.split(".")
        place = raw
        for parent in parents:
            if not isinstance(place.get(parent), dict):
                place[parent] = {}
            place[parent] = place = dict(place[parent])
        place[last] = value
    return found


def _explain(
    error: ValidationError,
    raw: dict[str, Any],
    model: type[BaseModel],
    methods: Mapping[str, type[Strict]],
) -> list[str]:
    """Lines for pydantic's findings and for the cross checks it did not get to."""
    name = _method(raw)
    method = methods.get(name) if name is not None else None
    known = [key for key in problems.keys_of(model) if not key.startswith("method.")]
    known += problems.keys_of(method, "method.") if method else []
    found = problems.lines(error, known, set(methods))
    if method:
        found += problems.teacher(method, raw.get("teacher") is not None)
    return found
