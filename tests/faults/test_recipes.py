"""Recipes with a mistake put into them: each one line that names the place, and exit code 2."""

import random
from functools import cache

import pytest
import yaml

from kdfuse.engine.recipe.load import load, recipes


@cache
def explained(name):
    return load(name).explain()


def places(node, path=()):
    """Every setting of a recipe with its path, sections included."""
    for key, value in node.items():
        yield (*path, key), value
        if isinstance(value, dict):
            yield from places(value, (*path, key))


def wrong(value, chance):
    """What cannot stand where `value` did, whatever else it may be."""
    if isinstance(value, bool):
        return chance.choice(["perhaps", 2.5, [True], {"on": True}])
    if isinstance(value, int | float):
        return chance.choice(["many", float("nan"), [value], {"of": value}, True, -1e300])
    if isinstance(value, dict):
        return chance.choice([7, "text", [1, 2], True])
    if isinstance(value, list):
        return chance.choice([{"a": 1}, True, float("nan")])
    return {"a": 1} if value is None else chance.choice([{"a": 1}, [[1]], 3.5, True])


def misspelled(key, chance):
    place = chance.randrange(len(key))
    return key[:place] + key[place] * 2 + key[place:] + "x"


def mutated(text, chance):
    """The text with one mistake, and a word that its message has to have."""
    if chance.random() < 0.2:
        return torn(text, chance)
    recipe = yaml.safe_load(text)
    path, value = chance.choice(
        [(p, v) for p, v in places(recipe) if p not in (("name",), ("description",))]
    )
    *outer, key = path
    section = recipe
    for name in outer:
        section = section[name]
    if chance.random() < 0.3:
        other = misspelled(key, chance)
        section[other] = section.pop(key)
        return yaml.safe_dump(recipe), "missing" if path == ("method", "name") else other
    section[key] = wrong(value, chance)
    return yaml.safe_dump(recipe), key


def torn(text, chance):
    """Not a recipe any more: cut, of another kind, doubled, nested; and a word of its message."""
    at = chance.randrange(1, len(text))
    return chance.choice(
        [
            ("", "recipe"),
            ("- 1\n- 2\n", "recipe"),
            ("just a text\n", "recipe"),
            (text[: text.index("data:")], "data"),
            (text + "data: {}\n", "data"),
            (text[:at] + "\0" + text[at:], "not valid YAML"),
            ("run:\n\tepochs: 3\n", "line"),
            ("[" * 5000 + "]" * 5000, "recipe"),
            (text + "method: [\n", "line"),
        ]
    )


@pytest.mark.cases(20, 200)
def test_a_mistake_is_named(case, kd, tmp_path):
    chance = random.Random(f"recipe {case}")
    name = chance.choice(list(recipes()))
    text, word = mutated(explained(name), chance)
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    done = kd("train", file, "--out", tmp_path / "run")
    assert done.code == 2, f"{name}, {word}: {done.out}"
    assert done.err.startswith("error: ") and "Traceback" not in done.err
    assert word in done.err, f"{name}, {word}: {done.err}"
    assert max(map(len, done.err.splitlines())) < 400, done.err
    assert not (tmp_path / "run").exists()
