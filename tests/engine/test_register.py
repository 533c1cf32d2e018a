"""Names that people register: what is refused, what recipes say of them, and --import."""

import subprocess
import sys
from functools import partial
from typing import ClassVar, Literal

import numpy as np
import pytest
import torch
from brought import restored
from torch import nn

from kdfuse.engine import register
from kdfuse.engine.data.manifest import Manifest
from kdfuse.engine.data.sources import open_source
from kdfuse.engine.data.sources.splits import in_memory
from kdfuse.engine.data.sources.synthetic import open_synthetic
from kdfuse.engine.methods import Method
from kdfuse.engine.methods.kd import KD
from kdfuse.engine.models import create
from kdfuse.engine.recipe import registered
from kdfuse.engine.recipe.data import Data
from kdfuse.engine.recipe.load import Recipe, RecipeError
from kdfuse.engine.run.folder import changes
from kdfuse.engine.run.imports import imports_of
from kdfuse.engine.training.build import build

pytestmark = pytest.mark.slow(10)

DIGITS = "digits/kd"


class Mine(KD):
    name: Literal["mine"] = "mine"
    cache: float = 3.0


class Lossless(Method):
    name: Literal["lossless"] = "lossless"
    uses_teacher: ClassVar[bool] = True


class Net(nn.Sequential):
    def __init__(self, num_classes, width=8):
        conv = nn.Conv2d(3, width, 3)
        super().__init__(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))


def images(data, split):
    pixels = np.arange(6 * 8 * 8 * 3, dtype=np.uint8).reshape(6, 8, 8, 3)
    return in_memory(data, split, pixels, np.arange(6) % 3, ["a", "b", "c"])


@pytest.fixture(autouse=True)
def nothing_stays():
    with restored(empty=True):
        yield


def data_of(source="images", **more):
    return Data(source=source, size=8, eval_resize=None, **more)


@pytest.mark.parametrize(
    "name", ["", "two words", "1st", "a:b", "a=b", "a/b", "null", "true", "False", "a*", "über"]
)
def test_names_that_no_word_carries_are_refused(name):
    with pytest.raises(ValueError, match="no word of a recipe can carry that name; take letters"):
        register.network(name, Net)


@pytest.mark.parametrize("name", ["my_net", "Net2", "a.b", "x-1", "nulls"])
def test_names_that_a_word_carries_come_back(name):
    register.network(name, Net)
    assert Recipe.load(DIGITS, [f"student.name={name}"]).student.name == name


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: register.network("resnet8", Net), ValueError, "'resnet8': kdfuse has its own"),
        (lambda: register.source("digits", images), ValueError, "take another name, as my_digits"),
        (lambda: register.method("kd", KD), ValueError, "method 'kd': kdfuse has its own"),
        (
            lambda: register.network("n", Net(3)),
            TypeError,
            r"got an object of type Net, wants .* make\(num_",
        ),
        (
            lambda: register.network("n", 3),
            TypeError,
            "network 'n': got an object of type int, wants what makes",
        ),
        (lambda: register.network("n", lambda: 0), TypeError, r"called as make\(num_classes\)"),
        (lambda: register.source("s", [1]), TypeError, r"wants a function open\(data, split\)"),
        (lambda: register.source("s", lambda data: 0), TypeError, r"and takes \(data\)"),
        (lambda: register.method("m", Net), TypeError, "got Net, wants a subclass of kdfuse"),
        (
            lambda: register.method("m", Mine()),
            TypeError,
            "got an object of type Mine, wants a subclass",
        ),
        (lambda: register.method("lossless", Lossless), TypeError, "Lossless has no loss; write"),
        (lambda: register.method("m", Mine), TypeError, r'write name: Literal\["m"\] = "m" in'),
    ],
)
def test_what_is_taken_or_wrong_is_refused_with_the_cure(call, error, words):
    with pytest.raises(error, match=words):
        call()
    assert not registered.MODULES


def test_the_same_twice_is_fine_and_another_is_not():
    def defined():
        class Again(Net):
            pass

        return Again

    register.network("wide", partial(Net, width=16))
    register.network("wide", partial(Net, width=16))
    with pytest.raises(ValueError, match="test_register registered another one; take another"):
        register.network("wide", partial(Net, width=17))
    first, second = defined(), defined()  # may differ in what they close over
    register.network("again", first)
    register.network("again", first)
    with pytest.raises(ValueError, match="registered another one"):
        register.network("again", second)


def test_a_definition_that_is_imported_again_takes_the_place_of_the_first(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "twice.py").write_text(
        "from torch import nn\nfrom kdfuse.engine import register\n"
        "class Net(nn.Module):\n    pass\nregister.network('twice', Net)\n"
    )
    import importlib

    module = importlib.import_module("twice")
    first = module.Net
    importlib.reload(module)
    assert registered.NETWORKS == {"twice": module.Net} and module.Net is not first
    assert registered.MODULES == {("network", "twice"): "twice"}


