"""Sampled teachers: right in the mean, the same from the same keys, and exact where they say so.

What a row stands for is written here from its list alone. All draws come from fixed keys, so that
each outcome is the same in every run.
"""

import math

import numpy as np
import pytest
import torch
from calls import Case, call, make
from torch import Tensor

import kdfuse
from kdfuse import SparseTeacher
from kdfuse.kernels import backends, sampled

pytestmark = pytest.mark.slow(15)

INF = float("inf")
BACKENDS = [name for name in ("reference", "cpu") if not backends.backends()[name]]
# The losses whose gradient is linear in the teacher's probabilities, at which temperature.
LINEAR = {
    "kd": {"temperature": 3.0},
    "dkd": {"temperature": 3.0, "alpha": 0.7, "beta": 3.0, "ce_weight": 0.3},
    "nkd": {"temperature": 1.0, "gamma": 1.5, "ce_weight": 0.3},
    "wttm": {"temperature": 3.0, "weighted": False},
}


def logits(n: int, c: int, spread: float = 2.0, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, spread, (n, c)))


def shares(x: SparseTeacher, c: int, temperature: float) -> Tensor:
    """(N, C) float64: the probabilities that the lists stand for, written from the lists."""
    n, k = x.values.shape
    e = (x.values.double() / temperature).exp()
    mass = torch.zeros(n, dtype=torch.float64) if x.mass is None else x.mass.double()
    rows = (mass / (c - k))[:, None].repeat(1, c)
    return rows.scatter(1, x.indices, (1 - mass)[:, None] * e / e.sum(1, keepdim=True))


def test_the_hash_is_splitmix64():
    # The first output from these seeds, of the generator's reference implementation.
    want = {0: 0xE220A8397B1DCDAF, 1234567: 6457827717110365317}
    got = sampled.mix(torch.tensor(list(want)))
    assert [x % 2**64 for x in got.tolist()] == list(want.values())
    u = sampled.uniforms(torch.arange(2000) - 1000, 50)
    assert 0 <= u.min() and u.max() < 1 and u.unique().numel() == u.numel()
    assert abs(u.mean() - 0.5) < 4 * math.sqrt(1 / 12 / u.numel())
    assert abs(np.corrcoef(u.numpy().T) - np.eye(50)).max() < 0.12


@pytest.mark.parametrize("n", (1, 3, 8))
def test_a_class_is_drawn_as_often_as_its_probability_says(n):
    """In the mean over all places within the parts of the sum, of which a grid goes through."""
    grid = 4096
    p = logits(1, 9).softmax(1)
    u = ((torch.arange(grid, dtype=torch.float64) + 0.5) / grid)[:, None].expand(grid, n)
    drawn = sampled.draw(p.log().expand(grid, 9), u)
    counts = torch.zeros(grid, 9, dtype=torch.float64)
    counts.scatter_add_(1, drawn, torch.ones(grid, n, dtype=torch.float64))
    assert (counts.mean(0) - n * p[0]).abs().max() < 2 / grid


def test_no_draw_is_of_a_class_without_probability():
    weights = torch.tensor([[-INF, 0.0, -INF, -800.0, -INF]], dtype=torch.float64)
    ends = torch.tensor([[0.0, 0.0, 1 - 2.0**-53], [1 - 2.0**-53] * 3], dtype=torch.float64)
    assert sampled.draw(weights.expand(2, 5), ends).tolist() == [[1, 1, 1], [1, 1, 1]]
    tied = torch.tensor([[0.0, -INF, 0.0, -INF]], dtype=torch.float64)
    assert sampled.draw(tied, torch.zeros(1, 2).double()).tolist() == [[0, 2]]


