"""Crops, normalisation, and mixup, CutMix and smoothing: what is drawn, what it makes, and what the
methods make of it.
"""

import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from steps import loss_of, tensors
from tiny import tiny

from kdfuse.engine.data.loaders.ondevice import (
    Mix,
    Mixing,
    Normalise,
    crop,
    draw,
    mix_images,
    numbers,
    soft_labels,
    symmetric_beta,
)
from kdfuse.engine.data.plan import Plan, places
from kdfuse.engine.data.sources.digits import write_digits
from kdfuse.engine.methods import METHODS, Outputs
from kdfuse.engine.methods.ce import labelled
from kdfuse.engine.methods.parts.labels import unsmoothed
from kdfuse.engine.recipe.data import Data
from kdfuse.engine.recipe.load import Recipe
from kdfuse.engine.recipe.schema import IMAGENET, Normalize, RecipeError
from kdfuse.engine.run.checkpoint import load
from kdfuse.engine.training.start import train

B, C, SIZE = 6, 5, 16
MIXED = {"mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1}
TAKE = {"ce", "kd", "nkd", "wttm", "tf_nkd", "uskd", "slkd", "slkd_sequential", "dist", "dml"}


def data(**changes):
    return Data(source="synthetic", classes=C, size=SIZE, **changes)


def pictures(n=B):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
    return images.contiguous(memory_format=torch.channels_last)


# --- Crop, flip, normalise -----------------------------------------------------------------------

FLIP = np.array([False, True, True, False])


def planned(box, index=(2, 0, 1, 2)):
    box = np.array(box, np.int32)
    scaled = np.full((len(box), 2), 8, np.int32)
    return Plan(np.array(index), box, FLIP, scaled, np.zeros_like(scaled))


def field(height, width):
    """Three smooth images of different channels, (3, height, width, 3) uint8."""
    y, x, k = np.ogrid[0:height, 0:width, 0:9]
    planes = 127 + 60 * np.sin(0.4 * y + k) + 60 * np.cos(0.3 * x + 2 * k)
    return planes.reshape(height, width, 3, 3).transpose(2, 0, 1, 3).astype(np.uint8)


def test_crops_are_windows_black_beyond_the_border():
    border, whole = 2, field(9, 11)
    padded = np.pad(whole, ((0, 0), (border, border), (border, border), (0, 0)))
    plan = planned([[-2, 5, 8, 8], [3, -2, 8, 8], [0, 0, 8, 8], [1, 3, 8, 8]])
    made = crop(torch.from_numpy(padded), plan, border, 8)
    assert made.dtype == torch.uint8 and made.shape == (4, 8, 8, 3)
    for i, (top, left, _, _) in enumerate(plan.box.tolist()):
        for y in range(8):
            for x in range(8):
                at = top + y, left + (7 - x if FLIP[i] else x)
                inside = 0 <= at[0] < 9 and 0 <= at[1] < 11
                wanted = whole[plan.index[i]][at].tolist() if inside else [0, 0, 0]
                assert made[i, y, x].tolist() == wanted


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("channels_last", [False, True])
def test_normalised_images_to_the_last_bit(dtype, channels_last):
    images = pictures().to(dtype)
    statistics = Normalize(mean=(0.1, 0.9, 0.485), std=(0.5, 0.1, 0.229))
    made = Normalise(statistics, channels_last)(images)
    order = torch.channels_last if channels_last else torch.contiguous_format
    assert made.dtype == torch.float32 and made.is_contiguous(memory_format=order)
    mean, std = (np.array(x, np.float32)[:, None, None] for x in (statistics.mean, statistics.std))
    floats = images.numpy().astype(np.float32)
    wanted = floats * (np.float32(1) / (np.float32(255) * std)) + -mean / std
    assert wanted.dtype == np.float32 and np.array_equal(made.numpy(), wanted)
    np.testing.assert_allclose(made.numpy(), (floats / 255 - mean) / std, rtol=1e-4, atol=1e-5)


# --- What is drawn -------------------------------------------------------------------------------


def betas(alpha, side=300):
    """A draw at each point of a midpoint grid of the two uniforms: the distribution itself."""
    grid = (np.arange(side) + 0.5) / side
    return np.array([symmetric_beta(alpha, u, v) for u in grid for v in grid])


@pytest.mark.parametrize(
    ("alpha", "cdf"),
    [
        (0.5, lambda x: 2 / math.pi * np.arcsin(np.sqrt(x))),
        (1.0, lambda x: x),
        (2.0, lambda x: x * x * (3 - 2 * x)),
    ],
)
def test_lambda_has_the_distribution(alpha, cdf):
    drawn = betas(alpha)
    at = np.linspace(0, 1, 21)
    found = [(drawn <= x).mean() for x in at]
    np.testing.assert_allclose(found, cdf(at), atol=3e-3)


@pytest.mark.parametrize("alpha", [0.01, 0.2, 0.8, 1.0, 20.0])
def test_lambda_has_the_moments(alpha):
    drawn = betas(alpha)
    assert drawn.min() >= 0 and drawn.max() <= 1
    np.testing.assert_allclose(drawn.mean(), 0.5, atol=1e-6)
    np.testing.assert_allclose(drawn.var(), 1 / (4 * (2 * alpha + 1)), rtol=0.02)


def test_a_step_is_a_pure_function_of_seed_epoch_and_step():
    def steps(seed, epoch):
        return [draw(data(mixup=0.8, cutmix=1.0), seed, epoch, step) for step in range(400)]

    first = steps(3, 5)
    assert steps(3, 5) == first
    assert draw(data(mixup=0.8, cutmix=1.0), 3, 5, 77) == first[77]
    everything = first + steps(3, 6) + steps(4, 5)
    shares = [mix.own for mix in everything if mix.box is None]
    assert 500 < len(shares) == len(set(shares)) < 700


def test_one_of_them_alone():
    assert all(draw(data(mixup=0.2), 0, 0, step).box is None for step in range(50))
    assert all(draw(data(cutmix=1.0), 0, 0, step).box is not None for step in range(50))


def test_a_box_is_a_square_cut_off_by_the_image_and_lambda_is_what_it_leaves():
    mixes = [draw(data(cutmix=1.0), 0, 0, step) for step in range(2000)]
    whole = 0
    for mix in mixes:
        top, left, bottom, right = mix.box
        assert 0 <= top <= bottom <= SIZE and 0 <= left <= right <= SIZE
        pixels = sum(1 for _ in range(top, bottom) for _ in range(left, right))
        assert mix.own == 1 - pixels / SIZE**2
        inside = top > 0 and left > 0 and bottom < SIZE and right < SIZE
        assert not inside or bottom - top == right - left
        whole += inside
    assert 300 < whole < 1700
    # A uniform centre: without the border's cut E[1 - lambda] is 1/2, with it less.
    assert 0.25 < np.mean([1 - mix.own for mix in mixes]) < 0.4
    corners = {(m.box[0] == 0, m.box[1] == 0, m.box[2] == SIZE, m.box[3] == SIZE) for m in mixes}
    assert len(corners) >= 9  # inside, over each side, over each corner


# --- What it makes -------------------------------------------------------------------------------


def numbered(mix, both=False):
    """A mix as a step gets it, of a run that draws mixup or CutMix, or `both`."""
    cut, up = (float(both or (mix.box is not None) == which) for which in (True, False))
    return tensors(numbers(mix, data(cutmix=cut, mixup=up)))


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("mix", [Mix(0.3, None), Mix(1 - 12 / 256, (3, 10, 7, 13))])
def test_images_and_labels_by_loops(mix, both):
    images, target = pictures(), torch.tensor([0, 3, 0, 2, 4, 2])
    kept = images.clone()
    now = numbered(mix, both)
    made, soft = mix_images(images, now), soft_labels(target, C, now, 0.2)
    assert torch.equal(images, kept)
    assert made.is_contiguous(memory_format=torch.channels_last)
    assert made.dtype == (torch.float32 if both or mix.box is None else torch.uint8)
    wanted, labels = images.double(), torch.full((B, C), 0.2 / C, dtype=torch.float64)
    for i in range(B):
        partner = i + 1 if i % 2 == 0 else i - 1
        if mix.box is None:
            wanted[i] = mix.own * kept[i].double() + (1 - mix.own) * kept[partner].double()
        else:
            top, left, bottom, right = mix.box
            for y in range(top, bottom):
                for x in range(left, right):
                    wanted[i, :, y, x] = kept[partner, :, y, x].double()
        labels[i, target[i]] += 0.8 * mix.own
        labels[i, target[partner]] += 0.8 * (1 - mix.own)
    torch.testing.assert_close(made.double(), wanted, rtol=1e-6, atol=1e-4)
    assert soft.dtype == torch.float32
    torch.testing.assert_close(soft.double(), labels, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("mix", [Mix(0.3, None), Mix(0.75, (0, 0, 8, 8))])
def test_mixing_and_normalising_commute(mix, channels_last):
    images = pictures()
    for statistics in (IMAGENET, Normalize(mean=(0.1, 0.9, 0.5), std=(0.5, 0.1, 1.0))):
        normalise = Normalise(statistics, channels_last)
        normalised = normalise(images)
        after = mix_images(normalised, numbered(mix))
        assert torch.equal(normalised, normalise(images))
        before = normalise(mix_images(images, numbered(mix)))
        torch.testing.assert_close(before, after, rtol=1e-5, atol=1e-5)


def test_normalise_leaves_float_images_to_the_next_network():
    images = pictures().float()
    kept = images.clone()
    for channels_last in (False, True):
        Normalise(IMAGENET, channels_last)(images)
        assert torch.equal(images, kept)


def test_off_is_the_batch_itself_and_smoothing_alone_leaves_the_images():
    images, target = pictures(), torch.arange(B) % C
    out = Mixing(data(), C, B, seed=0)({}, images, target)
    assert out[0] is images and out[1] is target
    made, soft = Mixing(data(smoothing=0.1), C, B, seed=0)({}, images, target)
    assert made is images
    logits = torch.randn(B, C, generator=torch.Generator().manual_seed(0))
    wanted = torch.nn.CrossEntropyLoss(label_smoothing=0.1)(logits, target)
    torch.testing.assert_close(labelled(logits, soft)[0], wanted)


def test_images_and_labels_of_a_step_have_the_same_partners():
    mixing = Mixing(data(cutmix=1.0, mixup=1.0), C, B, seed=0)
    target = torch.arange(B) % C
    images = target.to(torch.uint8)[:, None, None, None].expand(B, 3, SIZE, SIZE).contiguous()
    for step in range(8):
        made, soft = mixing(tensors(mixing.schedule(2, step)), images, target)
        expected = (soft * torch.arange(C)).sum(1)  # the mean class, as the images show it
        torch.testing.assert_close(made.float().mean((1, 2, 3)), expected)


@pytest.mark.parametrize("batch", [1, 7])
def test_of_an_odd_number_one_has_no_partner(batch):
    with pytest.raises(ValueError, match=rf"data.mixup=0.8.*in pairs.*each process {batch} of"):
        Mixing(data(mixup=0.8), C, batch, seed=0)


@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_processes_mixes_the_same(world):
    mixing = Mixing(data(cutmix=1.0, mixup=1.0), C, 4, seed=0)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4 * world, 3, SIZE, SIZE), generator=generator).byte()
    target = torch.arange(4 * world) % C
    for step in range(8):
        now = tensors(mixing.schedule(2, step))
        whole = mixing(now, images, target)
        shares = zip(images.split(4), target.split(4), strict=True)
        made = zip(*(mixing(now, *share) for share in shares), strict=True)
        for one, parts in zip(whole, made, strict=True):
            assert torch.equal(one, torch.cat(parts))


