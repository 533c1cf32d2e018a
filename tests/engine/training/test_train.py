"""train() and evaluate() on small runs: what they write, what they refuse, that they repeat."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from tiny import tiny

import kdfuse.engine
from kdfuse.engine.cli.export import export
from kdfuse.engine.data.loaders import make_loader
from kdfuse.engine.data.loaders.decoding import Mode
from kdfuse.engine.data.sources import open_source
from kdfuse.engine.models import create
from kdfuse.engine.run import environment
from kdfuse.engine.run.checkpoint import load, save
from kdfuse.engine.run.log import read
from kdfuse.engine.training.build import build, deployed_by
from kdfuse.engine.training.classification import Classification, begin
from kdfuse.engine.training.evaluate import evaluate, hits, measure
from kdfuse.engine.training.inputs import pixels_of
from kdfuse.engine.training.meters import Diverged
from kdfuse.engine.training.process import settings
from kdfuse.engine.training.ranks import join
from kdfuse.engine.training.speed import settled
from kdfuse.engine.training.start import train

pytestmark = pytest.mark.slow(30)

LAST = "step-00000010"
NETWORKS = ["also", "ema", "head", "slts", "student"]


@pytest.fixture(scope="module")
def teacher(digits, tmp_path_factory):
    """A run that learned something: resnet8 on all training images."""
    run = tmp_path_factory.mktemp("runs") / "teacher"
    optim = {"lr": 0.1, "schedule": "cosine"}
    changes = {"data": {"subset": None}, "optim": optim, "run": {"epochs": 4}}
    return train(tiny(digits, "ce", **changes), run)


def last(run, kind):
    return [record for record in read(run / "log.jsonl") if record["kind"] == kind][-1]


def test_a_run_learns_and_leaves_its_files(teacher):
    names = {path.name for path in teacher.iterdir()} - {"tensorboard"}
    wanted = {"recipe.yaml", "environment.json", "log.jsonl", "report.html", "checkpoints"}
    assert names == wanted
    assert last(teacher, "epoch")["top1"] > 80  # measured: 95 to 98, see docs/testing.md
    facts = json.loads((teacher / "environment.json").read_text())
    assert facts["torch"] == torch.__version__ and facts["processes"] == 1
    again = kdfuse.engine.Recipe.load(teacher / "recipe.yaml")
    assert again.optim.lr == 0.1 and again.method.name == "ce"


def test_a_run_says_how_its_images_are_decoded(few, tmp_path, capsys):
    run = train(tiny(few, "ce", run={"epochs": 1}), tmp_path / "run")
    decode = "PIL, whole image (data.decode=auto: the run is on the CPU)"
    assert f"10 classes, loader torchvision: {decode}\n" in capsys.readouterr().out
    start = last(run, "start")
    assert (start["loader"], start["decode"]) == ("torchvision", decode)


def loader(name, mode="cpu"):
    return SimpleNamespace(name=name, mode=mode)


def test_another_way_to_decode_is_other_data_to_a_checkpoint():
    """On a CPU it is the loader's name alone, as in checkpoints of before there was a choice."""
    modes = {mode: loader("dali", mode) for mode in get_args(Mode)}
    found = {mode: pixels_of(made, made) for mode, made in modes.items()}
    assert found == {"cpu": "dali", "hybrid": "dali, decode hybrid", "gpu": "dali, decode gpu"}


def test_another_decoder_for_evaluation_is_other_data_too():
    """Not so torchvision's and resident: both show PIL's pixels, so that either is named alone."""
    for name in ("torchvision", "resident"):
        assert pixels_of(loader(name), loader("torchvision")) == name
        assert pixels_of(loader(name), loader("resident")) == name
        assert pixels_of(loader(name), loader("dali")) == f"{name}, evaluation dali"
        assert pixels_of(loader("dali"), loader(name)) == f"dali, evaluation {name}"
    found = pixels_of(loader("dali", "gpu"), loader("resident"))
    assert found == "dali, decode gpu, evaluation resident"


