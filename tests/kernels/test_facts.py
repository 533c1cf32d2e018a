"""What a new loss may say of itself holds, also in combinations that no shipped loss has."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow(12)

SOURCE = Path(__file__).with_name("any_facts.cpp")
ROWS, CLASSES, T = 6, 37, 3.0


def log_softmax(x):
    shifted = x - x.max()
    return shifted - np.log(np.exp(shifted).sum())


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_every_pair_of_facts_on_the_cpu(tmp_path):
    program = tmp_path / "any_facts"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-DKDFUSE_LEVEL=base"]
    subprocess.run(["g++", *flags, str(SOURCE), "-o", str(program)], check=True)
    rng = np.random.default_rng(0)
    z, t = 4 * rng.standard_normal((2, ROWS, CLASSES))
    labels = rng.integers(CLASSES, size=ROWS)
    labels[0], labels[1] = t[0].argmax(), z[1].argmax()
    rows = ([y, *a, *b] for y, a, b in zip(labels.tolist(), z.tolist(), t.tolist(), strict=True))
    lines = [" ".join(map(repr, row)) for row in rows]
    given = "\n".join([f"{CLASSES} {T}", *lines])
    told = subprocess.run([program], input=given, capture_output=True, text=True, check=True)
    found = np.array([line.split() for line in told.stdout.splitlines()], float)
    assert len(found) == 4 * ROWS
    assert {tuple(line[:2]) for line in found} == {(0, 0), (0, 1), (1, 0), (1, 1)}
    for number, (entropy, at1, value, *gradient) in enumerate(found):
        row = number % ROWS
        rest = np.arange(CLASSES) != labels[row]
        of_z, of_t = log_softmax(z[row][rest] / T), log_softmax(t[row][rest] / T)
        wanted = (np.exp(of_t) * (of_t * entropy - of_z)).sum()
        wanted += at1 * np.exp(log_softmax(t[row])[labels[row]])
        assert value == pytest.approx(wanted, rel=1e-12)
        assert gradient[labels[row]] == 0
        np.testing.assert_allclose(
            np.array(gradient)[rest], (np.exp(of_z) - np.exp(of_t)) / T, rtol=1e-10, atol=1e-14
        )