def test_copies_of_an_image_are_not_mixed_with_each_other():
    for batch, repeats in ((12, 3), (10, 5), (8, 2), (512, 3)):
        found = places(np.arange(4 * batch), batch, repeats).reshape(-1, 2)
        assert (found[:, 0] != found[:, 1]).all()


# --- What the methods make of it -----------------------------------------------------------------


def logits(seed):
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(B, C, generator=generator, dtype=torch.float64)).requires_grad_()


TARGET = torch.tensor([0, 3, 2, 2, 4, 2])
OTHER = torch.tensor([3, 0, 2, 2, 2, 4])  # the partners'; two are of one class
SHARE = 0.7  # lambda
SMOOTH = 0.1


def labels(smoothing=SMOOTH):
    """(B, C) in float64, written out."""
    rows = SHARE * F.one_hot(TARGET, C) + (1 - SHARE) * F.one_hot(OTHER, C)
    return rows.double() * (1 - smoothing) + smoothing / C


def cross_entropy(z):
    return -(labels() * z.log_softmax(1)).sum(1).mean()


def nkd(z, t, gamma):
    """Cross-entropy of the whole label, the rest of its largest class."""
    right = torch.arange(B), TARGET
    keep = F.one_hot(TARGET, C) == 0
    own = -(t.softmax(1)[right] * z.log_softmax(1)[right]).mean()
    rest, taught = (x[keep].view(B, C - 1) for x in (z, t))
    others = -(taught.softmax(1) * rest.log_softmax(1)).sum(1).mean()
    return cross_entropy(z) + own + gamma * others


