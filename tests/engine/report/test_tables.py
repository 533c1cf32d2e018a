"""Published tables: made from recipes, filled from runs; what does not count is named."""

import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import yaml
from rich.console import Console
from tiny import SECTIONS

from kdfuse.engine.recipe.load import Recipe, recipes
from kdfuse.engine.recipe.schema import Cell, Expect, RecipeError
from kdfuse.engine.report import tables
from kdfuse.engine.run.folder import changes, plain
from kdfuse.engine.run.past import below

ROWS: dict[str, dict[str, Any]] = {
    "r8": {"expect": {"column": "R56->R8", "top1": 60.17, "which": "best"}},
    "r8-r20": {
        "student": {"name": "resnet20"},
        "expect": {
            "column": "R56->R20",
            "top1": 70.66,
            "spread": 0.2,
            "also_in": [
                {"table": "other/2", "row": "[KD]", "column": "x", "top1": 71.0, "source": "Other"}
            ],
        },
    },
    "none": {"expect": None},
}


@pytest.fixture
def written(tmp_path: Path) -> dict[str, Recipe]:
    """Recipes of two tables, as a file of one's own."""
    data = json.loads(json.dumps({**SECTIONS["data"], "root": str(tmp_path / "digits")}))
    shared = {
        "method": {"name": "ce"},
        **SECTIONS,
        "data": data,
        "expect": {"table": "paper/1", "row": "KD", "source": "Paper, table 1"},
    }
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**shared, "rows": ROWS}, sort_keys=False))
    return {row: Recipe.load(f"{path}:{row}") for row in ROWS}


def run(
    folder: Path,
    recipe: Recipe,
    words: dict[str, Any],
    scores: list[float],
    end: bool = True,
    key: str = "top1",
) -> None:
    """A run's folder as train leaves it, with these scores."""
    folder.mkdir(parents=True)
    changed = recipe.model_copy(update={"run": recipe.run.model_copy(update=words)})
    (folder / "recipe.yaml").write_text(changed.explain())
    records = [{"kind": "start", "step": 0, "epoch": 0, "steps": 5 * len(scores)}]
    records += [
        {"kind": "epoch", "step": 5 * n, "epoch": float(n), key: value}
        for n, value in enumerate(scores, 1)
    ]
    records += [{"kind": "end", "step": 5 * len(scores), "epoch": len(scores)}] if end else []
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def drawn(table: tables.Table) -> str:
    console = Console(width=200)
    with console.capture() as seen:
        console.print(tables.render(table))
    return seen.get()


def test_a_table_is_what_the_recipes_say(written: dict[str, Recipe]) -> None:
    found = tables.published(written.values())
    assert list(found) == ["paper/1", "other/2"]
    paper = found["paper/1"]
    assert (paper.rows, paper.columns) == (["KD"], ["R56->R8", "R56->R20"])
    assert paper.sources == ["Paper, table 1"]
    entry = paper.entries["KD", "R56->R20"]
    assert (entry.cell.top1, entry.cell.spread, entry.cell.which) == (70.66, 0.2, "unknown")
    assert entry.recipe is written["r8-r20"] and entry.runs.runs == []
    assert found["other/2"].entries["[KD]", "x"].cell.top1 == 71.0
    text = drawn(paper)
    assert "60.17 best" in text and "70.66 \u00b1 0.20" in text and "seed" not in text
    assert "[KD]" in drawn(found["other/2"])  # a name is not markup


def test_one_cell_is_one_recipe(written: dict[str, Recipe]) -> None:
    twin = written["r8"].model_copy(update={"name": "twin"})
    with pytest.raises(ValueError, match="column R56->R8: claimed by mine:r8 and by twin"):
        tables.published([*written.values(), twin])


def test_runs_count_by_seed_where_nothing_else_was_changed(
    written: dict[str, Recipe], tmp_path: Path
) -> None:
    folder, recipe = tmp_path / "runs", written["r8"]
    run(folder / "a", recipe, {"seed": 0}, [50.0, 61.0, 60.0])
    run(folder / "set" / "b", recipe, {"seed": 1, "log_every": 7, "threads": 2}, [62.5, 62.0])
    run(folder / "c", recipe, {"seed": 1}, [1.0])
    run(folder / "d", recipe, {"seed": 2, "epochs": 9}, [2.0])
    run(folder / "e", recipe, {"seed": 3}, [3.0], end=False)
    run(folder / "f", written["none"], {}, [4.0])
    (folder / "g").mkdir()
    (folder / "g" / "recipe.yaml").write_text("name: mine:r8\nmethod: {name: of-another-age}\n")
    runs = below(folder)
    found = tables.with_runs(tables.published(written.values())["paper/1"], runs)

    group = found.entries["KD", "R56->R8"].runs
    assert {r.folder for r in group.runs} == {"a", "c"}
    last, best = group.scores("last"), group.scores("best")
    assert (sorted(last), sorted(best)) == ([1.0, 60.0], [1.0, 61.0])
    assert found.entries["KD", "R56->R20"].runs.runs == [] and found.count == 2
    text = drawn(found)
    assert f"last {mean(last):.2f} \u00b1 {stdev(last):.2f}" in text
    assert f"best {mean(best):.2f} \u00b1 {stdev(best):.2f}" in text and "2 seeds" in text

    notes = {note.split(" ")[0]: note for note in found.notes}
    assert set(notes) == {str(folder / name) for name in ("d", "e", "g", "set/b")}
    assert notes[str(folder / "d")].endswith("it is not mine:r8: run.epochs: 2 -> 9")
    assert notes[str(folder / "e")].endswith("does not count: unfinished, step 5 of 5")
    assert "of-another-age" in notes[str(folder / "g")]
    assert notes[str(folder / "set" / "b")].endswith(f"seed 1 is {folder / 'c'}")


