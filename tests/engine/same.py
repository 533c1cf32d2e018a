"""Whether one run is another: the same bytes in its checkpoints, the same records in its log."""

import math

import torch

from kdfuse.engine.run.checkpoint import load
from kdfuse.engine.run.log import read

CLOCK = ("time", "images_per_s", "data_wait")


def assert_same(one, other, where="state"):
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert list(one) == list(other), where
        for key in one:
            assert_same(one[key], other[key], f"{where}[{key!r}]")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{where}[{i}]")
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and one.shape == other.shape, where
        one, other = (t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other))
        assert torch.equal(one, other), where
    else:
        assert one == other or (math.isnan(one) and math.isnan(other)), where


def records(run):
    kept = [record for record in read(run / "log.jsonl") if record["kind"] != "note"]
    return [{k: v for k, v in record.items() if k not in CLOCK} for record in kept]


def assert_same_run(run, whole, steps):
    for name in (f"step-{steps:08d}", "best"):
        for mine, theirs in zip(
            load(run / "checkpoints" / name), load(whole / "checkpoints" / name), strict=True
        ):
            assert_same(mine, theirs)
    assert records(run) == records(whole)
    assert records(run)[-1]["kind"] == "end" and records(run)[-1]["step"] == steps
    assert (run / "report.html").exists()