def nkd_t2(z, t, gamma):
    right = torch.arange(B), TARGET
    v, s = t.softmax(1)[right], z.softmax(1)[right]
    return nkd(z, t, gamma) + (v * s.log() - (1 - v) * (1 - s).log()).mean()


def kd(z, t):
    p, q = (t / 3).softmax(1), (z / 3).softmax(1)
    return 0.4 * cross_entropy(z) + 0.6 * 9 * (p * (p.log() - q.log())).sum(1).mean()


def smoothed_target(z, power):
    """Both labels of a row with their shares before smoothing, each column with its own mean."""
    s = z.detach().softmax(1) ** power
    first = labels(0.0)[torch.arange(B), TARGET]
    total = torch.zeros((), dtype=torch.float64)
    for classes, share in ((TARGET, first), (OTHER, 1 - first)):
        own = s[torch.arange(B), classes] * (share > 1e-9)
        weight = torch.where(share > 1e-9, own + share - own.mean(), 0.0)
        total = total - (weight * z.log_softmax(1)[torch.arange(B), classes]).mean()
    return total


def uskd(z, weak):
    """As the paper's formula, with ranks by sorting in Python."""
    both = (F.one_hot(TARGET, C) + F.one_hot(OTHER, C)) > 0
    w, log_s = weak.detach().softmax(1), z.detach().log_softmax(1)
    others = torch.zeros((), dtype=torch.float64)
    for i in range(B):
        inside = both[i]
        keys = w[i] / (1 - w[i][inside].sum() + 1e-6)
        keys = keys + log_s[i] / (1 - log_s[i][inside].sum() + 1e-6)
        order = sorted(range(C), key=lambda j: -keys[j].item())  # noqa: B023
        zipf = torch.tensor([1 / (1 + order.index(j)) for j in range(C)], dtype=torch.float64)
        zipf = zipf[~inside] / zipf[~inside].sum()
        others = others - (zipf * z[i][~inside].log_softmax(0)).sum() / B
    soft = 0.9 * labels(0.0) + 0.1 / C
    supervision = -(soft * weak.log_softmax(1)).sum(1).mean()
    return cross_entropy(z) + smoothed_target(z, 2) + 0.1 * others + 0.5 * supervision


