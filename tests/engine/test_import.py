"""--import: a module of one's own on the command line, in runs, resumed, by several processes."""

import json
import os
import sys
from pathlib import Path

import pytest
import yaml
from brought import restored
from processes import begin, together
from same import assert_same_run

from kdfuse.engine.cli import main as cli
from kdfuse.engine.recipe.load import Recipe, RecipeError
from kdfuse.engine.run.folder import create_folder
from kdfuse.engine.run.past import recipe_of

pytestmark = pytest.mark.slow(30)

MODULE = """
import os, signal
from pathlib import Path
from typing import Literal

import numpy as np
from torch import nn

from kdfuse.engine import register
from kdfuse.engine.data.sources.splits import in_memory
from kdfuse.engine.methods.kd import KD


class Mine(KD):
    name: Literal["mine"] = "mine"

    def loss(self, out, target, now):
        for _ in Path().glob("kill"):
            with open("kill", "r+") as file:
                left = int(file.read()) - 1
                file.seek(0)
                file.write(f"{left}\\n")
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().loss(out, target, now)


def net(num_classes):
    conv = nn.Conv2d(3, 8, 3, stride=2)
    return nn.Sequential(conv, nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(8, num_classes))


def blobs(data, split):
    target = np.arange(48 if split == "train" else 12) % 3
    drawn = np.random.default_rng(len(target)).integers(0, 60, (len(target), 8, 8, 3))
    drawn[np.arange(len(target)), :, :, target] += 120
    return in_memory(data, split, drawn.astype(np.uint8), target, ["r", "g", "b"])


register.method("mine", Mine)
register.network("net", net)
register.source("blobs", blobs)
"""
RECIPE = {
    "method": {"name": "mine"},
    "data": {"source": "blobs", "size": 8, "augment": "none", "flip": False, "eval_resize": None},
    "student": {"name": "net"},
    "teacher": {"name": "net"},
    "optim": {"lr": 0.1},
    "run": {
        "epochs": 2,
        "batch": 16,
        "device": "cpu",
        "threads": 1,
        "log_every": 1,
        "checkpoint_every": 2,
        "keep": 9,
        "teacher_at_chance": "allow",
    },
}
BROUGHT = {"own.kd": ["method mine", "network net", "source blobs"]}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The current folder: a recipe, and the package that it needs."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "kd.py").write_text(MODULE)
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(RECIPE))
    monkeypatch.chdir(tmp_path)
    with restored(empty=True):
        yield tmp_path
    sys.modules.pop("own", None)


def program(folder, *words):
    """The command line in a process of its own."""
    os.chdir(folder)
    sys.argv = ["kdfuse", *words]
    cli.main()


def imports(run):
    return json.loads((Path(run) / "environment.json").read_text())["imports"]


def without(kd, *words):
    """As by a process that imported nothing."""
    with restored(empty=True):
        return kd(*words)


def test_a_killed_run_goes_on_with_its_import_and_names_it_without(kd, folder):
    words = ["my.yaml", "--out", "killed"]
    (folder / "kill").write_text("5\n")
    (child,), said = begin(1, program, folder, "train", *words, "--import", "own.kd")
    child.join()
    assert child.exitcode == -9, said()
    (folder / "kill").unlink()
    assert imports("killed") == BROUGHT

    told = "error: killed was trained with --import own.kd; add it\n"
    for verb in (
        ["train", *words, "resume=true"],
        ["eval", "killed"],
        ["export", "killed", "x.pt"],
    ):
        done = without(kd, *verb)
        assert done.code == 2 and done.err == told, verb
    assert kd("train", *words, "resume=true", "--import", "own.kd").code == 0
    assert kd("--import=own.kd", "train", "my.yaml", "--out", "whole").code == 0
    assert_same_run(folder / "killed", folder / "whole", 6)
    done = kd("export", "killed", "student.pt", "--import", "own.kd")
    assert done.code == 0 and (folder / "student.pt").is_file(), done.err
    assert "```python\nimport own.kd\nimport torch\n" in (folder / "student.pt.md").read_text()
    assert kd("eval", "--import", "own.kd", "killed").code == 0
    assert without(kd, "report", "killed").code == 0