@pytest.mark.parametrize("temperature", (1.0, 3.0))
@pytest.mark.parametrize("labelled", (False, True))
@pytest.mark.parametrize(
    "c, n, keep", [(100, 12, 0), (100, 12, 5), (21, 40, 5), (9, 3, 4), (3, 1, 0), (4, 500, 1)]
)
def test_what_a_row_stands_for(c, n, keep, labelled, temperature):
    """Exact for the kept classes; for others m c_i / n, with c_i within 2 of n p_i / m."""
    t, target = logits(40, c), None
    if labelled:
        target = torch.arange(40) % c
    x = SparseTeacher.sample(
        t, n, temperature=temperature, keep=keep, seed=torch.arange(40), target=target
    )
    k = min(keep + labelled + n, c - 1)
    assert x.values.shape == x.indices.shape == (40, k)
    assert x.values.dtype == torch.float64 and x.indices.dtype == torch.int64
    assert (x.mass is not None) == (keep + labelled + n >= c)
    assert all(len(set(row)) == k for row in x.indices.tolist())

    p = (t / temperature).softmax(1)
    exact = torch.zeros(40, c, dtype=torch.bool)
    exact.scatter_(1, p.argsort(1, descending=True)[:, :keep], True)
    if labelled:
        exact[torch.arange(40), target] = True
    q = shares(x, c, temperature)
    torch.testing.assert_close(q[exact], p[exact], rtol=1e-12, atol=0)
    m = p.masked_fill(exact, 0).sum(1, keepdim=True)
    counts = (n * q / m).masked_fill(exact, 0)
    torch.testing.assert_close(counts, counts.round(), rtol=0, atol=1e-9)
    torch.testing.assert_close(counts.sum(1), torch.full((40,), float(n)).double())
    assert (counts - (n * p / m).masked_fill(exact, 0)).abs().max() < 2
    torch.testing.assert_close((x.dense(c, temperature) / temperature).softmax(1), q)
    # Kept classes, drawn ones by falling count, then those at -inf.
    listed = counts.masked_fill(exact, n + 1).gather(1, x.indices).round()
    assert (listed.diff(dim=1) <= 0).all()
    assert torch.equal(listed == 0, x.values == -INF)


def test_of_equal_logits_the_first_are_kept():
    t = torch.tensor([[1.0, 3.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]])
    x = SparseTeacher.sample(t, 2, temperature=1.0, keep=2, seed=0)
    assert x.indices[0, :2].tolist() == [0, 1]
    x = SparseTeacher.sample(0 * t, 2, temperature=1.0, keep=3, seed=0)
    assert x.indices[0, :3].tolist() == [0, 1, 2]


def gradients(name: str, x, t: Tensor, z: Tensor, y: Tensor, **settings) -> Tensor:
    z = z.clone().requires_grad_()
    loss = call(name, Case([z], [x], y), reduction="sum", **settings)
    return torch.autograd.grad(loss, z)[0]


@pytest.mark.parametrize("keep", (0, 4))
@pytest.mark.parametrize("name", LINEAR)
def test_the_mean_gradient_is_that_of_the_whole_teacher(name, keep):
    """Of 4000 teachers drawn for one row, within the mean's standard error; of the k + n largest
    it is not, at any number of rows.
    """
    draws, c, n, y = 4000, 30, 8, torch.tensor([7])
    t, z, settings = logits(1, c, 1.5), logits(1, c, 1.5, seed=1), LINEAR[name]
    at = settings["temperature"]
    keys, labels = torch.arange(draws), y.expand(draws)
    x = SparseTeacher.sample(
        t.expand(draws, c), n, temperature=at, keep=keep, seed=keys, target=labels
    )
    full = gradients(name, t, t, z, y, **settings)
    few = SparseTeacher.top_k(t, n + keep, temperature=at)
    biased = gradients(name, few, t, z, y, **settings)
    for teacher in (x, x.dense(c, at)):
        each = gradients(name, teacher, t, z.expand(draws, c), labels, **settings)
        error = each.std(0) / math.sqrt(draws)
        noisy = error > 1e-9  # kept classes have no noise
        off = (each.mean(0) - full[0]).abs()
        assert off[~noisy].max() < 1e-12 and noisy.sum() >= c - keep - 1
        scores = (off / error)[noisy]
        assert scores.max() < 4 and (scores**2).mean() < 2  # measured: 2.1 and 1.1 at most
        assert ((biased - full)[0].abs() / error)[noisy].max() > 10  # measured: 30 at least


# Where the loss is not linear in the probabilities: (loss, T of the draws, label exact, settings).
NOT_LINEAR = {
    "kd at another T": ("kd", 1.0, True, {"temperature": 3.0}),
    "dkd without the label": ("dkd", 3.0, False, LINEAR["dkd"]),
    "nkd without the label": ("nkd", 1.0, False, LINEAR["nkd"]),
    "nkd at T = 3": ("nkd", 3.0, True, {**LINEAR["nkd"], "temperature": 3.0}),
    "wttm with its weight": ("wttm", 3.0, True, {"temperature": 3.0}),
}


