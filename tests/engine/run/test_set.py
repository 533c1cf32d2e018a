"""Sets of runs: what is trained, what a failure or a resumed set does, and how it is told."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import SECTIONS

from kdfuse.engine.recipe.load import AnyRecipe, DetectionRecipe, Recipe, recipes
from kdfuse.engine.recipe.schema import RecipeError
from kdfuse.engine.run import log
from kdfuse.engine.run.past import read_run
from kdfuse.engine.run.set import default_base, expand, members, train_set

pytestmark = pytest.mark.slow(8)

ROWS: dict[str, Any] = {
    "a": {"expect": {"table": "paper/1", "row": "CE", "column": "A", "top1": 90.0, "source": "P"}},
    "b": {"optim": {"lr": 0.02}},
    "bad": {"student": {"name": "resnet8", "checkpoint": "missing.pt"}},
}


@pytest.fixture
def file(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Three recipes that train in a second, one of them broken, in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run = {**SECTIONS["run"], "epochs": 1}
    shared = json.loads(json.dumps({**SECTIONS, "run": run, "method": {"name": "ce"}}))
    shared["data"] |= {"root": str(digits), "subset": 8}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**shared, "rows": ROWS}, sort_keys=False))
    return "mine.yaml"


def top1(run: Path) -> list[float]:
    return [record["top1"] for record in read_run(run).evaluations]


def test_names_and_patterns(file: str) -> None:
    of_kd = [name for name in recipes() if name.startswith("cifar100/kd:")]
    assert expand(["cifar100/kd:*", of_kd[0], "digits/kd"]) == [*of_kd, "digits/kd"]
    assert expand([f"{file}:b*", f"./{file}:a"]) == [f"{file}:b", f"{file}:bad", f"./{file}:a"]
    for pattern in ("cifar100/kdd:*", f"{file}:c*"):
        with pytest.raises(RecipeError, match="no recipe matches"):
            expand([pattern])
    with pytest.raises(RecipeError, match="no recipe is named"):
        expand([])


def test_members_are_recipes_by_seeds(file: str) -> None:
    found = members([f"{file}:a", f"{file}:b"], ["run.seed=5", "run.batch=32"], 2)
    assert [(m.recipe.name, m.recipe.run.seed, m.folder) for m in found] == [
        ("mine:a", 5, "mine-a-seed5"), ("mine:a", 6, "mine-a-seed6"),
        ("mine:b", 5, "mine-b-seed5"), ("mine:b", 6, "mine-b-seed6"),
    ]  # fmt: skip
    assert {m.recipe.run.batch for m in found} == {32} and found[0].written.run.batch == 64
    assert default_base(found) == Path("runs/mine-set")
    assert default_base(found[:2]) == Path("runs/mine-a-set")
    both = members([f"{file}:a", "digits/ce:resnet8"], [], 1)
    assert default_base(both) == Path("runs/recipes-set")


def test_a_word_may_give_what_a_file_leaves_out(file: str) -> None:
    text = Path(file).read_text()
    assert "  lr: 0.05\n" in text
    Path(file).write_text(text.replace("  lr: 0.05\n", ""))
    [member] = members([f"{file}:a"], ["optim.lr=0.5"], 1)
    assert member.written == member.recipe
    with pytest.raises(RecipeError) as caught:
        members([f"{file}:a", f"{file}:bad"], ["run.epoch=1"], 2)
    assert [line.split(": ")[:2] for line in str(caught.value).splitlines()] == [
        [f"{file}:{row}", key] for row in ("a", "bad") for key in ("optim.lr", "run.epoch")
    ]


def test_two_runs_do_not_share_a_folder(file: str, tmp_path: Path) -> None:
    (tmp_path / "twin").mkdir()
    (tmp_path / "twin" / file).write_text(Path(file).read_text())
    with pytest.raises(RecipeError, match="mine-b-seed0: the folder of 2 runs"):
        members([f"{file}:b", f"twin/{file}:b"], [], 1)


def test_a_set_is_trained_resumed_and_told(file: str, kd, tmp_path: Path) -> None:
    code, out, err = kd("train", f"{file}:a", f"{file}:bad", f"{file}:b", "seeds=2", "--out", "set")
    assert code == 1 and "Traceback" not in err
    assert err.count("missing.pt") == 4  # when it happens and at the end, for each seed
    assert "4 of 6 runs are finished" in out
    folders = sorted(path.name for path in (tmp_path / "set").iterdir())
    assert folders == ["mine-a-seed0", "mine-a-seed1", "mine-b-seed0", "mine-b-seed1"]
    first, second = top1(Path("set/mine-a-seed0"))[-1], top1(Path("set/mine-a-seed1"))[-1]
    losses = {read_run(Path(f"set/mine-a-seed{n}")).of_kind("step")[-1]["loss"] for n in (0, 1)}
    assert len(losses) == 2  # of so few images top-1 may be the same
    mean = f"{(first + second) / 2:.2f} \u00b1 {abs(first - second) / 2**0.5:.2f}"
    table, plain = out.split("paper/1: P")[1].split("recipe ")
    assert "90.00" in table and f"last {mean}" in table and "2 seeds" in table
    assert "mine:b" in plain and "mine:a" not in plain

    # A run of a set is the run that it is alone.
    assert kd("train", f"{file}:a", "run.seed=1", "--out", "alone")[0] == 0
    assert top1(Path("alone")) == top1(Path("set/mine-a-seed1"))
    alone = Recipe.load("alone/recipe.yaml")
    assert Recipe.load("set/mine-a-seed1/recipe.yaml") == alone

    # Finished runs stay as they are, a broken-off one goes on, new ones start.
    before = {path: path.read_bytes() for path in Path("set").glob("*/log.jsonl")}
    cut = Path("set/mine-b-seed0/log.jsonl")
    lines = before.pop(cut).splitlines(keepends=True)
    assert json.loads(lines[-1])["kind"] == "end"
    cut.write_bytes(b"".join(lines[:-1]))
    words = ("train", f"{file}:a", f"{file}:b", "seeds=3", "--out", "set")
    code, out, err = kd(*words)
    assert code == 2 and "not empty" in err and "resume=true" in err
    code, out, err = kd(*words, "resume=true")
    assert code == 0, err
    assert out.count("finished before") == 3 and out.count("3 seeds") == 1
    assert "6 of 6 runs are finished" in out
    assert {path: path.read_bytes() for path in before} == before
    records = log.read(cut)
    assert records[-1]["kind"] == "end" and [r["kind"] for r in records].count("epoch") == 1

    # With other settings nothing goes on in it, nor is anything added.
    code, out, err = kd(
        "train", f"{file}:a", "seeds=4", "run.epochs=2", "--out", "set", "resume=true"
    )
    assert code == 2 and err.count("run.epochs: 1 -> 2") == 3
    assert not Path("set/mine-a-seed3").exists()


def test_default_folders_are_numbered(file: str, kd) -> None:
    assert kd("train", f"{file}:[ab]", "seeds=2")[0] == 2  # only * and ? are patterns
    assert kd("train", f"{file}:?", "run.epochs=1")[0] == 0
    assert kd("train", f"{file}:b")[0] == 0
    names = sorted(path.name for path in Path("runs").iterdir())
    assert names == ["mine-b-1", "mine-set-1"]
    assert kd("train", f"{file}:?", "resume=true")[1].count("finished before") == 2
    code, _, err = kd("train", f"{file}:b", "seeds=2", "resume=true", "--out", "runs/mine-b-1")
    assert code == 2 and "a single run, not a set" in err
    code, out, _ = kd("train", f"{file}:b", "seeds=1", "run.seed=3", "--out", "one")
    assert code == 0 and Path("one/recipe.yaml").is_file() and "one/report.html" in out


def test_a_set_that_is_started_again_goes_on(file: str, kd, monkeypatch) -> None:
    """As Slurm does; here the job's time ends after every step, and a run has one."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    words = ("train", f"{file}:a", f"{file}:b", "run.batch=80", "run.time_limit=1")
    assert kd(*words)[0] == 143 and not Path("runs/mine-set-1/mine-b-seed0").exists()
    assert kd(*words)[0] == 143 and Path("runs/mine-set-1/mine-b-seed0").exists()
    assert "2 of 2 runs are finished" in kd(*words)[1]
    assert kd(*words)[1].count("finished before") == 2
    assert [path.name for path in Path("runs").iterdir()] == ["mine-set-1"]


