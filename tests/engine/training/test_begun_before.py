"""A run that an earlier version began, `begun/`, goes on as it would have there.

Written at commit d791b9a from begun/recipe.yaml, whole, and cut off at its checkpoint of step 7 of
10 (checkpoint_every=7), with the log of the whole run; begun/end.json is what `ends` below gives
for the checkpoint of step 10 there, and `machine` on the machine that wrote it. A student, a peer,
an average, mixup, CutMix, a warm-up and clipping are in it.

The same bytes are promised on the same machine; elsewhere rounding differs, and with it the last
digits of what three steps change.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from kdfuse.engine import Recipe, train
from kdfuse.engine.run.checkpoint import load
from kdfuse.engine.run.log import read

BEGUN = Path(__file__).with_name("begun")
LAST = "step-00000010"
# Of norms and losses. Over SIMD levels of PyTorch and oneDNN they differ by 2e-7 at most.
MARGIN = 1e-3
CLOCK = ("time", "images_per_s", "data_wait")
# Settings of the libraries that choose other instructions than the machine's own.
CHOICES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS")


def machine():
    """What the bytes depend on, beside what the run itself sets; None where that is unknown."""
    facts = Path("/proc/cpuinfo")
    if not facts.is_file() or any(name in os.environ for name in CHOICES):
        return None
    wanted = ("vendor_id", "cpu family", "model", "stepping", "cache size", "flags")
    lines = [line.partition(":") for line in facts.read_text().splitlines()]
    cpu = {key.strip(): value.strip() for key, _, value in lines if key.strip() in wanted}
    return hashlib.sha256(json.dumps([cpu, torch.__version__]).encode()).hexdigest()


def ends(state, where=""):
    """By place in a checkpoint: a tensor's sha256 and norm, or a plain value."""
    if isinstance(state, torch.Tensor):
        digest = hashlib.sha256(state.contiguous().numpy().tobytes()).hexdigest()
        return {where: [digest, state.double().norm().item()]}
    if isinstance(state, dict):
        parts = [(str(key), value) for key, value in state.items()]
    elif isinstance(state, list | tuple):
        parts = [(str(i), value) for i, value in enumerate(state)]
    else:
        return {where: state}
    return {k: v for name, part in parts for k, v in ends(part, f"{where}/{name}").items()}


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("begun") / "run"
    shutil.copytree(BEGUN, folder)
    (folder / "end.json").unlink()
    return train(Recipe.load(BEGUN / "recipe.yaml"), folder, resume=True)


def test_it_ends_where_it_would_have_ended(resumed):
    end = json.loads((BEGUN / "end.json").read_text())
    found = ends(load(resumed / "checkpoints" / LAST)[0])
    # A new kind of content may join; nothing that was there is lost.
    assert end["state"].keys() <= found.keys()
    here = machine()
    if here is not None and here == end["machine"]:
        assert {key: found[key] for key in end["state"]} == end["state"]
    for key, value in end["state"].items():
        if not isinstance(value, list):
            assert found[key] == value, key
        elif key.startswith("/rng"):
            assert found[key][0] == value[0], key  # what is drawn does not hang on rounding
        else:
            assert found[key][1] == pytest.approx(value[1], rel=MARGIN, abs=MARGIN), key


def test_its_log_goes_on_behind_what_was_done(resumed):
    was, now = (read(folder / "log.jsonl") for folder in (BEGUN, resumed))
    notes = [record["text"] for record in now if record["kind"] == "note"]
    assert "resumed from step-00000007" in notes
    now = [record for record in now if record["kind"] != "note"]
    assert [(r["kind"], r["step"]) for r in was] == [(r["kind"], r["step"]) for r in now]
    for before, after in zip(was, now, strict=True):
        if after["step"] <= 7:
            assert before == after
            continue
        assert before.keys() == after.keys()
        for key in before.keys() - set(CLOCK):
            if key.endswith(("top1", "top5")):
                continue  # an image near the border between two classes counts whole
            expected = before[key]
            if isinstance(expected, float):
                expected = pytest.approx(expected, rel=MARGIN, abs=MARGIN)
            assert after[key] == expected, key
