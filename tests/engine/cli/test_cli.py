"""The command line: verbs do their work, and a user's mistake is one message and exit code 2."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import kdfuse
from kdfuse.engine.cli import bench as cli_bench
from kdfuse.engine.cli import data as cli_data
from kdfuse.engine.cli import main as cli
from kdfuse.engine.cli import recipes as cli_recipes
from kdfuse.engine.cli import train as cli_train
from kdfuse.engine.recipe import load as recipe_module
from kdfuse.engine.recipe.load import Recipe, recipes
from kdfuse.engine.report import tables
from kdfuse.engine.run import log
from kdfuse.engine.training.ranks import choose_device
from kdfuse.engine.training.speed import settled

pytestmark = pytest.mark.slow(15)

CE = "digits/ce:resnet8"
SMALL = [
    "run.epochs=1", "run.batch=16", "run.log_every=1", "run.device=cpu", "run.threads=1",
    "data={source: synthetic, classes: 4, size: 16, images: 32, augment: none, eval_resize: 16,"
    " loader: torchvision}",
]  # fmt: skip


@pytest.fixture(autouse=True)
def an_empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def as_program(code: str, *words: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(kdfuse.__file__).parent.parent)
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", f"from kdfuse.engine.cli.main import main\n{code}", *words]
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )


def test_help_names_the_verbs(kd) -> None:
    done = kd("--help")
    assert done.code == 0, done.err
    for verb in ("train", "watch", "eval", "report", "recipes", "data", "doctor", "bench"):
        assert re.search(rf"\b{verb}\b", done.out)


@pytest.mark.parametrize("module", [cli, cli_bench, cli_data, cli_recipes, cli_train])
def test_verbs_import_what_they_need_themselves(module) -> None:
    found = set()
    for statement in ast.parse(Path(module.__file__).read_text()).body:
        if isinstance(statement, ast.Import):
            found |= {alias.name.split(".")[0] for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom):
            root = "." * statement.level + (statement.module or "").split(".")[0]
            found |= {root + alias.name for alias in statement.names} if root == "." else {root}
    light = {"__future__", "collections", "contextlib", "os", "pathlib", "re", "rich", "sys"}
    light |= {"typer", "typing"}
    assert found <= light | {".bench", ".cache", ".data", ".recipes", ".train"}


def test_until_a_verb_runs_the_command_line_is_all_of_the_engine_that_is_loaded() -> None:
    done = as_program("import sys; print(*sorted(m for m in sys.modules if 'kdfuse.engine' in m))")
    names = [
        "",
        ".cli",
        *(f".cli.{name}" for name in ("bench", "cache", "data", "main", "recipes", "train")),
    ]
    assert done.stdout.split() == [f"kdfuse.engine{name}" for name in names], done.stderr


def test_a_mistake_in_a_program_is_one_line_and_code_2() -> None:
    done = as_program("main()", "report", "nowhere")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: nowhere is not a run directory: it does not exist\n"


def test_traceback_on_request(kd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDFUSE_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        kd("report", "nowhere")


def test_our_own_mistakes_are_not_hidden(kd, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(context: object) -> None:
        raise KeyError("a defect")

    monkeypatch.setattr(cli, "app", lambda prog_name: broken(None))
    with pytest.raises(KeyError):
        kd("doctor")


def test_version(kd) -> None:
    assert kd("--version").out == f"{kdfuse.__version__}\n"


def test_recipes_lists_every_recipe_on_its_line(kd) -> None:
    done = kd("recipes", "--all")
    assert done.code == 0
    rows = [line.split() for line in done.out.splitlines()[1:]]
    assert [row[0] for row in rows] == recipes()
    row = next(row for row in rows if row[0] == "cifar100/kd:resnet32x4-resnet8x4")
    assert row[1:] == ["resnet8x4", "resnet32x4", "73.33", *"SLKD paper, table 1".split()]


def test_recipes_are_counted_by_method_and_data_set(kd) -> None:
    done = kd("recipes")
    assert done.code == 0 and "--all" in done.out
    head, *rows = [line.split() for line in done.out.split("\n\n")[0].splitlines()]
    assert head == ["method", *sorted({name.split("/")[0] for name in recipes()})]
    of_kd = next(row for row in rows if row[0] == "wttm")
    kinds = [Recipe.load(name).method.name for name in recipes() if "/wttm" in name]
    assert sum(map(int, of_kd[1:])) == len(kinds) == kinds.count("wttm")
    assert sum(map(int, rows[-1])) == len(recipes())
    assert len(rows) < 40


def test_another_method_in_place_of_the_section(kd) -> None:
    words = ["recipes", "show", "digits/kd", "method.temperature=2", "method={name: dkd}"]
    assert "name: dkd" in kd(*words).out
    done = kd("recipes", "show", "digits/kd", "method.kd_weight=0.9", "method.name=dkd")
    assert done.code == 2 and "method='{name: dkd}'" in done.err


def test_recipes_are_filtered(kd) -> None:
    def names(*words: str) -> list[str]:
        done = kd("recipes", *words)
        assert done.code == 0, done.err
        return [line.split()[0] for line in done.out.splitlines()[1:]]

    assert names("--method", "dkd", "--data", "imagenet") == [
        name for name in recipes() if name.startswith("imagenet/dkd:")
    ]
    assert set(names("--data", "digits")) == {n for n in recipes() if n.startswith("digits/")}
    for words, error in (
        (["--method", "dk"], "--method: no recipe has dk; did you mean dkd? (there are "),
        (["--data", "cifar"], "--data: no recipe has cifar; did you mean cifar100?"),
        (["--table", "none/7"], "--table: no recipe has none/7"),
        (["--method", "kd", "table"], "--method: filters the list; leave it out before table"),
    ):
        done = kd("recipes", *words)
        assert done.code == 2 and error in done.err


def test_a_published_table_with_own_runs(kd, tmp_path: Path, monkeypatch, request) -> None:
    (tmp_path / "shipped" / "set").mkdir(parents=True)
    text = (
        "method: {name: ce}\nstudent: {name: resnet8}\noptim: {lr: 0.05}\n"
        "data: {source: synthetic, classes: 4, size: 16, images: 32, augment: none,\n"
        "       eval_resize: 16, loader: torchvision}\n"
        "run: {epochs: 1, batch: 16, device: cpu, threads: 1}\n"
        "expect: {table: paper/1, row: CE, source: 'Paper, table 1'}\n"
        "rows:\n  a: {expect: {column: A, top1: 50}}\n"
        "  b: {expect: {column: B, top1: 60}}\n  c: {expect: null}\n"
    )
    (tmp_path / "shipped" / "set" / "ce.yaml").write_text(text)
    monkeypatch.setattr(recipe_module, "SHIPPED", tmp_path / "shipped")
    tables.shipped.cache_clear()
    request.addfinalizer(tables.shipped.cache_clear)
    assert [line.split() for line in kd("recipes", "table").out.splitlines()] == [
        ["table", "cells", "source"],
        ["paper/1", "2", "Paper,", "table", "1"],
    ]
    listed = kd("recipes", "--table", "paper/1").out.splitlines()[1:]
    assert [line.split()[0] for line in listed] == ["set/ce:a", "set/ce:b"]
    empty = kd("recipes", "table", "paper/1").out
    assert "50.00" in empty and "60.00" in empty and "seed" not in empty

    assert kd("train", "set/ce:b").code == 0
    assert kd("train", "set/ce:a", "optim.lr=0.1", "--out", "elsewhere").code == 0
    done = kd("recipes", "table", "paper/1")
    assert "1 seed" in done.out and "elsewhere" not in done.out
    done = kd("recipes", "table", "paper/1", "--runs", "elsewhere")
    assert "seed" not in done.out and "it is not set/ce:a: optim.lr: 0.05 -> 0.1" in done.out
    for words, error in (
        (["paper/2"], "no table paper/2; did you mean paper/1?"),
        (["paper/1", "--runs", "nowhere"], "nowhere: no such folder"),
        (["--runs", "elsewhere"], "--runs elsewhere: say which table"),
    ):
        done = kd("recipes", "table", *words)
        assert done.code == 2 and error in done.err


def test_recipes_show_prints_what_load_reads(kd, tmp_path: Path) -> None:
    done = kd("recipes", "show", CE, "optim.lr=0.25")
    (tmp_path / "shown.yaml").write_text(done.out)
    shown = Recipe.load(tmp_path / "shown.yaml")
    assert shown == settled(Recipe.load(CE, ["optim.lr=0.25"]), choose_device("auto"))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train", "digits/k"], "did you mean digits/kd?"),
        (["train", CE, "run.epoch=1"], "run.epoch: unknown key; did you mean run.epochs?"),
        (["train", CE, "resume=maybe"], "resume: got maybe, wants true, false or auto"),
        (["train", CE, "resume=true"], "add --out DIR"),
        (["train", "none.yaml"], "recipe file none.yaml does not exist"),
        (["recipes", "show", "cifar100/kd"], "several rows"),
        (["data", "check", "nowhere"], "nowhere"),
        (["data", "check", ".", "--out", "."], "--out .: is a folder; name a file"),
        (["data", "check", ".", "--against", "no.jsonl"], "--against no.jsonl: there is no such"),
        (["train", CE, "optim.warmup_epochs=1000"], "optim.warmup_epochs: 1000.0 leaves none of"),
        (["train", CE, "optim.layer_decay=0.5"], "student is resnet8; set optim.layer_decay=null"),
        (["eval", "nowhere"], "nowhere"),
    ],
)
def test_mistakes(words: list[str], expected: str, kd, tmp_path: Path) -> None:
    done = kd(*words)
    assert done.code == 2
    assert done.err.startswith("error: ") and expected in done.err
    assert "Traceback" not in done.err and list(tmp_path.iterdir()) == []


def test_a_missing_word_is_code_2(kd) -> None:
    assert kd("train").code == 2


def test_data_digits_and_check(kd, tmp_path: Path) -> None:
    assert kd("data", "digits", "set").out == "set\n"
    told = kd("data", "check", "set").out.splitlines()
    assert told[0] == "1797 images of 10 classes: 1797 JPEG"
    assert told[1] == "width 32 to 32 pixels, median 32"
    assert told[-1] == "set: every image can be read"
    victim = sorted((tmp_path / "set" / "train").rglob("*.jpg"))[3]
    victim.write_bytes(victim.read_bytes()[:200])
    done = kd("data", "check", "set")
    assert done.code == 2
    assert victim.name in done.out and "1 unreadable images" in done.err


def test_train_resume_eval_report(kd, tmp_path: Path) -> None:
    done = kd("train", CE, *SMALL)
    assert done.code == 0, done.err
    run = tmp_path / "runs" / "digits-ce-resnet8-1"
    assert f"{run.name}/report.html" in done.out
    assert yaml.safe_load((run / "recipe.yaml").read_text())["run"]["batch"] == 16
    first = log.read(run / "log.jsonl")
    assert [r["kind"] for r in first].count("step") == 2 and first[-1]["kind"] == "end"

    assert kd("train", CE, *SMALL).code == 0
    assert (tmp_path / "runs" / "digits-ce-resnet8-2" / "report.html").is_file()

    done = kd("train", CE, *SMALL, "--out", run)
    assert done.code == 2 and "resume=true" in done.err
    assert kd("train", CE, *SMALL, "--out", run, "resume=true").code == 0

    done = kd("eval", run)
    assert done.code == 0, done.err
    last = [r for r in first if r["kind"] == "epoch"][-1]
    assert f"top1 {last['top1']:.2f}" in done.out

    done = kd("report", run, tmp_path / "runs" / "digits-ce-resnet8-2", "--out", "both.html")
    assert done.out == "both.html\n" and "digits-ce-resnet8-2" in Path("both.html").read_text()


def test_what_starts_a_command_again_goes_on_with_its_run(kd, tmp_path, monkeypatch) -> None:
    """As Slurm does; here the job's time ends after every step."""
    words = ("train", CE, *SMALL, "run.time_limit=1")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for left in ("step-00000001", "step-00000002"):
        done = kd(*words)
        assert done.code == 143 and f"goes on from {left}" in done.out
    assert kd(*words).code == 0  # both steps are done, it only had to be evaluated
    run = tmp_path / "runs" / "digits-ce-resnet8-1"
    before = (run / "log.jsonl").read_bytes()
    done = kd("report", run, "--out", "runs.jsonl", "--pictures", "all")
    assert done.code == 2 and "--pictures all: a page has them" in done.err
    assert kd("report", run, "--out", "runs.jsonl").out == "runs.jsonl\n"
    assert '"state": "finished"' in Path("runs.jsonl").read_text()
    (run / "report.html").unlink()  # as if it had been killed at the very end
    done = kd(*words)
    assert (run / "report.html").exists()
    assert done.code == 0 and "finished before, nothing is trained" in done.out
    assert f"{run.name}/report.html" in done.out and (run / "log.jsonl").read_bytes() == before
    assert [path.name for path in run.parent.iterdir()] == [run.name]

    # Another command, another job, and one that is not to go on begin others.
    assert kd("train", CE, *SMALL, "run.seed=1").code == 0
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert kd("train", CE, *SMALL).code == 0
    assert kd("train", CE, *SMALL, "resume=false").code == 0
    assert len(list(run.parent.iterdir())) == 4
    # In a folder with a name, whatever began the run; but by the same recipe.
    assert "finished before" in kd("train", CE, *SMALL, "--out", run, "run.log_every=2").out
    done = kd("train", CE, *SMALL, "--out", run, "optim.lr=0.5")
    assert done.code == 2 and "optim.lr: 0.05 -> 0.5" in done.err


