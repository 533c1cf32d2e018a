"""The section `method` of a recipe: the options of one method, ours or a registered one."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, SerializeAsAny
from pydantic_core import PydanticKnownError

from ..methods import METHODS
from ..methods.method import Method
from . import registered

# By name, with those that are registered when a recipe is read.
KNOWN: Mapping[str, type[Method]] = ChainMap(METHODS, registered.METHODS)


def _named(value: Any) -> Any:
    """The method that a mapping names, with the options beside the name."""
    if isinstance(value, Method) and type(value) is KNOWN.get(value.name):
        return value
    if not isinstance(value, Mapping):
        raise PydanticKnownError("model_attributes_type")
    if "name" not in value:
        raise PydanticKnownError("union_tag_not_found", {"discriminator": "name"})
    name = value["name"]
    if not isinstance(name, str) or name not in KNOWN:
        raise registered.unknown(name, [*METHODS, *registered.METHODS], field="name")
    return KNOWN[name].model_validate(value)


if TYPE_CHECKING:
    AnyMethod = Method
else:
    AnyMethod = Annotated[SerializeAsAny[Method], BeforeValidator(_named)]