def test_evaluate_repeats_the_log(teacher, capsys):
    found = evaluate(teacher)
    records = [record for record in read(teacher / "log.jsonl") if record["kind"] == "epoch"]
    assert found["last"]["top1"] == records[-1]["top1"]
    assert found["last"]["top5"] == records[-1]["top5"]
    assert found["best"]["top1"] == max(record["top1"] for record in records)
    printed = capsys.readouterr().out
    assert f"last (step {found['last']['step']}): top1 {found['last']['top1']:.2f}" in printed
    assert "best (step " in printed


def test_an_unfinished_run_is_evaluated_as_far_as_it_came(teacher, tmp_path):
    run, kept = tmp_path / "run", "step-00000010"
    shutil.copytree(teacher, run)
    for path in (run / "checkpoints").iterdir():
        shutil.rmtree(path)
    with pytest.raises(RuntimeError, match="no checkpoint yet"):
        evaluate(run)
    state, facts = load(teacher / "checkpoints" / "best")
    save(run / "checkpoints", kept, state, facts | {"step": 10, "results": {}})
    assert list(evaluate(run)) == ["last"]
    with pytest.raises(FileNotFoundError, match="no recipe.yaml"):
        evaluate(tmp_path)


def test_a_method_with_a_teacher_reports_every_network(digits, teacher, tmp_path):
    copy = tmp_path / "teacher"
    shutil.copytree(teacher / "checkpoints" / "best", copy)
    given = {"name": "resnet8", "checkpoint": copy}
    changes = {"optim": {"ema": 0.9}, "run": {"teacher_at_chance": "refuse"}}
    run = train(tiny(digits, "slkd", teacher=given, **changes), tmp_path / "run")
    best = evaluate(teacher)["best"]
    assert read(run / "log.jsonl")[0]["teacher_top1"] == pytest.approx(
        best["top1"], abs=0.6
    )  # folded
    record = last(run, "epoch")
    for name in ("", "slt0_", "slt1_", "ema_"):
        assert 0 < record[f"{name}top1"] <= record[f"{name}top5"] <= 100
    assert record["lr"] == 0.05 and record["train_loss"] > 0
    state, facts = load(run / "checkpoints" / LAST)
    assert sorted(state["optimizers"]) == ["slt0", "slt1", "student"]
    assert len(state["slts"]) == 2 and facts["step"] == 10
    assert not any("teacher" in key for key in state)
    shutil.rmtree(copy)  # a run is evaluated from its own checkpoints alone
    again = evaluate(run)["last"]
    for name in ("top1", "slt0_top1", "slt1_top1", "ema_top1"):
        assert again[name] == record[name]


@pytest.mark.parametrize("name", ["kd", "dkd", "nkd", "tf_nkd", "uskd"])
def test_every_method_trains(digits, teacher, name, tmp_path):
    given = {"teacher": {"name": "resnet8", "checkpoint": teacher}}
    needed = given if name in ("kd", "dkd", "nkd") else {}
    method = {"name": "dkd", "beta": 2.0, "warmup": 2} if name == "dkd" else name
    run = {"epochs": 5, "eval_every": 5}
    run = train(tiny(digits, method, run=run, **needed), tmp_path / "run")
    # Chance is 10; measured: 54 to 84. Validation is no measure yet: 25 steps are too few for the
    # running means of batch normalisation.
    assert last(run, "epoch")["train_top1"] > 35
    assert not any("weak" in key for key in load(run / "checkpoints" / "best")[0]["student"])


def test_the_same_seed_gives_the_same_bytes(few, tmp_path):
    def weights(name, seed):
        run = train(tiny(few, "slkd", run={"seed": seed, "epochs": 1}), tmp_path / name)
        return load(run / "checkpoints" / "step-00000005")[0]["student"]

    one, same, other = weights("a", 1), weights("b", 1), weights("c", 2)
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not torch.equal(one["conv1.weight"], other["conv1.weight"])


