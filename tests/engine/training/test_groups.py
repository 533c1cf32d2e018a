"""Parameter groups: what decays, and the rate of each layer."""

import copy

import pytest
import torch
from steps import begun_step, set_rates
from tiny import tiny
from torch import nn

from kdfuse.engine.models import create
from kdfuse.engine.recipe.optim import Optim
from kdfuse.engine.training.classification import begin
from kdfuse.engine.training.groups import decay_groups, layer_scales
from kdfuse.engine.training.largebatch import timm_optim
from kdfuse.engine.training.optim import build_optimizers
from kdfuse.engine.training.ranks import join

timm = pytest.importorskip("timm")


@pytest.fixture(scope="module")
def deit():
    return timm.create_model(
        "deit_tiny_patch16_224", pretrained=False, img_size=32, num_classes=10, depth=3
    )


def test_scales_are_timms_own(deit):
    skip = deit.no_weight_decay()
    theirs = {
        parameter: (group["lr_scale"], group["weight_decay"])
        for group in timm_optim("lamb").param_groups_layer_decay(
            deit, weight_decay=0.05, no_weight_decay_list=skip, layer_decay=0.65
        )
        for parameter in group["params"]
    }
    optim = Optim(name="adamw", lr=1.0, weight_decay=0.05, decay="matrices", layer_decay=0.65)
    groups = decay_groups(optim, [deit], layer_scales(0.65, deit))
    ours = {
        parameter: (group["lr_scale"], group.get("weight_decay", 0.05))
        for group in groups
        for parameter in group["params"]
    }
    assert ours.keys() == theirs.keys() == set(deit.parameters())
    for name, parameter in deit.named_parameters():
        assert ours[parameter] == theirs[parameter], name


def test_scales_by_the_formula(deit):
    scales = layer_scales(0.5, deit)
    named = {name: scales[parameter] for name, parameter in deit.named_parameters()}
    # The stem, three blocks, and what comes after them: the norm stands with the head.
    for part, layer in (("patch_embed", 0), ("pos_embed", 0), ("blocks.0", 1), ("blocks.2", 3)):
        found = {scale for name, scale in named.items() if name.startswith(part)}
        assert found == {0.5 ** (4 - layer)}, part
    assert named["head.weight"] == named["head.bias"] == 1.0


def test_groups_without_scales_are_as_ever():
    network = create("resnet8", 10)
    [decayed] = decay_groups(Optim(lr=0.1), [network])
    assert decayed == {"params": list(network.parameters())}
    vectors = [p for p in network.parameters() if p.ndim < 2]
    first, second = decay_groups(Optim(lr=0.1, decay="matrices"), [network])
    assert first == {"params": [p for p in network.parameters() if p.ndim >= 2]}
    assert second == {"params": vectors, "weight_decay": 0.0}


def test_frozen_parameters_are_in_no_group(deit):
    network = copy.deepcopy(deit)
    network.patch_embed.requires_grad_(False)
    groups = decay_groups(Optim(lr=0.1, layer_decay=0.5), [network], layer_scales(0.5, network))
    held = {parameter for group in groups for parameter in group["params"]}
    assert held == set(network.parameters()) - set(network.patch_embed.parameters())


def test_what_is_trained_beside_the_student_has_the_whole_rate(deit):
    head, slt = nn.Linear(3, 3), copy.deepcopy(deit)
    optimizers = build_optimizers(
        Optim(lr=0.1, layer_decay=0.5), {"student": [deit, head], "slt0": [slt]}, [deit]
    )
    set_rates(list(optimizers.values()), 0.3)
    rates = {
        parameter: float(group["lr"])
        for optimizer in optimizers.values()
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert {rates[parameter] for parameter in (*head.parameters(), *slt.parameters())} == {0.3}
    assert rates[deit.cls_token] == 0.3 * 0.5**4
    assert rates[deit.blocks[2].attn.qkv.weight] == 0.15


def test_a_network_without_layers_is_refused():
    network = create("resnet8", 10)
    message = r"optim.layer_decay: 0.75 needs a student .*\(group_matcher\).*; CifarResNet does not"
    with pytest.raises(ValueError, match=message):
        build_optimizers(Optim(lr=0.1, layer_decay=0.75), {"student": [network]}, [network])
    data = {"source": "synthetic", "classes": 10, "subset": None}
    with pytest.raises(ValueError, match="and student is resnet8; set optim.layer_decay=null"):
        tiny(None, data=data, optim={"layer_decay": 0.75})


def test_each_layer_moves_by_its_share_of_the_rate():
    """One step of plain SGD with layer decay is the step without it, scaled layer by layer."""

    def moved(**optim):
        recipe = tiny(
            None,
            data={"source": "synthetic", "classes": 10, "subset": None, "size": 32},
            student={"name": "timm:test_convnext"},
            optim={"momentum": 0.0, "weight_decay": 0.0, **optim},
        )
        distiller, state = begin(recipe, join("cpu"), 10, torch.arange(8), {})
        before = copy.deepcopy(distiller.state_dict())
        images = torch.randint(
            0, 256, (8, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
        )
        step = begun_step(distiller.train(), state, lr=0.5)
        step(images, torch.arange(8), torch.arange(8))
        student = distiller.main.student
        place = "tree.main.student."
        changes = {
            name: parameter.detach().double() - before[place + name].double()
            for name, parameter in student.named_parameters()
        }
        return changes, student

    whole, _ = moved()
    decayed, student = moved(layer_decay=0.5)
    scales = layer_scales(0.5, student)
    assert len(set(scales.values())) > 3
    for name, parameter in student.named_parameters():
        expected = whole[name] * scales[parameter]
        torch.testing.assert_close(decayed[name], expected, rtol=1e-2, atol=1e-6)
    assert any(change.abs().max() > 1e-3 for change in whole.values())
