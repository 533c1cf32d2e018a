"""A run's files, each damaged in turn: the run goes on to the same bytes, or says which one it is
and changes nothing."""

import hashlib
import shutil

import pytest
from same import assert_same, assert_same_run
from tiny import tiny

from kdfuse.engine.recipe.problems import for_users
from kdfuse.engine.run.checkpoint import load
from kdfuse.engine.run.log import read
from kdfuse.engine.training.start import train

pytestmark = pytest.mark.slow(25)

STEPS = 10


def recipe_of(root):
    run = {"batch": 16, "checkpoint_every": 3, "keep": 9}
    return tiny(root, "kd", data={"subset": 8}, optim={"lr": 0.05, "ema": 0.9}, run=run)


def cut(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 4])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def folder(path):
    path.unlink()
    path.mkdir()


DAMAGE = {
    "cut": cut,
    "flipped": flip,
    "empty": lambda path: path.write_bytes(b""),
    "no text": lambda path: path.write_bytes(b"\xff\xfe\0" * 40),
    "gone": lambda path: path.unlink(),
    "a folder": folder,
}
SAVED = ("state.pt", "facts.json", "sha256.json")
BEST = [f"checkpoints/best/{name}" for name in SAVED]
FILES = [
    *("recipe.yaml", "environment.json", "log.jsonl"),
    *BEST,
    *(f"checkpoints/step-00000006/{name}" for name in SAVED),
]


@pytest.fixture(scope="module")
def stopped(few, tmp_path_factory):
    """A run that nothing happened to, and the same as it was after its sixth step."""
    whole = train(recipe_of(few), tmp_path_factory.mktemp("whole") / "run")
    part = whole.with_name("part")
    shutil.copytree(whole, part)
    for name in ("step-00000009", "step-00000010"):
        shutil.rmtree(part / "checkpoints" / name)
    return whole, part


def state_of(run):
    return {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(run.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", FILES)
def test_it_goes_on_or_says_why_not(file, damage, stopped, few, tmp_path):
    whole, part = stopped
    run = tmp_path / "run"
    shutil.copytree(part, run)
    DAMAGE[damage](run / file)
    before = state_of(run)
    try:
        train(recipe_of(few), run, resume=True)
    except Exception as error:
        assert for_users(error) and file in str(error)
        assert state_of(run) == before
        return
    told = [record["text"] for record in read(run / "log.jsonl") if record["kind"] == "note"]
    (mine, facts), (theirs, _) = (load(r / "checkpoints/step-00000010") for r in (run, whole))
    assert_same(mine, theirs)
    if file in BEST:
        assert any(
            note.endswith("the best one is lost, and is sought anew from here on") for note in told
        )
        assert load(run / "checkpoints/best")[1]["results"]["best"] == facts["results"]["best"]
    elif file != "log.jsonl":
        assert_same_run(run, whole, STEPS)
    elif damage != "flipped":  # in a log that is another number, which nobody can know
        assert any("the log has lost its records of steps" in note for note in told)
