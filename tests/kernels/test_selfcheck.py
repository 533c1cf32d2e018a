"""The comparison of a device's losses with the reference's, on the CPU."""

import torch

from kdfuse.kernels import selfcheck
from kdfuse.kernels.bench import peers


def test_the_cpu_agrees_with_the_reference():
    assert selfcheck.disagreements("cpu", "cpu") == []


def test_what_is_wrong_is_named(monkeypatch):
    right = peers.CASES["kd"]

    def wrong(z, t, y, backend):
        loss = right.fused(z, t, y, backend=backend)
        return loss * (1.001 if backend == "cpu" else 1)

    def failing(z, y, backend):
        raise RuntimeError("no room")

    cases = {
        "kd": peers.Case(wrong, right.eager, 1, 1, 3, ""),
        "tf_nkd+ce": peers.Case(failing, right.eager, 1, 0, 3, ""),
    }
    monkeypatch.setattr(selfcheck, "CASES", cases)
    monkeypatch.setattr(selfcheck, "SHAPES", ((3, 10),))
    apart, stopped = selfcheck.disagreements("cpu", "cpu")
    assert "kd (3, 10): apart by 1.0e-03" in apart and stopped == "tf_nkd+ce (3, 10): no room"


def test_not_a_number_is_a_disagreement(monkeypatch):
    right = peers.CASES["kd"]

    def broken(z, t, y, backend):
        return right.fused(z, t, y, backend=backend) * (torch.nan if backend == "cpu" else 1)

    monkeypatch.setattr(selfcheck, "CASES", {"kd": peers.Case(broken, right.eager, 1, 1, 3, "")})
    monkeypatch.setattr(selfcheck, "SHAPES", ((3, 10),))
    assert len(selfcheck.disagreements("cpu", "cpu")) == 1
