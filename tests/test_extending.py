"""docs/extending.md as it stands: its files in a folder, its test, its commands, its Python."""

import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from brought import restored

from kdfuse.engine.run.past import read_run

pytestmark = pytest.mark.slow(10)

PAGE = (Path(__file__).resolve().parent.parent / "docs/extending.md").read_text()
BLOCKS = re.findall(r"^([^\n]*)\n\n```(\w+)\n(.*?)^```$", PAGE, re.M | re.S)


def block(language: str, before: str = "") -> str:
    (found,) = [text for line, kind, text in BLOCKS if kind == language and before in line]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("page")
    (made / "my_kd.py").write_text(block("python", "`my_kd.py`"))
    (made / "test_my_kd.py").write_text(block("python", "`test_my_kd.py`"))
    (made / "my.yaml").write_text(block("yaml", "`my.yaml`"))
    return made


@pytest.fixture(autouse=True)
def in_the_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    with restored():
        yield


def test_the_method_is_its_formula(folder):
    sys.path.insert(0, str(folder))
    found = runpy.run_path("test_my_kd.py")
    tests = [test for name, test in found.items() if name.startswith("test_")]
    assert len(tests) == 1
    tests[0]()


def test_its_commands_and_its_python(kd, folder, monkeypatch):
    first, again, *others = [shlex.split(line)[1:] for line in block("bash").splitlines()]
    assert [words[0] for words in (first, again, *others)] == ["train", "train", "eval", "export"]
    assert (done := kd(*first)).code == 0, done.err
    run = folder / "runs/student"
    steps = sorted((run / "checkpoints").glob("step-*"))
    shutil.rmtree(steps[-1])  # as if it had been killed after the one before
    log = run / "log.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
    assert (done := kd(*again)).code == 0, done.err
    assert f"resumed from {steps[-2].name}" in done.out
    past = read_run(run)
    assert past.finished and past.last["top1"] > 60  # of four classes; 25 is chance
    assert {"look", "ce"} <= past.of_kind("step")[0].keys()
    assert past.environment["imports"] == {
        "my_kd": ["method looks", "network net", "network net_wide", "source rings"]
    }
    for words in others:
        assert (done := kd(*words)).code == 0, done.err
    program = torch.export.load("student.pt2").module()
    assert program(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape == (2, 4)

    with restored(empty=True):
        assert kd("eval", "runs/student").err == block("text")
        assert kd("report", "runs/student").code == 0
    with restored(empty=True):
        monkeypatch.syspath_prepend(folder)
        runpy.run_path(write(folder / "again.py", block("python", "so that it can be imported")))
    assert read_run(folder / "runs/seed1").environment["imports"].keys() == {"my_kd"}


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)
