"""The networks that a recipe names, and those that it has trained first, before any is trained."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

from ..models import maker
from ..models.weights import locate
from ..recipe.load import Recipe
from ..recipe.schema import Network
from ..run.chain import trained
from ..run.folder import Resume
from ..run.past import recipe_of


def check_ahead(recipe: Recipe, runs: Path) -> None:
    """Raise what making the networks of a recipe, or of one that trains them below `runs`, would
    raise hours later: ValueError for a name that is unknown, FileNotFoundError for weights that
    are not there."""
    coming: set[Path] = set()

    def found(one: Recipe, folder: Path, resume: Resume) -> Path:
        check_networks(one, coming)
        coming.add(folder)
        return folder

    check_networks(trained(recipe, runs, found), coming)


def check_networks(recipe: Recipe, coming: Collection[Path] = ()) -> None:
    """The same of one recipe; the checkpoints `coming` need not be there yet."""
    check_names(recipe)
    for _, network in _networks(recipe):
        if network.checkpoint is not None and network.checkpoint not in coming:
            locate(network.checkpoint)
        if network.kept is not None:
            recipe_of(network.kept)


def check_names(recipe: Recipe) -> None:
    """Raise ValueError for a network that nobody knows."""
    for where, network in _networks(recipe):
        if network.kept is None and network.name:
            try:
                maker(network.name)
            except ValueError as error:
                raise ValueError(f"{where}.{error}") from error


def _networks(recipe: Recipe) -> Iterator[tuple[str, Network]]:
    for where, network in {
        "teacher": recipe.teacher,
        **{f"assistants.{i}": network for i, network in enumerate(recipe.assistants)},
        **{f"cache.teachers.{i}": network for i, network in enumerate(recipe.cache.teachers)},
    }.items():
        if network is not None:
            yield where, network
    for name, part in recipe.learners("").items():
        place = f"also.{name}." if name else ""
        yield f"{place}student", part.student
        if part.slt is not None:
            yield f"{place}slt", part.slt