def test_registering_a_network_imports_neither_torchvision_nor_dali():
    code = (
        "import sys; from kdfuse.engine import register; from torch import nn\n"
        "register.network('net', nn.Identity)\n"
        "print([m for m in ('torchvision', 'nvidia.dali', 'sklearn') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_a_recipe_has_the_options_of_a_registered_method_as_ours(tmp_path):
    register.method("mine", Mine)
    recipe = Recipe.load(DIGITS, ["method.name=mine", "method.cache=5"])
    assert type(recipe.method) is Mine and recipe.method.cache == 5.0
    assert recipe == Recipe.model_validate(recipe.model_dump())
    (tmp_path / "shown.yaml").write_text(recipe.explain())
    assert Recipe.load(tmp_path / "shown.yaml") == recipe
    for words, line in (
        (["method.name=mime"], "or what --import MODULE brings; did you mean mine?"),
        (["method.name=mine", "method.cashe=1"], "method.cashe: unknown key; did you mean method."),
        (["method.name=mine", "method.cache=x"], "method.cache: got the text 'x', wants a number"),
        (["method.name=mine", "teacher=null"], "teacher: method mine needs one"),
        (["method.name=[mine]"], "method.name: got ['mine'], wants one of ce, kd, "),
        (["data.source=digist"], "data.source: got the text 'digist', wants one of folder, "),
    ):
        with pytest.raises(RecipeError) as caught:
            Recipe.load(DIGITS, words)
        assert line in str(caught.value)


def test_an_option_of_ones_own_counts_for_a_resumed_run_whatever_its_name():
    assert changes({"method.cache": 3.0}, {"method.cache": 4.0}) == ["method.cache: 3.0 -> 4.0"]
    assert changes({"also.x.method.match": 1}, {"also.x.method.match": 2})
    assert changes({"teacher.cache": "a"}, {"teacher.cache": "b"}) == []


def test_a_name_is_known_by_the_module_that_uses_the_register():
    register.network("net", Net)
    register.method("mine", Mine)
    register.source("images", images)
    register.network("unused", partial(Net, width=3))
    words = ["method.name=mine", "also.x.method.name=ce", "also.x.student.name=net"]
    assert imports_of(Recipe.load(DIGITS, words)) == {
        "test_register": ["method mine", "network net"]
    }
    assert imports_of(Recipe.load(DIGITS, ["data.source=images", "teacher.name=net"])) == {
        "test_register": ["network net", "source images"]
    }
    assert imports_of(Recipe.load(DIGITS)) == {}


def test_the_nearest_of_registered_networks_is_suggested():
    register.network("perceptron", Net)
    with pytest.raises(ValueError, match="'perceptorn' is no known network; did you mean percep"):
        create("perceptorn", 10)
    assert create("perceptron", 7)(torch.zeros(2, 3, 8, 8)).shape == (2, 7)


def test_what_a_network_makes_is_looked_at_before_it_trains():
    register.network("thousand", lambda classes: Net(1000))
    register.network("pair", lambda classes: nn.Sequential(Net(classes), Pair()))
    register.network("text", lambda classes: "net")
    for name, words in (
        ("thousand", r"gives \(1, 1000\) for an image of 32 x 32, wants logits \(1, 10\)"),
        ("pair", r"gives a tuple for an image"),
        ("text", "text made a str, wants an nn.Module"),
    ):
        recipe = Recipe.load(DIGITS, [f"student.name={name}"])
        with pytest.raises(ValueError, match=f"name: {name}.*{words}|name: {words}"):
            build(recipe, 10, torch.device("cpu"))


class Pair(nn.Module):
    def forward(self, x):
        return x, x


def test_a_source_gives_a_manifest_that_fits_the_recipe():
    register.source("images", images)
    found = open_source(data_of(), "train")
    assert isinstance(found, Manifest) and found.read(5).size == (8, 8)
    assert len(open_source(data_of(subset=1), "train").target) == 3
    with pytest.raises(ValueError, match="data.classes=4, but source images has 3"):
        open_source(data_of(classes=4), "val")
    Data(source="images", root="anywhere", images=5)  # it may read them
    with pytest.raises(ValueError, match="data.decode: gpu decodes files and source images has no"):
        open_source(data_of(decode="gpu"), "train")

    def changed(**parts):
        whole = open_synthetic(Data(source="synthetic", classes=2, images=4), "train")
        return Manifest(**{**vars(whole), **parts})

    for given, words in (
        ([1, 2], "data.source=bad: its open gave a list, wants a Manifest"),
        (changed(target=np.zeros(4, np.int32)), r"target of int32 \(4,\), wants int64"),
        (changed(sizes=np.zeros((4, 1), np.int32)), r"sizes of int32 \(4, 1\), wants int32"),
        (changed(target=np.array([0, 1, 2, 0])), "its 4 labels are not all numbers of its 2"),
    ):
        registered.SOURCES["bad"] = lambda data, split, given=given: given
        with pytest.raises(ValueError, match=words):
            open_source(data_of("bad"), "train")
