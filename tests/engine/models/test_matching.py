"""Weights whose names are not the network's: paired by order and shape, or refused by name."""

import pytest
import torch
from tiny import tiny
from torch import nn

from kdfuse.engine.models import create
from kdfuse.engine.models.matching import Unmatched, in_order
from kdfuse.engine.recipe.load import Recipe, RecipeError
from kdfuse.engine.recipe.schema import Network
from kdfuse.engine.training.build import build

pytestmark = pytest.mark.slow(12)


def drawn(name="resnet8", classes=10, seed=0):
    """A network whose statistics and counters are not those of the start either."""
    torch.manual_seed(seed)
    model = create(name, classes)
    for key, value in model.state_dict().items():
        if value.is_floating_point():
            value.uniform_(0.5, 1.5)
        elif key.endswith("num_batches_tracked"):
            value.fill_(7)
    return model


def foreign(model):
    """Its weights as another author might name them: `unit3.weight` for `layer1.0.conv1.weight`."""
    modules = list(dict.fromkeys(key.rpartition(".")[0] for key in model.state_dict()))
    number = {name: f"unit{i}" for i, name in enumerate(modules)}
    state = model.state_dict()
    return {
        f"{number[key.rpartition('.')[0]]}.{key.rpartition('.')[2]}": v for key, v in state.items()
    }


def assert_same(model, other, but="nothing"):
    for (key, a), (_, b) in zip(
        model.state_dict().items(), other.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b) != key.endswith(but), key


def saved(weights, path):
    torch.save({"state_dict": {f"module.{k}": v for k, v in weights.items()}, "epoch": 3}, path)
    return path


def test_a_th_file_of_data_parallel_weights_loads_by_its_names(tmp_path):
    path = saved(drawn().state_dict(), tmp_path / "resnet8.th")
    assert_same(create("resnet8", 10, path), drawn())


def test_order_and_shape_take_what_names_do_not_and_say_so(tmp_path, capsys):
    path = saved(foreign(drawn()), tmp_path / "theirs.th")
    hint = "order and shapes fit: match=order beside checkpoint takes it so"
    for network, fits in (("resnet8", True), ("resnet14", False)):
        with pytest.raises(ValueError, match=f"does not fit {network} with") as caught:
            create(network, 10, path)
        assert (hint in str(caught.value)) == fits
    capsys.readouterr()
    assert_same(create("resnet8", 10, path, "order"), drawn())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"resnet8 <- {path}, by order and shape:"
    assert lines[1:3] == [
        "  conv1 <- unit0: weight",
        "  bn1 <- unit1: weight, bias, running_mean, running_var, num_batches_tracked",
    ]
    assert "  fc <- unit18: weight, bias" in lines
    modules = {key.rpartition(".")[0] for key in drawn().state_dict()}
    assert len(lines[1:]) == len(modules)


def test_names_that_fit_are_taken_whatever_their_order(tmp_path, capsys):
    torch.save(dict(reversed(drawn().state_dict().items())), tmp_path / "x.pt")
    assert_same(create("resnet8", 10, tmp_path / "x.pt", "order"), drawn())
    assert capsys.readouterr().out == ""


def test_the_counters_of_old_files_may_be_missing(tmp_path):
    old = {k: v for k, v in foreign(drawn()).items() if not k.endswith("num_batches_tracked")}
    made = create("resnet8", 10, saved(old, tmp_path / "old.th"), "order")
    assert_same(made, drawn(), but="num_batches_tracked")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda held: held.pop("unit2.weight"),
            "46 tensors for 47; the first that differs is number 6: unit3.weight (16) in the file,"
            " layer1.0.conv1.weight (16 x 16 x 3 x 3) in the network",
        ),
        (
            lambda held: held.update({"more.bias": torch.zeros(4)}),
            "number 48: more.bias (4) in the file, nothing more in the network",
        ),
        (
            lambda held: held.pop("unit18.bias"),
            "number 47: nothing more in the file, fc.bias (10) in the network",
        ),
        (
            lambda held: held.update({"unit18.bias": torch.zeros(10, dtype=torch.int64)}),
            "47 tensors for 47; the first that differs is number 47: unit18.bias (10, whole "
            "numbers) in the file, fc.bias (10) in the network",
        ),
    ],
)
def test_the_first_pair_that_differs_is_named(change, words, tmp_path):
    held = foreign(drawn())
    change(held)
    path = saved(held, tmp_path / "x.th")
    with pytest.raises(ValueError) as caught:
        create("resnet8", 10, path, "order")
    assert str(caught.value).startswith(f"checkpoint {path}: match=order: does not fit resnet8: ")
    assert words in str(caught.value)


def test_a_swap_within_one_shape_is_not_seen(tmp_path):
    """What the documentation says of it: the numbers go where the order says."""
    held = foreign(drawn())
    held["unit2.weight"], held["unit4.weight"] = held["unit4.weight"], held["unit2.weight"]
    made, given = create("resnet8", 10, saved(held, tmp_path / "x.th"), "order"), drawn()
    assert torch.equal(made.layer1[0].conv1.weight, given.layer1[0].conv2.weight)


def test_a_tensor_with_two_names_is_the_same_twice():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.second.weight = self.first.weight

    same = torch.ones(3, 3)
    pairs = in_order({"a": same, "b": same.clone()}, Tied())
    assert pairs == {"first.weight": "a", "second.weight": "b"}
    with pytest.raises(Unmatched, match="a and b differ in the file, and the network has one"):
        in_order({"a": same, "b": 2 * same}, Tied())


def test_a_recipe_says_it_for_each_network(tmp_path):
    theirs = saved(foreign(drawn()), tmp_path / "theirs.th")
    given = {"name": "resnet8", "checkpoint": str(theirs), "match": "order"}
    recipe = tiny(tmp_path, "slkd", student=given, teacher=given)
    made = build(recipe, 10, torch.device("cpu"), torch.arange(20) % 10)
    assert_same(made.main.student, drawn())
    ((teacher, _),) = made.frozen().values()
    assert torch.equal(teacher.fc.bias, drawn().fc.bias)
    fresh = made.main.slts[0]  # the teacher's network with random weights
    assert not torch.equal(fresh.fc.bias, drawn().fc.bias)
    assert recipe.without_files().teacher == Network(name="resnet8")
    assert Recipe.load("digits/kd").teacher.match == "names"
    with pytest.raises(RecipeError, match="teacher: match: order has no effect without a check"):
        Recipe.load("digits/kd", ["teacher.match=order"])
