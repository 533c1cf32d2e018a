"""The methods of logits in the engine: twenty steps on one batch lower what each adds."""

import pytest
import torch
from pydantic import ValidationError
from steps import begun_step
from tiny import tiny

from kdfuse.engine.training.classification import begin
from kdfuse.engine.training.ranks import join

N, C = 6, 10
ONE = {"name": "resnet8"}
CASES = {  # options, other sections of the recipe, terms; without the labels where they disagree
    # with the teacher
    "kd": ({"standardise": True, "kd_weight": 9.0}, {}, ["kd"]),
    "dkd": ({"standardise": True}, {}, ["nckd"]),
    "nkd": ({"target_term": "t1+t2", "gamma": 0.0, "ce_weight": 0.0}, {}, ["target"]),
    "uskd": ({"labels": "average"}, {"optim": {"ema": 0.9}}, ["target"]),
    "dist": ({}, {}, ["inter", "intra"]),
    "wsld": ({"ce_weight": 0.0}, {}, ["kd"]),
    "ctkd": ({}, {}, ["kd"]),
    "slkd": (
        {"teachers": "slts", "ce_weight": 0.0, "fused_ce_weight": 0.0},
        {},
        ["slt0_kd", "slt1_kd"],  # what the student follows moves
    ),
    "slkd_sequential": (
        {"ce_weight": 0.0, "fused_ce_weight": 0.0},
        {"assistants": (ONE, ONE)},
        ["kd", "fused_kd"],
    ),
    "dgkd": ({"reduction": "batchmean"}, {"assistants": (ONE, ONE)}, ["kd", "assistant0_kd"]),
    "dml": ({}, {"slt": ONE}, ["ce", "slt0_ce"]),
}


def made(method, changes):
    """The networks of a run of ten classes, and its step."""
    data = {"source": "synthetic", "classes": C, "subset": None}
    changes = {key: value for key, value in changes.items() if key != "optim"} | {
        "optim": {"lr": 0.02, "schedule": "constant", **changes.get("optim", {})}
    }
    recipe = tiny(None, method, data=data, **changes)
    distiller, state = begin(recipe, join("cpu"), C, torch.arange(N) % C, {})
    return distiller.train(), begun_step(distiller, state, 20.0)


def batch():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (N, 3, 16, 16), dtype=torch.uint8, generator=generator)
    return images, torch.arange(N) % C, torch.arange(N)


def least_target_loss(distiller):
    """Where the student is as sure of the label as the teacher: its binary entropy."""
    v = distiller.outputs(*batch())["main"].teacher.double().softmax(1)[torch.arange(N), batch()[1]]
    return float(-(v * v.log() + (1 - v) * (1 - v).log()).mean())


@pytest.mark.parametrize("name", CASES)
def test_twenty_steps_lower_what_the_method_adds(name):
    options, changes, terms = CASES[name]
    distiller, step = made({"name": name, **options}, changes)
    found = [step(*batch()) for _ in range(20)]
    floor = least_target_loss(distiller) if name == "nkd" else 0.0
    for term in terms:
        first, last = (float(found[i][term]) - floor for i in (0, -1))
        # Measured: 0.62 of the first at most, over seeds and instruction sets.
        assert last < 0.8 * first, [float(each[term]) for each in found]
    for parameter, value in distiller.named_parameters():
        assert value.grad is not None and value.grad.any(), parameter


def test_ctkd_moves_its_temperature_to_where_the_loss_is_larger():
    # A step of theta by thousands of its float32 spacing, and still a small one.
    optim = {"lr": 1.0, "weight_decay": 0.0, "momentum": 0.0}
    distiller, step = made({"name": "ctkd"}, {"optim": optim})
    head, (images, target, index) = distiller.main.head, batch()
    out = distiller.eval().outputs(images, target, index)["main"]

    def kd_now():
        t = 1 + 20 * head.theta.detach().double().sigmoid()
        p, q = ((z.detach().double() / t).log_softmax(1) for z in (out.teacher, out.student))
        return t**2 * (p.exp() * (p - q)).sum(1).mean()

    before = kd_now()
    step(images, target, index)
    assert kd_now() > before


@pytest.mark.parametrize("name", ["slkd_sequential", "dgkd"])
def test_a_recipe_without_assistants_is_refused(name):
    with pytest.raises(ValidationError, match=f"assistants: method {name} needs at least one"):
        tiny(None, name, data={"source": "synthetic", "classes": C, "subset": None})


def test_uskd_by_the_average_needs_one():
    with pytest.raises(ValidationError, match="optim.ema: method uskd reads"):
        tiny(
            None,
            {"name": "uskd", "labels": "average"},
            data={"source": "synthetic", "classes": C, "subset": None},
        )