def test_what_was_changed_is_told_below_the_table(file: str, kd) -> None:
    code, out, _ = kd("train", f"{file}:a", "seeds=2", "run.batch=40")
    assert code == 0 and "paper/1" not in out
    assert out.count("it is not mine:a: run.batch: 64 -> 40") == 2
    assert "mine:a" in out.split("recipe ")[1]


def test_recipes_that_claim_one_cell_are_not_trained(file: str, kd) -> None:
    held = yaml.safe_load(Path(file).read_text())
    held["rows"]["b"]["expect"] = held["rows"]["a"]["expect"]
    Path(file).write_text(yaml.safe_dump(held, sort_keys=False))
    code, _, err = kd("train", f"{file}:a", f"{file}:b", "seeds=2", "--out", "set")
    assert code == 2 and "column A: claimed by mine:a and by mine:b" in err
    assert not Path("set").exists()


def test_detectors_go_with_classifiers_into_a_set(file: str, tmp_path: Path) -> None:
    runs = members(["coco/kd", f"{file}:a"], ["run.epochs=3"], 2)
    assert [member.folder for member in runs] == [
        "coco-kd-resnet101-resnet50-seed0", "coco-kd-resnet101-resnet50-seed1",
        "mine-a-seed0", "mine-a-seed1",
    ]  # fmt: skip
    trained = []

    def train(recipe: AnyRecipe, out: Path, resume: bool) -> Path:
        trained.append((type(recipe), recipe.run.epochs, recipe.run.seed, out, resume))
        return out

    assert train_set(runs, tmp_path / "set", False, train) == []
    assert trained == [
        (kind, 3, seed, tmp_path / "set" / runs[i].folder, False)
        for i, (kind, seed) in enumerate(product((DetectionRecipe, Recipe), (0, 1)))
    ]


def test_under_torchrun_a_failure_ends_the_set(file: str, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    runs = members([f"{file}:bad"], ["data.root=nowhere"], 1)
    calls = []

    def fail(recipe: AnyRecipe, out: Path, resume: bool) -> Path:
        calls.append(out)
        raise ValueError("as one process")

    with pytest.raises(ValueError, match="as one process"):
        train_set([*runs, *runs], tmp_path / "set", False, fail)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["seeds=0"], "seeds: got 0, wants a whole number above 0"),
        (["seeds=many"], "seeds: got many, wants a whole number above 0"),
        (["seeds=2", "resume=maybe"], "resume: got maybe, wants true, false or auto"),
        (["seeds=2", "resume=true"], "there is no runs/digits-ce-resnet8-set-N to go on with"),
        (["digits/c"], "did you mean digits/ce?"),
    ],
)
def test_mistakes(words: list[str], expected: str, file: str, kd) -> None:
    code, _, err = kd("train", "digits/ce:resnet8", *words)
    assert code == 2 and err.startswith("error: ") and expected in err
    assert not Path("runs").exists()
