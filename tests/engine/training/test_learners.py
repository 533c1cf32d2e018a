"""Several students or settings beside one loader and one teacher: as if each were alone."""

import json

import pytest
import torch
from tiny import tiny

from kdfuse.engine.cli.export import export
from kdfuse.engine.recipe.load import Recipe, RecipeError
from kdfuse.engine.run.checkpoint import load
from kdfuse.engine.run.past import read_run
from kdfuse.engine.training.evaluate import evaluate
from kdfuse.engine.training.start import train

pytestmark = pytest.mark.slow(14)


def alone(folder, method, student):
    recipe = tiny(folder / "digits", method, student={"name": student})
    return train(recipe, folder / f"alone-{method}")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """KD, DKD and SimKD together in one run, and each alone."""
    folder = tmp_path_factory.mktemp("runs")
    also = {
        "decoupled": {"method": {"name": "dkd"}, "student": {"name": "resnet14"}},
        "sim": {"method": {"name": "simkd"}, "student": {"name": "resnet8"}},
    }
    together = train(tiny(folder / "digits", "kd", also=also), folder / "together")
    single = {
        "": alone(folder, "kd", "resnet8"),
        "decoupled": alone(folder, "dkd", "resnet14"),
        "sim": alone(folder, "simkd", "resnet8"),
    }
    return together, single


def test_each_student_is_what_it_would_be_alone(runs):
    together, single = runs
    state, _ = load(together / "checkpoints" / "step-00000010")
    # Random weights of a teacher follow the main student's in the stream of random numbers, so
    # that a student of another size has another random teacher when it is alone.
    for name in ("", "sim"):
        own, _ = load(single[name] / "checkpoints" / "step-00000010")
        held = state if name == "" else state["also"][name]
        for network in ("student", "head") if name else ("student",):
            for key, value in own[network].items():
                torch.testing.assert_close(held[network][key], value, rtol=1e-4, atol=1e-5)
    assert set(state["optimizers"]) == {"student", "decoupled_student", "sim_student"}


def test_every_student_is_logged_evaluated_and_exported(runs, tmp_path):
    together, _ = runs
    record = read_run(together).evaluations[-1]
    assert {"top1", "decoupled_student_top1", "sim_student_top1"} <= set(record)
    step = read_run(together).of_kind("step")[-1]
    assert {"loss", "kd", "decoupled_tckd", "decoupled_loss", "sim_feature"} <= set(step)
    found = evaluate(together)["last"]
    assert found["sim_student_top1"] == pytest.approx(record["sim_student_top1"])
    out = export(together, tmp_path / "sim.pt2", network="sim_student")
    images = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    assert torch.export.load(out).module()(images).shape == (2, 10)
    weights = torch.load(export(together, tmp_path / "student.pt"), weights_only=True)
    assert "fc.weight" in weights["model"]  # though another branch keeps more than its student
    with pytest.raises(ValueError, match="more than the network of one name"):
        export(together, tmp_path / "sim.pt", network="sim_student")


@pytest.mark.parametrize(
    ("also", "message"),
    [
        ({"Big": {}}, "also.Big"),
        ({"main": {"method": {"name": "ce"}, "student": {"name": "resnet8"}}}, "also.main"),
        (
            {"x": {"method": {"name": "kd"}, "student": {"name": "resnet8"}, "slt": {"name": "a"}}},
            "also.x.slt: method kd has no SL-Ts",
        ),
        (
            {"x": {"method": {"name": "kd", "temprature": 2}, "student": {"name": "resnet8"}}},
            "temprature",
        ),
        (
            {"x": {"method": {"name": "ofd"}, "student": {"name": "resnet8"}}},
            "also: the methods share one teacher",
        ),
    ],
)
def test_branches_that_cannot_be(also, message, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(tiny(tmp_path, "kd").explain())
    with pytest.raises(RecipeError, match=message):
        Recipe.load(path, [f"also={json.dumps(also)}"])
