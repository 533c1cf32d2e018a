"""The pages: their Python runs, and their commands are there."""

import re
import shlex
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import typer
from page import blocks, ran
from processes import apart, kdfuse

from kdfuse.engine.cli.main import app
from kdfuse.engine.recipe.load import load, recipes
from kdfuse.engine.run.set import expand

pytestmark = pytest.mark.slow(150)
ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), ROOT / "docs/results/README.md"]
# What a line of a shell block may begin with beside kdfuse.
OTHERS = ("git", "pip", "python3", "python", ".", "make", "tail", "for", "srun", "head=$(scontrol")
SCRIPT = "#!/bin/bash"  # of Slurm, which no test machine has


def named(page):
    return str(page.relative_to(ROOT))


def lines(page):
    """The commands of a page's shell blocks, comments aside."""
    for block in blocks(page, "bash"):
        if not block.startswith(SCRIPT):
            joined = re.sub(r"\s*\\\n\s*", " ", block)
            stripped = (re.split(r"(?:^|\s)#", line)[0].strip() for line in joined.split("\n"))
            yield from filter(None, stripped)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_block_says_what_it_is(page):
    fences = re.findall(r"^```(.*)$", page.read_text(), re.M)
    assert set(fences[::2]) <= {"python", "bash", "text", "yaml"} and set(fences[1::2]) <= {""}
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    indented = re.findall(r"\n\n(    [^ \n-].*)", prose)
    assert not indented, "code stands between fences"


@pytest.mark.parametrize(
    "page",
    # Those of extending.md are files of their own, which tests/test_extending.py writes and runs.
    [page for page in PAGES if blocks(page, "python") and page.stem != "extending"],
    ids=named,
)
def test_python_runs(page, tmp_path):
    code, seen = apart(tmp_path, ran, page)
    assert code == 0, seen[-3000:]
    count = len(blocks(page, "python"))
    left_out = len(re.findall("is left out", seen))
    assert len(re.findall("^block .* ran$", seen, re.M)) == count - left_out
    optional = ("timm", "lightning", "transformers")
    assert left_out == sum(
        f"\nfrom {name}" in f"\n{block}" or f"\nimport {name}" in f"\n{block}"
        for block in blocks(page, "python")
        for name in optional
        if find_spec(name) is None
    )


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_commands_are_there(page):
    for line in lines(page):
        words = shlex.split(line)
        if "kdfuse" not in words:
            assert words[0] in OTHERS or words[0].startswith("KDFUSE_"), line
            if words[0] == "make":
                assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M), line
            continue
        if words[0] == "git":
            continue
        check(words[words.index("kdfuse") + 1 :], line)


def check(words, line):
    """Assert that the verb and its options are there, and that the recipes load with the words."""
    command, verb = typer.main.get_command(app), []
    known = {name for param in command.params for name in param.opts}
    while words and words[0] in getattr(command, "commands", {}):
        command, verb, words = command.commands[words[0]], [*verb, words[0]], words[1:]
    if verb == ["cache"]:  # a recipe where else a verb stands
        command = command.commands["record"]
    known |= {name for param in command.params for name in param.opts}
    if command.context_settings.get("ignore_unknown_options"):  # its own parser reads them
        known |= options_of(*verb)
    asked = {word for word in words if word.startswith("--")}
    assert asked <= known, f"{line}: no {asked - known}"
    if verb[-1] in ("train", "show", "cache", "step", "e2e", "data", "accuracy"):
        settings = [word for word in words if re.match(r"[a-z_]+(\.\w+)+=", word)]
        shipped = {name.split(":")[0] for name in recipes()}
        for name in words:
            if name.split(":")[0] in shipped:
                for one in expand([name]):
                    load(one, settings)


@cache
def options_of(*verb):
    with TemporaryDirectory() as folder:
        return set(re.findall(r"--[\w-]+", apart(Path(folder), kdfuse, *verb, "--help")[1]))


QUICK = ["run.epochs=1", "data.subset=16", "run.teacher_at_chance=allow", "run.device=cpu"]
TAUGHT = ["teacher.trained_with=[run.seed=0,run.epochs=1,data.subset=16]"]
# Words that make a command of these examples short, by its verb and a word of it.
SHORT = {
    "README.md": {"train": QUICK, "cache": [*QUICK, "teacher.checkpoint=runs/teacher"]},
    "docs/cache.md": {"train digits/slkd": [*QUICK, *TAUGHT], "cache": [*QUICK, *TAUGHT]}
    | {"train": QUICK},
    "docs/python.md": {
        "train": [
            *QUICK,
            "data.size=32",
            "teacher.trained_with=[run.seed=0,run.epochs=1,data.subset=16,data.size=32]",
        ]
    },
}
FILES = re.compile(r"`(\w+\.py)`:\n\n```python\n(.*?)^```$", re.M | re.S)
LEFT_OUT = ("torchrun", "kdfuse bench", "make", ". ")


@pytest.mark.parametrize("name", SHORT)
def test_examples_run(name, tmp_path):
    """The commands of a page one after the other, as a reader types them."""
    for file, text in FILES.findall((ROOT / name).read_text()):
        (tmp_path / file).write_text(text)
    for line in lines(ROOT / name):
        if line.startswith(LEFT_OUT):
            continue
        words = shlex.split(line)[1:]
        more = next(
            (w for start, w in SHORT[name].items() if line.startswith(f"kdfuse {start}")), []
        )
        if words[:2] in (["cache", "show"], ["cache", "check"]):
            more = []
        code, seen = apart(tmp_path, kdfuse, *words, *more)
        assert code == 0, f"{line}\n{seen[-3000:]}"