@pytest.mark.parametrize("case", NOT_LINEAR)
def test_elsewhere_the_mean_gradient_is_another(case):
    """By far more than its standard error. The label has half of a teacher's mass and more, so that
    of 3 draws all are often of it.
    """
    name, at, labelled, settings = NOT_LINEAR[case]
    draws, c, y = 4000, 30, torch.tensor([7])
    t, z, labels = logits(1, c, 1.5), logits(1, c, 1.5, seed=1), y.expand(draws)
    t[0, y] = 5 * at
    target = labels if labelled else None
    x = SparseTeacher.sample(
        t.expand(draws, c), 3, temperature=at, seed=torch.arange(draws), target=target
    )
    each = gradients(name, x, t, z.expand(draws, c), labels, **settings)
    off = (each.mean(0) - gradients(name, t, t, z, y, **settings)[0]).abs()
    scores = off * math.sqrt(draws) / each.std(0)
    assert scores.max() > 8  # measured: 13 at least


def variance(c: int, n: int, keep: int = 0, spread: float = 1.0, draws: int = 2000) -> float:
    """Of the row's probabilities, summed over its classes: that of the gradient, but for T^2."""
    t = logits(1, c, spread)
    keys = torch.arange(draws) + 10**6 * n
    x = SparseTeacher.sample(t.expand(draws, c), n, temperature=1.0, keep=keep, seed=keys)
    return (shares(x, c, 1.0) - t.softmax(1)).square().sum(1).mean().item()


@pytest.mark.parametrize("c", (40, 1000))
def test_the_variance_falls_as_1_over_n_and_stays_below_that_of_independent_draws(c):
    found = [variance(c, n) for n in (4, 16, 64)]
    of_independent = 1 - logits(1, c, 1.0).softmax(1).square().sum()
    shares = [n * x / of_independent for n, x in zip((4, 16, 64), found, strict=True)]
    assert max(shares) < 1.02 and shares[-1] < 0.95  # measured: 0.99 and 0.87 at most
    for more, fewer in zip(found, found[1:], strict=False):
        assert more / fewer > 3.9  # measured: 4.1 at least
    assert variance(c, 16, keep=8) < 0.95 * found[1]  # measured: 0.26 and 0.87


def test_draws_come_from_the_key_of_their_row_alone():
    t, keys = logits(12, 50), torch.arange(12) * 7 - 20

    def of(rows, seed):
        x = SparseTeacher.sample(t[rows], 9, temperature=2.0, keep=2, seed=seed)
        return x.values, x.indices

    every = torch.arange(12)
    want = of(every, keys)
    for rows in (every, every.flip(0), torch.tensor([5]), torch.tensor([3, 3, 8])):
        for got, whole in zip(of(rows, keys[rows]), want, strict=True):
            assert torch.equal(got, whole[rows])
    assert not torch.equal(of(every, keys + 1)[1], want[1])
    same = torch.zeros(12, dtype=torch.int64)
    first = of(same, 5)
    assert torch.equal(of(same, 5)[0], first[0]) and not torch.equal(of(same, 6)[0], first[0])
    assert len({tuple(row) for row in first[1].tolist()}) == 12  # an int: by the row's place


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_types(dtype):
    t = logits(20, 60).to(dtype)
    x = SparseTeacher.sample(t, 10, temperature=2.0, keep=3, seed=1)
    wide = SparseTeacher.sample(t.double(), 10, temperature=2.0, keep=3, seed=1)
    assert x.values.dtype == torch.float32 and torch.equal(x.indices, wide.indices)
    assert torch.equal(x.values, wide.values.float())
    small = SparseTeacher.sample(t[:, :9], 10, temperature=2.0, seed=1)
    assert small.mass.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LINEAR)
