"""What is wrong with a recipe, said in its own words: dotted key, value, what is wanted."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ValidationError

WANTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "string_too_short": "text that is not empty",
    "path_type": "a path",
    "tuple_type": "a list, as in [a, b]",
    "model_type": "keys and values",
    "model_attributes_type": "keys and values",
    "dict_type": "keys and values",
}
BOUNDS = {
    "greater_than": ("gt", "above"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "below"),
    "less_than_equal": ("le", "at most"),
}


def for_users(error: Exception) -> bool:
    """Errors whose text is meant for the user: bad values, files, and kdfuse's own classes."""
    own = type(error).__module__.split(".")[0] == "kdfuse"
    return own or isinstance(error, ValueError | OSError)


def keys_of(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key that `model` accepts."""
    for name, field in model.model_fields.items():
        yield prefix + name
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from keys_of(kind, f"{prefix}{name}.")


def teacher(method: Any, given: bool) -> list[str]:
    """What is wrong with `given`, whether there is a teacher; `method` or its class needs one."""
    kind: Any = method if isinstance(method, type) else type(method)
    name = kind.model_fields["name"].default
    if method.uses_teacher and not given:
        return [f"teacher: method {name} needs one; add teacher.name=NETWORK"]
    if given and not method.uses_teacher:
        return [f"teacher: method {name} uses none; leave it out (teacher=null)"]
    return []


def leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every leaf of nested mappings."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from leaves(inner, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, value


def nearest(word: str, known: list[str]) -> str:
    """'; did you mean X?' for the nearest known name, by its last part if need be, or ''."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.75)
    if not close:
        tails = {key.rpartition(".")[2]: key for key in reversed(known)}
        tail = difflib.get_close_matches(word.rpartition(".")[2], list(tails), n=1, cutoff=0.6)
        close = [tails[tail[0]]] if tail else []
    return f"; did you mean {close[0]}?" if close else ""


def _unknown(key: str, known: list[str]) -> str:
    hint = nearest(key, known)
    section = key.rpartition(".")[0]
    if not hint and section in known:
        names = [k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == section]
        hint = f"; {section} has {', '.join(names)}"
    return f"{key}: unknown key{hint}"


def shown(value: Any) -> str:
    """A value as the user wrote it, with its kind where that is the trouble."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f"the text '{value}'"
    return str(value)


def lines(error: ValidationError, known: list[str], tags: set[str]) -> list[str]:
    """One line a problem. `tags`: method names, which pydantic puts into a location."""
    found: list[str] = []
    for one in error.errors():
        loc = list(one["loc"])
        loc = [p for i, p in enumerate(loc) if not (i and loc[i - 1] == "method" and p in tags)]
        key = ".".join(str(part) for part in loc)
        found += _lines_of(key, dict(one), known)
    return found


def first(error: Exception) -> str:
    """What is wrong with a file, in a line: of pydantic's findings the first."""
    if not isinstance(error, ValidationError):
        return str(error)
    one = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(map(str, one["loc"]))
    return f"{where}: {one['msg']}" if where else one["msg"]


def _lines_of(key: str, one: dict[str, Any], known: list[str]) -> list[str]:
    kind, value, context = one["type"], one["input"], one.get("ctx", {})
    if kind == "value_error":
        # A section names its own keys; a section used under several names (student, teacher) or
        # a method may name only the field, so the key goes in front where it is not there yet.
        root = key.split(".")[0]
        texts = str(context["error"]).splitlines()
        return [t if not root or t.startswith(f"{root}.") else f"{key}: {t}" for t in texts]
    if kind == "extra_forbidden":
        return [_unknown(k, known) for k, _ in leaves(value, key)]
    if kind == "missing":
        return [f"{key}: missing"]
    if kind == "union_tag_not_found":
        return ["method.name: missing"]
    if kind == "union_tag_invalid":
        names = context["expected_tags"].replace("'", "")
        hint = nearest(str(context["tag"]), names.split(", "))
        return [f"method.name: got {shown(context['tag'])}, wants one of {names}{hint}"]
    if kind == "unknown_name":
        tag, names, field = context["name"], context["known"], context["field"]
        where = f"{key}.{field}" if field else key
        hint = nearest(str(tag), names.split(", "))
        wants = f"wants one of {names}, or what --import MODULE brings{hint}"
        return [f"{where}: got {shown(tag)}, {wants}"]
    if kind == "literal_error":
        wanted = context["expected"].replace("'", "").replace(" or ", ", ")
        return [f"{key}: got {shown(value)}, wants one of {wanted}"]
    if kind in BOUNDS:
        name, words = BOUNDS[kind]
        return [f"{key}: got {shown(value)}, wants a number {words} {context[name]:g}"]
    if kind in ("too_short", "too_long"):
        return [f"{key}: got {shown(value)}, wants {context['max_length']} values"]
    wanted = WANTED.get(kind)
    return [f"{key}: got {shown(value)}, " + (f"wants {wanted}" if wanted else one["msg"])]
