"""The forms of a cache: their bytes, what comes back of whole logits, and what cannot be held."""

import numpy as np
import pytest
import torch

from kdfuse import kd_loss
from kdfuse.engine.cache.forms import FIELDS, Form, form_of
from kdfuse.engine.cache.shards import Layout
from kdfuse.engine.recipe.cache import Cache

N = 64


def logits_of(classes, spread=4.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(N, classes, generator=generator)


def held(form, logits, target=None, keys=None):
    """What a form gives back of logits."""
    target = torch.zeros(len(logits), dtype=torch.int64) if target is None else target
    keys = torch.arange(len(logits)) if keys is None else keys
    rows = form.encode(logits, target, keys)
    assert rows.dtype == form.row and len(rows) == len(logits)
    again = np.frombuffer(rows.tobytes(), form.row)  # as a file gives them
    return form.answer(form.decode(again))


def probabilities(answer, classes, temperature):
    whole = answer if isinstance(answer, torch.Tensor) else answer.dense(classes, temperature)
    return (whole.double() / temperature).softmax(1)


@pytest.mark.parametrize("classes", [10, 1000])
def test_whole_logits_come_back_as_exactly_as_their_numbers_are(classes):
    logits = logits_of(classes)
    exact = held(Form("full", classes, None, number="float32"), logits)
    assert torch.equal(exact, logits)
    half = held(Form("full", classes, None, number="float16"), logits)
    assert half.dtype == torch.float16 and torch.equal(half, logits.half())
    bytes_ = held(Form("full", classes, None, number="int8"), logits)
    step = logits.abs().amax(1, keepdim=True) / 127
    assert ((bytes_ - logits).abs() <= step * 0.5001).all()
    zero = torch.zeros(2, classes)
    assert torch.equal(held(Form("full", classes, None, number="int8"), zero), zero)


@pytest.mark.parametrize("label", [False, True])
@pytest.mark.parametrize("rest", ["spread", "drop"])
def test_the_largest_keep_their_probabilities(rest, label):
    classes, k, t = 100, 5, 4.0
    logits = logits_of(classes)
    target = torch.arange(N) % classes
    form = Form("top_k", classes, t, k=k, rest=rest, label=label)
    answer = held(form, logits, target)
    p = (logits.double() / t).softmax(1)
    wanted = set_of(logits.topk(k).indices, target if label else None)
    for row, listed in enumerate(answer.indices.tolist()):
        assert len(set(listed)) == form.exact and set(listed) >= wanted[row]
    q = probabilities(answer, classes, t)
    listed = torch.zeros_like(p, dtype=torch.bool).scatter(1, answer.indices, True)
    share = p if rest == "spread" else p / (p * listed).sum(1, keepdim=True)
    # A logit in half precision, at most 40 from the largest, is off by 2^-11 of that.
    torch.testing.assert_close(q[listed], share[listed], rtol=40 * 2**-11 / t, atol=0)
    left = (p * ~listed).sum(1) if rest == "spread" else torch.zeros(N, dtype=torch.float64)
    torch.testing.assert_close((q * ~listed).sum(1), left, rtol=0.02, atol=1e-12)


def set_of(largest, target):
    rows = [set(row) for row in largest.tolist()]
    return rows if target is None else [r | {y} for r, y in zip(rows, target.tolist(), strict=True)]


@pytest.mark.parametrize(("keep", "label"), [(0, False), (0, True), (3, True)])
def test_drawn_answers_are_the_teacher_in_the_mean(keep, label):
    classes, draws, t, views = 50, 12, 4.0, 400
    logits = logits_of(classes)[:8]
    target = torch.arange(8)
    form = Form("sampled", classes, t, draws=draws, keep=keep, label=label)
    p = (logits.double() / t).softmax(1)
    total = torch.zeros_like(p)
    for view in range(views):
        answer = held(form, logits, target, torch.arange(8) + 1000 * view)
        assert answer.indices.shape == (8, form.exact + draws)
        q = probabilities(answer, classes, t)
        total += q
        exact = answer.indices[:, : form.exact]
        wanted = set_of(logits.topk(keep).indices, target if label else None)
        for row, classes_of in enumerate(exact.tolist()):
            assert set(classes_of) >= wanted[row]
            at = sorted(wanted[row])
            torch.testing.assert_close(q[row, at], p[row, at], rtol=0.01, atol=1e-4)
        if label:
            assert (exact == target[:, None]).any(1).all()
    # Of n draws in each of so many views a probability's standard error is at most this.
    error = (p * (1 - p) / (draws * views)).sqrt() + 0.01 * p
    assert ((total / views - p).abs() < 5 * error).all()


def test_the_same_key_draws_the_same_and_rows_hang_on_nothing_beside_them():
    form = Form("sampled", 50, 4.0, draws=12)
    logits, target, keys = logits_of(50), torch.zeros(N, dtype=torch.int64), torch.arange(N) * 7
    whole = form.encode(logits, target, keys)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    assert (form.encode(logits[order], target, keys[order]) == whole[order.numpy()]).all()
    assert (form.encode(logits, target, keys + 1) != whole).any()


@pytest.mark.parametrize(
    ("form", "size"),
    [
        (Form("full", 1000, None, number="float16"), 2000),
        (Form("full", 1000, None, number="int8"), 1004),
        (Form("top_k", 1000, 4.0, k=10, rest="spread"), 44),
        (Form("top_k", 1000, 4.0, k=10, rest="drop"), 40),
        (Form("sampled", 1000, 4.0, draws=12), 26),
        (Form("sampled", 1000, 4.0, draws=12, label=True), 30),
        (Form("sampled", 21841, 4.0, draws=12), 50),
        (Form("sampled", 100_000, 4.0, draws=12, label=True), 56),
    ],
)
def test_bytes_of_a_view(form, size):
    assert form.row.itemsize == size


@pytest.mark.parametrize("classes", [1000, 4096, 4097, 65536, 65537, 70000])
def test_every_class_and_count_fits_its_number(classes):
    form = Form("sampled", classes, 1.0, draws=12, label=True)
    logits = torch.full((1, classes), -30.0)
    logits[0, -1] = 30.0  # all draws fall on the last class
    answer = held(form, logits, torch.tensor([classes - 2]))
    assert answer.indices[0, :2].tolist() == [classes - 2, classes - 1]
    q = probabilities(answer, classes, 1.0)
    assert q[0, -1] > 0.999 and len(set(answer.indices[0].tolist())) == form.exact + 12


def test_logits_beyond_a_form_are_refused():
    far = torch.full((1, 10), 1e5)
    with pytest.raises(ValueError, match=r"float16 does not hold a logit of 100000; use float32"):
        held(Form("full", 10, None, number="float16"), far)
    far[0, 0] = torch.nan
    for form in (Form("full", 10, None), Form("top_k", 10, 1.0, k=3)):
        with pytest.raises(ValueError, match="the teacher's logits are not finite"):
            held(form, far)


def test_a_bucket_is_the_loss_of_its_outcomes():
    classes, k, t = 20, 4, 2.0
    logits, student = logits_of(classes), logits_of(classes, seed=1).double()
    answer = held(Form("top_k", classes, t, k=k, rest="bucket"), logits)
    found = kd_loss(student, answer.bucket(student, t), temperature=t)
    p, q = (logits.double() / t).softmax(1), (student / t).log_softmax(1)
    index = answer.indices
    kept = p.gather(1, index)
    outcomes = torch.cat([kept, 1 - kept.sum(1, keepdim=True)], 1)
    own = q.gather(1, index)
    log_q = torch.cat([own, torch.log1p(-own.exp().sum(1, keepdim=True))], 1)
    wanted = t * t * (outcomes * (outcomes.log() - log_q)).sum(1).mean()
    torch.testing.assert_close(found, wanted, rtol=0.01, atol=0)


@pytest.mark.parametrize(
    ("words", "classes", "temperature", "wrong"),
    [
        ({"form": "top_k", "k": 10}, 10, 4.0, "cache.form=top_k would list 10 of 10 classes"),
        ({"form": "sampled", "keep": 2, "label": True}, 15, 4.0, "would list 15 of 15 classes"),
        ({"form": "sampled"}, 100, None, "cache.temperature: missing"),
        ({"temperature": 2.0}, 100, 4.0, "cache.temperature=2.0 has no effect"),
    ],
)
def test_settings_that_do_not_fit_are_named(words, classes, temperature, wrong):
    with pytest.raises(ValueError, match=wrong):
        form_of(Cache.model_validate(words), classes, temperature)


def test_a_form_is_of_its_settings_and_the_methods_temperature():
    made = form_of(Cache.model_validate({"form": "sampled", "draws": 7}), 100, 4.0)
    assert made == Form("sampled", 100, 4.0, draws=7)
    assert form_of(Cache.model_validate({}), 100, 4.0) == Form("full", 100, None, number="float16")
    own = Cache.model_validate({"form": "top_k", "temperature": 2.0})
    assert form_of(own, 100, 4.0).temperature == 2.0
    assert {"form", "classes", "temperature"} <= set(FIELDS)
    with pytest.raises(ValueError, match=r"cache\.draws: 5 has no effect with cache\.form top_k"):
        Cache.model_validate({"form": "top_k", "draws": 5})


def test_a_shard_is_made_in_memory_and_not_larger():
    of_logits = Layout("", np.dtype([("logits", "<f2", 1000)]), 1, 10**6, 256)
    of_maps = Layout("", np.dtype([("tap0", "<f2", (7, 7, 2048))]), 1, 10**6, 256)
    of_large = Layout("", np.dtype([("tap0", "<f4", (512, 512, 64))]), 1, 10**6, 256)
    assert of_logits.length * 256 == 2**16
    assert 2**27 < of_maps.length * 256 * of_maps.row.itemsize <= 2**28
    assert of_large.length == 1