def test_what_fills_a_list_up_changes_nothing(name, backend):
    """Bits of the loss and of its gradient, beside a row of the same classes alone."""
    case = make(name, 1, 33)
    t, z, y = case.teachers[0], case.students[0], case.target
    x = SparseTeacher.sample(t, 20, temperature=3.0, keep=1, seed=4, target=y)
    there = x.values[0] > -INF
    assert 2 < there.sum() < 20
    least = SparseTeacher(x.values[:, there], x.indices[:, there])
    settings = {**LINEAR[name], "backend": backend}
    assert torch.equal(*(gradients(name, a, t, z, y, **settings) for a in (x, least)))
    assert torch.equal(*(call(name, Case([z], [a], y), **settings) for a in (x, least)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LINEAR)
def test_rows_that_are_all_in_one_class_or_have_classes_at_minus_infinity(name, backend):
    case = make(name, 5, 33)
    t, z, y = case.teachers[0], case.students[0], case.target
    t[0, :] = -INF
    t[0, 3] = 1.0  # also the largest
    t[1, 1:] -= 5000.0
    t[2, ::2] = -INF
    t[3, 5] = torch.nan
    for keep in (0, 1, 4):
        x = SparseTeacher.sample(t, 20, temperature=3.0, keep=keep, seed=4, target=y)
        assert x.values[3].isnan().any()
        q = shares(x, 33, 3.0)
        assert q[0, 3] == 1 and q[1, 0] == 1 and not q[2, ::2].any()
        settings = {**LINEAR[name], "backend": backend}
        g = gradients(name, x, t, z, y, **settings)
        want = gradients(name, torch.where(t.isnan(), t, 3 * q.log()), t, z, y, **settings)
        assert g[:3].isfinite().all() and g[3].isnan().any() and g[4].isfinite().all()
        torch.testing.assert_close(g, want, rtol=1e-11, atol=1e-12, equal_nan=True)


def test_rows_that_take_no_part():
    t, y = logits(4, 30), torch.tensor([3, -100, 29, -1])
    with pytest.raises(ValueError, match=r"target\[3\] is -1, outside the 30 classes"):
        SparseTeacher.sample(t, 5, temperature=1.0, seed=0, target=y)
    y[3] = 0
    x = SparseTeacher.sample(t, 5, temperature=1.0, seed=0, target=y)
    z = logits(4, 30, seed=1)
    want = kdfuse.nkd_loss(
        z[[0, 2, 3]], SparseTeacher(x.values[[0, 2, 3]], x.indices[[0, 2, 3]]), y[[0, 2, 3]]
    )
    torch.testing.assert_close(kdfuse.nkd_loss(z, x, y), want, rtol=1e-13, atol=0)
    other = SparseTeacher.sample(
        t, 5, temperature=1.0, seed=0, target=y.clamp(min=-1), ignore_index=-1
    )
    assert torch.equal(other.values, x.values)


def test_no_rows():
    x = SparseTeacher.sample(torch.zeros(0, 9), 4, temperature=1.0, keep=1, seed=0)
    assert x.values.shape == x.indices.shape == (0, 5)


def test_compile_is_one_graph():
    torch._dynamo.reset()

    def step(t, keys, y):
        x = SparseTeacher.sample(t, 6, temperature=2.0, keep=2, seed=keys, target=y)
        z = SparseTeacher.sample(t, 6, temperature=2.0, seed=3)
        return kdfuse.kd_loss(t * 0, x, temperature=2.0), x.values, z.indices

    t, keys, y = logits(8, 33), torch.arange(8), torch.arange(8)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(t, keys, y), step(t, keys, y), rtol=1e-13, atol=1e-13)