def test_a_job_without_a_name_that_torchrun_started_again_needs_a_folder(kd, monkeypatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert kd("train", CE, *SMALL).code == kd("train", CE, *SMALL).code == 0
    assert len(list(Path("runs").iterdir())) == 2  # which may be another job
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    done = kd("train", CE, *SMALL)
    assert done.code == 2 and "--out DIR, or the job with torchrun --rdzv-id NAME" in done.err
    assert "finished before" in kd("train", CE, *SMALL, "--out", "runs/digits-ce-resnet8-2").out


def test_resume_needs_a_run_and_the_start_of_one_is_none(kd, tmp_path) -> None:
    run = tmp_path / "run"
    done = kd("train", CE, *SMALL, "--out", run, "resume=true")
    assert done.code == 2 and f"there is nothing in {run} to go on with" in done.err
    done = kd("train", CE, *SMALL, "seeds=2", "--out", run, "resume=true")
    assert done.code == 2 and f"there is nothing in {run} to go on with" in done.err
    run.mkdir()
    for name in ("environment.json", "recipe.yaml.tmp"):  # it was killed as early as that
        (run / name).write_text("{}")
    assert kd("train", CE, *SMALL, "--out", run).code == 0
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "1.tex").write_text("chapter 1")
    done = kd("train", CE, *SMALL, "--out", tmp_path / "thesis", "resume=auto")
    assert done.code == 2 and "not empty, and no run is in it" in done.err


def test_doctor_prints_every_finding(kd) -> None:
    done = kd("doctor")
    assert done.code == 0
    for word in ("torch", "compiled losses", "backend reference", "nvcc", "cores"):
        assert word in done.out


def test_bench_hands_its_words_on(kd) -> None:
    done = kd("bench", "losses", "--help")
    assert done.code == 0 and "usage" in done.out.lower()
