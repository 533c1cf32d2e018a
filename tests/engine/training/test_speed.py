"""run.speed: what it comes to on a device, and that a run goes on as it was begun."""

from pathlib import Path

import pytest
import torch
from tiny import tiny

from kdfuse.engine.detection.recipe import DetectionRecipe
from kdfuse.engine.recipe.load import load
from kdfuse.engine.recipe.run import LEFT_OPEN
from kdfuse.engine.run.folder import RECIPE, changes, plain
from kdfuse.engine.training import speed
from kdfuse.engine.training.process import settings
from kdfuse.engine.training.speed import EXACT, settled
from kdfuse.engine.training.start import train

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
ON_GPU = {"amp": "bf16", "tf32": True, "compile": True, "deterministic": False}


def of(recipe):
    return {name: getattr(recipe.run, name) for name in LEFT_OPEN}


@pytest.fixture
def gpu(monkeypatch):
    """A CUDA device of this capability, as far as torch says."""

    def is_there(*capability):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)

    return is_there


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_exact_is_the_same_everywhere(device):
    recipe = tiny(Path("digits"), run={"speed": "exact"})
    assert of(settled(recipe, device)) == EXACT
    assert EXACT == {"amp": "off", "tf32": False, "compile": False, "deterministic": True}


def test_fast_is_by_the_device(gpu, monkeypatch):
    monkeypatch.setattr(speed, "find_spec", lambda name: name == "triton" or None)
    for capability in ((8, 0), (9, 0), (12, 1)):
        gpu(*capability)
        assert of(settled(tiny(Path("digits")), CUDA)) == ON_GPU
    gpu(7, 5)
    assert of(settled(tiny(Path("digits")), CUDA)) == ON_GPU | {"amp": "off"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert of(settled(tiny(Path("digits")), CUDA)) == ON_GPU  # of another machine
    monkeypatch.setattr(speed, "find_spec", lambda name: None)
    assert of(settled(tiny(Path("digits")), CUDA)) == ON_GPU | {"compile": False}
    detector = load("coco/kd:resnet101-resnet50")
    assert isinstance(detector, DetectionRecipe)
    assert of(settled(detector, CUDA)) == ON_GPU | {"compile": False}


@pytest.mark.parametrize("found", [True, False])
def test_fast_on_a_cpu_is_bfloat16_where_it_has_the_instructions(monkeypatch, found):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: found)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    assert of(settled(tiny(Path("digits")), CPU)) == EXACT | {"amp": "bf16" if found else "off"}
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "avx512_core_amx")
    assert speed.cpu_has_bf16() == found
    for narrow in ("AVX2", "AVX512_CORE", "AVX512_CORE_VNNI", "SSE41"):
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", narrow)
        assert not speed.cpu_has_bf16()


@pytest.mark.parametrize("name", LEFT_OPEN)
@pytest.mark.parametrize("preset", ["fast", "exact"])
def test_what_a_recipe_says_holds(gpu, preset, name):
    gpu(9, 0)
    for value in ("off", "bf16") if name == "amp" else (True, False):
        for device in (CPU, CUDA):
            recipe = settled(tiny(Path("digits"), run={"speed": preset, name: value}), device)
            assert getattr(recipe.run, name) == value and None not in of(recipe).values()


def test_a_run_keeps_what_it_was_begun_with(digits, tmp_path, monkeypatch):
    """Also where it goes on, on a machine where fast is something else."""
    folder = tmp_path / "run"
    train(tiny(digits, run={"epochs": 2, "stop_epoch": 1}), folder)
    begun = load(folder / RECIPE)
    assert of(begun) == EXACT and begun.run.speed == "fast"
    monkeypatch.setattr(speed, "cpu_has_bf16", lambda: True)
    again = tiny(digits, run={"epochs": 2, "stop_epoch": 1})
    assert settled(again, CPU).run.amp == "bf16"
    train(again, folder, resume=True)
    assert load(folder / RECIPE) == begun
    with pytest.raises(ValueError, match="run.amp: off -> bf16"):
        train(tiny(digits, run={"epochs": 2, "stop_epoch": 1, "amp": "bf16"}), folder, resume=True)


def test_another_speed_does_not_go_on_with_a_run(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "cpu_has_bf16", lambda: True)
    run = {"epochs": 2, "stop_epoch": 1}
    train(tiny(digits, run=run), tmp_path / "run")
    with pytest.raises(ValueError, match="run.amp: bf16 -> off"):
        train(tiny(digits, run={**run, "speed": "exact"}), tmp_path / "run", resume=True)


def test_what_was_left_open_is_no_change():
    recipe = load("cifar100/kd:resnet56-resnet20")
    as_run = plain(settled(recipe, CPU))
    assert changes(plain(recipe), as_run) == []
    assert changes(as_run, {**as_run, "run.amp": "bf16"}) == ["run.amp: off -> bf16"]


@pytest.mark.parametrize("tf32", [True, False])
def test_tf32_is_that_of_the_run(tf32):
    backends = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [x.allow_tf32 for x in backends]
    with settings(settled(tiny(Path("digits"), run={"tf32": tf32}), CPU).run):
        assert [x.allow_tf32 for x in backends] == [tf32, tf32]
    assert [x.allow_tf32 for x in backends] == before
    with pytest.raises(ValueError, match="run.amp is left open"), settings(tiny(Path("x")).run):
        pass