def test_a_set_by_two_processes_and_its_members_named_by_the_set(kd, folder):
    together(
        2, program, folder, "--import", "own.kd", "train", "my.yaml", "seeds=2", "--out", "set"
    )
    runs = sorted((folder / "set").iterdir())
    assert len(runs) == 2 and [imports(run) for run in runs] == [BROUGHT, BROUGHT]
    done = without(kd, "train", "my.yaml", "seeds=2", "--out", "set", "resume=true")
    assert done.code == 2 and done.err.startswith("error: set/my-seed")
    assert done.err.endswith(" was trained with --import own.kd; add it\n")


def test_a_cache_and_the_benchmark_of_a_step_take_it_too(kd):
    done = kd("cache", "my.yaml", "--out", "said", "--import", "own.kd")
    assert done.code == 0 and without(kd, "cache", "check", "said").code == 0, done.err
    assert (
        kd("train", "my.yaml", "teacher.cache=said", "--import", "own.kd", "--out", "a").code == 0
    )
    words = ["my.yaml", "data.classes=3", "--seconds", "0", "--peer", "none"]
    done = kd("bench", "--import", "own.kd", "step", *words)
    assert done.code == 0 and "my" in done.out, done.err


def test_a_recipe_is_shown_with_it_and_without_it_says_what_is_missing(kd):
    assert "--import" in kd("--help").out
    done = kd("recipes", "show", "my.yaml", "--import", "own.kd")
    assert done.code == 0 and "  name: mine\n" in done.out
    assert "own.kd" not in done.out  # a recipe runs no code
    done = without(kd, "recipes", "show", "my.yaml")
    assert "method.name: got the text 'mine', wants one of ce," in done.err
    assert "data.source: got the text 'blobs', wants one of folder," in done.err


def test_a_run_that_names_a_run_says_which_of_them_needs_what(folder):
    with restored():
        sys.path.insert(0, str(folder))
        __import__("own.kd")
        create_folder(folder / "inner", Recipe.load("my.yaml"), 1)
        assert recipe_of(folder / "inner").student.name == "net"
    with pytest.raises(RecipeError, match="inner was trained with --import own.kd; add it"):
        recipe_of(folder / "inner")


def test_what_a_session_registered_has_no_module_to_name(kd, folder):
    (folder / "environment.json").write_text('{"imports": {"__main__": ["network net"]}}')
    (folder / "recipe.yaml").write_text("{}")
    assert kd("eval", ".").err == (
        "error: . was trained with network net, registered in a session; register it in a module, "
        "and add --import MODULE\n"
    )


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["train", "--import", "./own/kd.py"], "./own/kd.py: wants the name of a module; give "
         "--import own.kd"),
        (["train", "--import", "../kd.py"], "../kd.py: wants the name of a module; go to the "
         "folder of kd.py and give --import kd"),
        (["train", "--import=my-kd"], "my-kd: wants the name of a module, as in --import my_"),
        (["eval", "x", "--import", "own.kdd"], "own.kdd: no module own.kdd in "),
        (["report", "--import", "nowhere.kd"], "nowhere.kd: no module nowhere in "),
        (["doctor", "--import"], " wants a module, as in --import my_package.kd"),
        (["--import", "own.kd"], "own.kd: goes with a verb, as in kdfuse train"),
        (["doctor", "--import", "broken"], "broken: KeyError: 'no' ("),
        (["doctor", "--import", "lacks"], "lacks: ModuleNotFoundError: No module named 'absent' ("),
        (["doctor", "--import", "wrong"], "wrong: SyntaxError: "),
        (["doctor", "--import", "leaves"], "leaves: SystemExit: 3 ("),
        (["doctor", "--import", "taken"], "taken: ValueError: network 'resnet8': kdfuse has its"),
    ],
)  # fmt: skip
def test_what_cannot_be_imported_says_whose_and_why(words, error, kd, folder):
    for name, text in {
        "broken": "def f():\n    raise KeyError('no')\nf()\n",
        "lacks": "import absent\n",
        "wrong": "def (\n",
        "leaves": "raise SystemExit(3)\n",
        "taken": "from kdfuse.engine import register\nregister.network('resnet8', dict)\n",
    }.items():
        (folder / f"{name}.py").write_text(text)
    done = kd(*words)
    assert done.code == 2 and done.err.startswith("error: --import")
    assert error in done.err and done.err.count("\n") == 1
    if error.endswith("("):
        assert ".py, line " in done.err
    assert without(kd, "recipes", "show", "digits/kd").code == 0  # nothing stays behind