T, K = torch.zeros(4, 9), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    "arguments, error, text",
    [
        ({"teacher": T.long()}, TypeError, "teacher must have a floating type"),
        ({"temperature": 0.0}, ValueError, "temperature must be a positive number, got 0.0"),
        ({"n": 0}, ValueError, r"n must be at least 1, got 0; top_k\(rest='drop'\) draws nothing"),
        ({"n": 2.0}, TypeError, "n must be an int, got 2.0"),
        ({"keep": None}, TypeError, "keep must be an int, got None"),
        ({"keep": -1}, ValueError, "keep is -1, but of 9 classes 0 to 7 can be kept"),
        ({"keep": 8}, ValueError, "keep is 8, but of 9 classes 0 to 7 can be kept, as two"),
        (
            {"keep": 7, "target": K},
            ValueError,
            "keep is 7, but of 9 classes 0 to 6 can be kept beside the label, as two",
        ),
        ({"seed": 1.5}, TypeError, "seed must be an int or an int64 tensor, got float"),
        ({"seed": -1}, ValueError, r"seed must be from 0 to 2\^63 - 1, got -1"),
        ({"seed": K.int()}, TypeError, "seed must be .* got torch.int32; use seed.long"),
        ({"seed": K[:3]}, ValueError, r"seed must have shape \(4,\), got \(3,\)"),
        ({"seed": K.to("meta")}, ValueError, "seed is on meta, teacher on cpu; move one of them"),
        ({"target": 3}, TypeError, "target must be a tensor, got int"),
        ({"target": K.int()}, TypeError, "target must be int64 .* got torch.int32"),
        ({"target": K[:2]}, ValueError, r"target must have shape \(4,\), got \(2,\)"),
        ({"target": T}, ValueError, r"sample is defined for class indices; got probabilities"),
        ({"target": K.to("meta")}, ValueError, "target is on meta, teacher on cpu"),
        ({"target": K + 9}, ValueError, r"target\[0\] is 9, outside the 9 classes"),
    ],
)
def test_refused(arguments, error, text):
    given = {"teacher": T, "n": 3, "temperature": 1.0, "seed": 0, **arguments}
    with pytest.raises(error, match=text):
        SparseTeacher.sample(given.pop("teacher"), given.pop("n"), **given)


def of_bucket(z: Tensor, t: Tensor, k: int, temperature: float) -> Tensor:
    """(N,): KL over the k largest classes of t and one more, which has the sum of all others."""
    q, p = (x.div(temperature).softmax(1) for x in (t, z))
    order = q.argsort(1, descending=True)
    q, p = q.gather(1, order), p.gather(1, order)
    q, p = (torch.cat([x[:, :k], x[:, k:].sum(1, keepdim=True)], 1) for x in (q, p))
    return temperature**2 * (q * (q / p).log()).sum(1)


@pytest.mark.parametrize("temperature", (1.0, 4.0))
@pytest.mark.parametrize("k", (1, 5, 29))
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bucket_is_one_outcome_more(backend, k, temperature):
    t, z = logits(12, 30), logits(12, 30, seed=1)
    few = SparseTeacher.top_k(t, k, temperature=temperature)
    for student, dtype in ((z + 5000, torch.float64), (z, torch.float32), (z, torch.bfloat16)):
        student = student.to(dtype).requires_grad_()
        whole = few.bucket(student, temperature)
        assert whole.dtype == torch.float64 and not whole.requires_grad
        loss = kdfuse.kd_loss(
            student, whole, temperature=temperature, backend=backend, reduction="none"
        )
        (g,) = torch.autograd.grad(loss.sum(), student)
        exact = student.detach().double().requires_grad_()
        want = of_bucket(exact, t, k, temperature)
        (true,) = torch.autograd.grad(want.sum(), exact)
        torch.testing.assert_close(loss, want, rtol=1e-10, atol=1e-10)
        step = 1e-11 if dtype == torch.float64 else torch.finfo(dtype).eps
        torch.testing.assert_close(g.double(), true, rtol=step, atol=step)


def test_a_bucket_of_a_student_that_excludes_its_classes():
    t, z = logits(3, 9), logits(3, 9, seed=1)
    few = SparseTeacher.top_k(t, 2, temperature=2.0)
    z[1] = z[1].masked_fill(
        ~torch.zeros(9, dtype=torch.bool).scatter(0, few.indices[1], True), -INF
    )
    loss = kdfuse.kd_loss(z, few.bucket(z, 2.0), temperature=2.0, reduction="none")
    assert loss[1] == INF and loss[[0, 2]].isfinite().all()


def test_refused_buckets():
    few = SparseTeacher.top_k(torch.randn(4, 9), 2, temperature=1.0)
    with pytest.raises(ValueError, match="mass is None, but a bucket holds the mass"):
        SparseTeacher(few.values, few.indices).bucket(T, 1.0)
    with pytest.raises(ValueError, match="teacher.values must have the student's 3 rows"):
        few.bucket(T[:3], 1.0)
    with pytest.raises(ValueError, match="temperature must be a positive number"):
        few.bucket(T, -1.0)
    with pytest.raises(TypeError, match="student must have a floating type"):
        few.bucket(T.long(), 1.0)
    wrong = SparseTeacher(few.values, 0 * few.indices, few.mass)
    with pytest.raises(ValueError, match=r"indices\[0, 1\] is 0, listed twice"):
        wrong.bucket(T, 1.0)
