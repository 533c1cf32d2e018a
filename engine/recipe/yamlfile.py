"""Reading YAML as a recipe means it: YAML 1.2 scalars, no duplicate keys, plain values only."""

from __future__ import annotations

import copy
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from .schema import RecipeError

MOST = 100_000  # values of a file
DEEPEST = 100  # lists in lists


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader follows YAML 1.1, where `off` is false, `1e-4` text and `010` eight."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth += 1
        if self.depth > DEEPEST:  # where Python's stack ends hangs on who called
            raise RecipeError(f"more than {DEEPEST} lists or sections within each other")
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if not isinstance(key, str):
                raise RecipeError(f"line {line}: the key {key} is not text; put it in quotes")
            if key in seen:
                raise RecipeError(f"line {line}: key {key} stands twice, first on line {seen[key]}")
            seen[key] = line
        return super().construct_mapping(node, deep=deep)


PLAIN = ("null", "bool", "int", "float", "str", "seq", "map")
_kept = {f"tag:yaml.org,2002:{tag}" for tag in PLAIN} | {None}
_Loader.yaml_constructors = {
    tag: made for tag, made in yaml.SafeLoader.yaml_constructors.items() if tag in _kept
}

for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), _first
    )


def parse(text: str) -> Any:
    """Value of a YAML text: dict, list, str, int, float, bool or None.

    Raises RecipeError naming the line for text that is not YAML, a key that stands twice, a key
    that is not text, or a tag that would make anything but a plain value.
    """
    try:
        value = yaml.load(text, Loader=_Loader)  # noqa: S506 - _Loader is a SafeLoader
        if _size(value, {}) > MOST:
            raise RecipeError(f"more than {MOST} values, counting each alias as what it stands for")
        return value
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}: " if mark else ""
        raise RecipeError(f"{where}not valid YAML: {error.problem or error.context}") from error
    except RecipeError:
        raise
    except Exception as error:  # of a number
        raise RecipeError(f"not valid YAML: {error!r}") from error


def _size(value: Any, known: dict[int, int]) -> int:
    """Values in a value. A few aliases of aliases are more than any memory; `known`: by id."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        known[id(value)] = MOST  # of what holds itself
        inner = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_size(one, known) for one in inner)
    return known[id(value)]


def read(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises FileNotFoundError, or RecipeError naming the file."""
    if not path.is_file():
        raise FileNotFoundError(f"recipe file {path} does not exist")
    try:
        value = _parsed(path.read_text(encoding="utf-8"))
    except (RecipeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise RecipeError(f"{path}: wants keys and values at the top, got {value!r}")
    return copy.deepcopy(value)


# A file with many rows is read again for each of them; more files than come with the package.
_parsed = lru_cache(maxsize=256)(parse)