def test_checkpoints_and_records_come_when_they_are_due(few, tmp_path):
    run = {"epochs": 3, "eval_every": 2, "checkpoint_every": 4, "keep": 9, "log_every": 3}
    folder = train(tiny(few, "ce", run=run), tmp_path / "run")
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["best", "step-00000004", "step-00000008", "step-00000012", "step-00000015"]
    records = read(folder / "log.jsonl")
    assert [r["step"] for r in records if r["kind"] == "step"] == [3, 5, 6, 9, 10, 12, 15]
    evaluated = {r["epoch"]: "top1" in r for r in records if r["kind"] == "epoch"}
    assert evaluated == {1.0: False, 2.0: True, 3.0: True}


@pytest.mark.parametrize("top1", [(40.0, 60.0), (60.0, 40.0)], ids=["rises", "falls"])
def test_the_best_is_a_steps_checkpoint_or_networks_alone(top1, few, tmp_path, monkeypatch):
    """Readers take both. After the first epoch no checkpoint is due, at the end one is."""
    scores = iter(top1)
    monkeypatch.setattr(Classification, "evaluate", lambda task: {"top1": next(scores)})
    run = {"checkpoint_every": 4, "keep": 1}
    folder = train(tiny(few, "fitnet", run=run), tmp_path / "run")  # whose head is not kept
    monkeypatch.undo()
    best, facts = load(folder / "checkpoints" / "best")
    step = folder / "checkpoints" / LAST / "state.pt"
    if top1[1] > top1[0]:
        assert facts["step"] == 10 and "optimizers" in best and best["head"] is not None
        assert step.samefile(folder / "checkpoints" / "best" / "state.pt")
    else:
        assert facts["step"] == 5 and sorted(best) == NETWORKS and best["head"] is None
    assert evaluate(folder)["best"]["step"] == facts["step"]
    exported = create("resnet8", 10, export(folder, tmp_path / "student.pt"))
    for student in (exported, create("resnet8", 10, folder), deployed_by(folder, 10)[0]):
        for key, value in student.state_dict().items():
            assert torch.equal(value, best["student"][key]), key