@pytest.mark.parametrize(
    ("options", "formula"),
    [
        ({"name": "ce"}, lambda out: cross_entropy(out.student)),
        (
            {"name": "kd", "temperature": 3.0, "ce_weight": 0.4, "kd_weight": 0.6},
            lambda out: kd(out.student, out.teacher),
        ),
        ({"name": "nkd", "gamma": 2.0}, lambda out: nkd(out.student, out.teacher, 2.0)),
        (
            {"name": "nkd", "gamma": 2.0, "target_term": "t2"},
            lambda out: nkd_t2(out.student, out.teacher, 2.0),
        ),
        (
            {"name": "tf_nkd", "weight": 0.5},
            lambda out: cross_entropy(out.student) + 0.5 * smoothed_target(out.student, 1),
        ),
        ({"name": "uskd", "mu": 0.5}, lambda out: uskd(out.student, out.head["weak"])),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_losses_of_mixed_and_smoothed_labels(options, formula):
    out = Outputs(student=logits(0), teacher=logits(1).detach(), head={"weak": logits(2)})
    method = METHODS[options["name"]].model_validate(options)
    target = soft_labels(TARGET, C, numbered(Mix(SHARE, None)), SMOOTH)
    torch.testing.assert_close(target.double(), labels(), rtol=1e-6, atol=1e-7)
    loss, terms = loss_of(method, out, target)
    expected = formula(out)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    wrt = [out.student, *([out.head["weak"]] if options["name"] == "uskd" else [])]
    found = torch.autograd.grad(loss, wrt)
    for one, wanted in zip(found, torch.autograd.grad(expected, wrt), strict=True):
        torch.testing.assert_close(one, wanted, rtol=1e-4, atol=1e-6)
    right = (out.student.argmax(1) == TARGET).sum().item()
    assert (terms["top1"].item(), terms["rows"].item()) == (right, B)
    torch.testing.assert_close(terms["ce"].double(), cross_entropy(out.student).detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(TAKE))
def test_probabilities_of_one_class_are_that_label(name, dtype):
    made = [logits(seed).detach().to(dtype) for seed in range(5)]
    student = made[0].requires_grad_()
    out = Outputs(student, made[1], assistants=made[2:4], slts=made[2:4], head={"weak": made[4]})
    method = METHODS[name].model_validate({"name": name})
    assert method.takes_soft_labels
    out.features = method.features(out, TARGET)
    found = []
    for target in (TARGET, soft_labels(TARGET, C, None, 0.0)):
        loss, terms = loss_of(method, out, target)
        assert loss.dtype == torch.float32
        (gradient,) = torch.autograd.grad(loss, student, retain_graph=True)
        found.append({"loss": loss.detach(), "gradient": gradient, **terms})
    assert found[0].keys() == found[1].keys()
    for key, wanted in found[0].items():
        torch.testing.assert_close(found[1][key], wanted, check_dtype=False)


def test_smoothing_is_found_in_the_labels_and_taken_out():
    mix = numbered(Mix(0.7, None))
    plain = soft_labels(TARGET, C, mix, 0.0)
    assert torch.equal(unsmoothed(plain), plain)
    found = unsmoothed(soft_labels(TARGET, C, mix, 0.3))
    torch.testing.assert_close(found, plain, rtol=1e-6, atol=1e-6)
    assert torch.equal(found > 0, plain > 0)  # what is no label is exactly 0
    with pytest.raises(ValueError, match="2 classes.*set data.mixup"):
        unsmoothed(torch.tensor([[0.7, 0.3]]))


# --- In a run ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_recipes_refuse_soft_labels_for_methods_without_them(name):
    needs = {"slt": {"name": "resnet8"}} if METHODS[name].__name__ in ("SLKD", "DML") else {}
    if name == "jointrd_joint":
        needs["slt"] = {"name": "jointrd_resnet18"}
    if METHODS[name].uses_assistants:
        needs["assistants"] = [{"name": "resnet8"}]
    plain = tiny(None, name, data={"root": "digits"}, **needs)
    raw = plain.model_dump(mode="json")
    for key, value in MIXED.items():
        changed = raw | {"data": raw["data"] | {key: value}}
        if name in TAKE:
            assert Recipe.model_validate(changed).data.softening == [f"data.{key}"]
        else:
            message = f"method: {name}, as set, is not defined for soft labels; set data.{key} to 0"
            with pytest.raises(ValueError, match=message):
                Recipe.model_validate(changed)


def test_refusals_name_the_branch_and_every_key():
    kd = Recipe.load("digits/kd").model_dump(mode="json")
    other = {"method": {"name": "uskd", "labels": "plain"}, "student": {"name": "resnet8"}}
    soft = kd | {"also": {"second": other}, "data": kd["data"] | MIXED}
    with pytest.raises(ValueError) as caught:
        Recipe.model_validate(soft)
    assert (
        "also.second.method: uskd, as set, is not defined for soft labels; set data.mixup, "
        "data.cutmix, data.smoothing to 0"
    ) in str(caught.value)
    with pytest.raises(RecipeError, match="data.smoothing: got 1, wants a number below 1"):
        Recipe.load("digits/kd", ["data.smoothing=1"])
    with pytest.raises(RecipeError, match="data.mixup: got -1, wants a number at least 0"):
        Recipe.load("digits/kd", ["data.mixup=-1"])


def test_a_run_cut_off_in_an_epoch_ends_with_the_same_bytes(tmp_path):
    write_digits(tmp_path / "digits")
    recipe = tiny(
        tmp_path / "digits",
        "uskd",
        data={"subset": 8, **MIXED},
        optim={"lr": 0.05, "schedule": "constant", "clip": 1.0},
        run={"batch": 16, "checkpoint_every": 3, "keep": 9},
    )
    whole = train(recipe, tmp_path / "whole")
    cut = shutil.copytree(whole, tmp_path / "cut")
    for checkpoint in (cut / "checkpoints").iterdir():
        if checkpoint.name != "step-00000003":
            shutil.rmtree(checkpoint)
    train(recipe, cut, resume=True)
    last = "checkpoints/step-00000010"
    assert (cut / last / "state.pt").read_bytes() == (whole / last / "state.pt").read_bytes()
    # Mixing is on: without it the weights are others.
    raw = recipe.model_dump()
    raw["data"] |= {"mixup": 0.0, "cutmix": 0.0}
    bare = train(Recipe.model_validate(raw), tmp_path / "bare")
    first, second = (load(run / last)[0]["student"]["fc.weight"] for run in (whole, bare))
    assert not torch.equal(first, second)