def test_a_run_from_trained_weights_does_not_count(
    written: dict[str, Recipe], tmp_path: Path
) -> None:
    recipe = written["r8"]
    student = recipe.student.model_copy(update={"checkpoint": Path("trained.pt")})
    begun = recipe.model_copy(update={"student": student})
    run(tmp_path / "a", begun, {}, [99.0])
    group, notes = tables.counted(recipe, below(tmp_path))
    assert group.runs == [] and "student.checkpoint: None -> trained.pt" in notes[0]


def test_a_summary_is_the_tables_that_have_runs_and_the_rest(
    written: dict[str, Recipe], tmp_path: Path
) -> None:
    folder = tmp_path / "runs"
    run(folder / "a", written["r8"], {"seed": 4}, [60.0])
    run(folder / "b", written["none"], {"seed": 0}, [30.0])
    run(folder / "c", written["none"], {"seed": 1}, [40.0])
    run(folder / "d", written["r8-r20"], {"batch": 32}, [55.0])
    parts, notes = tables.summary(written.values(), below(folder))
    console = Console(width=200)
    with console.capture() as seen:
        console.print(*parts, sep="\n")
    text = seen.get()
    assert len(parts) == 2 and "other/2" not in text
    assert "last 60.00" in text and "1 seed" in text
    rest = {line.split()[0]: line.split()[1:] for line in text.splitlines() if "mine:" in line}
    assert rest == {
        "mine:none": ["2", "35.00", "\u00b1", "7.07", "35.00", "\u00b1", "7.07"],
        "mine:r8-r20": ["1", "55.00", "55.00", "70.66"],
    }
    assert notes == [f"{folder / 'd'} does not count, it is not mine:r8-r20: run.batch: 64 -> 32"]


def test_in_a_summary_an_ap_says_that_it_is_one(written: dict[str, Recipe], tmp_path: Path) -> None:
    nkd = Recipe.load("coco/nkd")
    folder = tmp_path / "runs"
    run(folder / "a", nkd, {"seed": 0}, [30.0, 29.0], key="ap")
    run(folder / "b", nkd, {"seed": 1}, [40.0], key="ap")
    run(folder / "c", nkd, {"epochs": 11}, [50.0], key="ap")
    run(folder / "d", written["none"], {}, [30.0])
    [part], notes = tables.summary([nkd, written["none"]], below(folder))
    console = Console(width=200)
    with console.capture() as seen:
        console.print(part)
    rows = [line.split() for line in seen.get().splitlines()[1:]]
    assert rows == [
        [nkd.name, "2", *"AP 34.50 \u00b1 7.78 AP 35.00 \u00b1 7.07 AP 38.70".split()],
        [nkd.name, "1", *"AP 50.00 AP 50.00 AP 38.70".split()],
        ["mine:none", "1", "30.00", "30.00"],
    ]
    assert notes == [f"{folder / 'c'} does not count, it is not {nkd.name}: run.epochs: 12 -> 11"]


def test_names_of_tables_and_folders() -> None:
    with pytest.raises(ValueError, match="no table no/such"):
        tables.table("no/such")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        below(Path("nowhere"))


def test_every_shipped_cell_is_in_its_table() -> None:
    shipped = tables.shipped()
    assert [recipe.name for recipe in shipped] == recipes()
    cells = [cell for recipe in shipped if recipe.expect for cell in recipe.expect.cells]
    published = tables.published(shipped)
    found = [entry.cell for table in published.values() for entry in table.entries.values()]
    assert sorted(map(repr, found)) == sorted(map(repr, cells))
    assert tables.tables() == list(published)
    for name in list(published)[:2]:
        assert tables.table(name).entries.keys() == published[name].entries.keys()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"top1": 7.0, "table": "a/1", "row": "KD"}, "go together, got only"),
        ({"table": "a/1", "row": "KD", "column": "x"}, "expect.top1: missing"),
        ({"spread": 0.1}, "expect.top1: missing"),
        ({"top1": 101}, "less than or equal to 100"),
        ({"top1": 7.0, "which": "first"}, "best"),
    ],
)
def test_expectations_that_cannot_be_meant(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Expect(source="here", **settings)


def test_a_cell_stands_once_and_survives_the_recipe_of_a_run(
    written: dict[str, Recipe], tmp_path: Path
) -> None:
    cell = {"table": "a/1", "row": "KD", "column": "x", "top1": 7.0, "source": "here"}
    with pytest.raises(ValueError, match="stands twice"):
        Expect(**cell, also_in=[cell])
    assert Expect(**cell, also_in=[{**cell, "table": "b"}]).cells == (
        Cell(**cell),
        Cell(**{**cell, "table": "b"}),
    )
    resolved = tmp_path / "recipe.yaml"
    resolved.write_text(written["r8-r20"].explain())
    again = Recipe.load(resolved)
    assert again == written["r8-r20"]
    # A run may be resumed after its recipe's published number was corrected, or left out.
    for expect in (None, Expect(**{**cell, "source": "there"})):
        assert changes(plain(again), plain(again.model_copy(update={"expect": expect}))) == []


def test_a_mistake_in_a_recipe_is_named(tmp_path: Path, written: dict[str, Recipe]) -> None:
    with pytest.raises(RecipeError, match=r"^expect\.colum: unknown key; did you mean"):
        Recipe.load(f"{tmp_path / 'mine.yaml'}:r8", ["expect.colum=x"])
