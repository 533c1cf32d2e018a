"""The doctor names what is there, what is missing, and the cure."""

import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import kdfuse
from kdfuse.engine.cli import doctor as doctor_module
from kdfuse.engine.cli.doctor import doctor


def test_findings_name_what_is_here() -> None:
    found = {finding.what: finding for finding in doctor()}
    assert found["torch"] == ("torch", "ok", version("torch"))
    assert found["torchvision"].detail == version("torchvision")
    assert {f.state for f in found.values()} <= {"ok", "absent"}
    for name, why in kdfuse.backends().items():
        assert found[f"backend {name}"].state == ("absent" if why else "ok")
    gpu = found["GPU 0"] if torch.cuda.is_available() else found["GPU"]
    assert gpu.state == ("ok" if torch.cuda.is_available() else "absent")
    assert "usable" in found["cores"].detail


def test_absent_findings_carry_a_cure() -> None:
    words = ("install", "set ", "look at", "build", "needs", "pip", "no ")
    for finding in doctor():
        if finding.state == "absent":
            assert any(word in finding.detail for word in words), finding


def test_compilers_absent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    compiler, nvcc = doctor_module._compilers()
    assert compiler.state == nvcc.state == "absent"
    assert "install g++" in compiler.detail and "install the CUDA toolkit" in nvcc.detail


@pytest.mark.parametrize(("folder", "state"), [("optimizers", "ok"), ("views", "absent")])
def test_the_two_projects_named_apex(folder: str, state: str, apex: Path) -> None:
    (apex / folder).mkdir(parents=True)
    (apex / "__init__.py").write_text("raise ImportError('must not be imported')\n")
    [finding] = doctor_module._apex()
    assert "apex" not in sys.modules
    assert finding.state == state
    if state == "absent":
        assert "another project" in finding.detail and "pip uninstall apex" in finding.detail
        assert "optim.name=lamb takes timm's" in finding.detail


def test_missing_package_is_wrong_and_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_module, "_version", lambda *names: None)
    for finding in doctor_module._packages():
        assert finding.state == "wrong" and f"pip install {finding.what}" in finding.detail
    optional = {finding.what: finding for finding in doctor_module._optional_packages()}
    assert optional["dali"].state == "absent" and "kdfuse[dali]" in optional["dali"].detail