def test_an_existing_folder_is_left_alone(few, tmp_path):
    (tmp_path / "thesis.tex").write_text("chapter 1")
    with pytest.raises(ValueError, match="not empty, and no run is in it; choose another"):
        train(tiny(few, "ce"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("checkpoint", [None, "other normalisation"])
def test_a_teacher_at_chance_is_refused(digits, teacher, checkpoint, tmp_path):
    given = {"name": "resnet8"}
    if checkpoint is not None:  # the usual mistake: right weights, wrong inputs
        wrong = {"mean": (9.0, 9.0, 9.0), "std": (0.01, 0.01, 0.01)}
        given |= {"checkpoint": teacher, "normalize": wrong}
    recipe = tiny(digits, "kd", teacher=given, run={"teacher_at_chance": "refuse"})
    with pytest.raises(ValueError, match="chance is 10.00, so it has nothing to teach"):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_missing_teacher_file_is_named(few, tmp_path):
    given = {"name": "resnet8", "checkpoint": tmp_path / "nowhere.pt"}
    with pytest.raises(FileNotFoundError, match="nowhere.pt"):
        train(tiny(few, "kd", teacher=given), tmp_path / "run")


def test_divergence_stops_the_run_and_names_the_step(few, tmp_path):
    optim = {"lr": 1e30, "skip_limit": 0}
    recipe = tiny(few, "ce", optim=optim, run={"log_every": 4})
    with pytest.raises(Diverged, match=r"the loss of step 2 is not finite \(rank 0: loss, ce\)"):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_divergence_leaves_the_best_checkpoint(few, tmp_path):
    recipe = tiny(few, "ce", optim={"skip_limit": 0})
    run = train(recipe, tmp_path / "run")
    checkpoints = run / "checkpoints"
    before = {path.name: path.read_bytes() for path in (checkpoints / "best").iterdir()}
    state, facts = load(checkpoints / "step-00000005")
    state["student"]["fc.bias"][3] = torch.nan
    save(checkpoints, "step-00000005", state, facts)
    with pytest.raises(Diverged, match="the loss of step 6 is not finite"):
        train(recipe, run, resume=True)
    assert {path.name: path.read_bytes() for path in (checkpoints / "best").iterdir()} == before
    assert [path.name for path in checkpoints.glob("step-*")] == ["step-00000005"]


def test_weights_that_are_not_finite_are_not_saved(few, tmp_path):
    group = join("cpu")
    distiller, state = begin(tiny(few, "ce"), group, 10, torch.arange(8), {})
    state.done = 7
    distiller.main.student.layer2[0].conv1.weight.data[3] = torch.nan
    with pytest.raises(Diverged, match="the weights after step 7 are not finite"):
        state.save(tmp_path, "step-00000007")
    assert not list(tmp_path.iterdir())


def test_networks_that_are_not_finite_are_not_evaluated(few, teacher):
    recipe = tiny(few, "ce")
    group = join("cpu")
    manifest = open_source(recipe.data, "val")
    distiller = build(recipe, 10, group.device)
    distiller.main.student.fc.bias.data[3] = torch.inf
    loader = make_loader(manifest, recipe.data, 100, seed=0, train=False)
    rows = len(manifest.target)
    with pytest.raises(Diverged, match=f"student: the outputs for {rows} of {rows} images"):
        measure(distiller, loader.epoch(0), group)


def test_cuda_is_refused_without_cuda(few, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="run.device = 'cuda'"):
        train(tiny(few, "ce", run={"device": "cuda"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_settings_of_the_process_are_given_back(few):
    recipe = settled(tiny(few, "ce", run={"threads": 1, "speed": "exact"}), torch.device("cpu"))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with settings(recipe.run):
            assert torch.get_num_threads() == 1
            assert torch.are_deterministic_algorithms_enabled()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_commit_is_that_of_the_sources():
    folder = Path(environment.__file__).resolve().parent
    words = ["git", "-C", str(folder), "ls-files", "--error-unmatch", "environment.py"]
    tracked = subprocess.run(words, capture_output=True).returncode == 0
    found = environment.commit(folder)
    assert bool(found and re.match("[0-9a-f]{40}", found)) is tracked


def test_no_commit_outside_a_repository(tmp_path):
    assert environment.commit(tmp_path) is None


def test_hits_give_ties_and_nans_no_credit():
    logits = torch.tensor(
        [[3.0, 1, 2, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0], [torch.nan] * 7]
    )
    target = torch.tensor([2, 0, 6, 0])
    assert hits(logits, target).tolist() == [1.0, 2.0, 4.0, 1.0]


def test_a_resumed_run_is_the_checkpoints_recipe_whatever_its_folder_says(few, tmp_path):
    run = train(tiny(few, "ce"), tmp_path / "run")
    (run / "recipe.yaml").unlink()
    changed = tiny(few, "ce", optim={"lr": 0.05, "schedule": "constant", "weight_decay": 0.5})
    with pytest.raises(ValueError, match="by another recipe.*\n.*weight_decay: 0.0005 -> 0.5"):
        train(changed, run, resume=True)


def test_a_finished_run_without_checkpoints_is_not_trained_again(few, tmp_path):
    run = train(tiny(few, "ce"), tmp_path / "run")
    log = (run / "log.jsonl").read_bytes()
    shutil.rmtree(run / "checkpoints" / "best")
    assert set(evaluate(run)) == {"last"}
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ValueError, match="it is finished and its checkpoints are gone"):
        train(tiny(few, "ce"), run, resume=True)
    assert (run / "log.jsonl").read_bytes() == log
