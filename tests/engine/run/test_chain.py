"""Chains: networks that are trained first, used again, and early-stopped."""

import pytest
import yaml
from tiny import SECTIONS, tiny

from kdfuse.engine.recipe.load import Recipe
from kdfuse.engine.run.chain import trained
from kdfuse.engine.run.checkpoint import load
from kdfuse.engine.run.folder import create_folder
from kdfuse.engine.run.past import read_run
from kdfuse.engine.training.start import train

pytestmark = pytest.mark.slow(25)

TRAINED = ["run.epochs=4", "data.subset=64"]  # top-1 63 to 74 at best; 15 is near chance


FEW = {"subset": 7}  # one step an epoch


@pytest.fixture
def files(tmp_path, digits):
    """A teacher's recipe, an assistant's that is taught by it, and one that waits for itself."""
    data = {**SECTIONS["data"], **FEW, "root": str(digits), "scale": [0.5, 1.0]}
    base = {**SECTIONS, "data": data, "run": {**SECTIONS["run"], "epochs": 1}}

    def write(name, **more):
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**base, **more}))
        return str(path)

    teacher = write("teacher", method={"name": "ce"}, student={"name": "resnet14"})
    by_teacher = {"name": "resnet14", "trained_by": teacher, "trained_with": ["run.seed=5"]}
    assistant = write(
        "assistant", method={"name": "kd"}, student={"name": "resnet8"}, teacher=by_teacher
    )
    circle = {"name": "resnet8", "trained_by": str(tmp_path / "circle.yaml")}
    write("circle", method={"name": "kd"}, student={"name": "resnet8"}, teacher=circle)
    found = {"teacher": teacher, "assistant": assistant, "circle": circle}
    return {**found, "folder": tmp_path, "digits": digits}


def student_of(files, network, **changes):
    run = {"epochs": 1}
    return tiny(files["digits"], "kd", teacher=network, run=run, data=FEW, **changes)


def test_a_teacher_assistant_and_its_teacher_are_trained_first_and_once(files):
    recipe = student_of(files, {"name": "resnet8", "trained_by": files["assistant"]})
    runs = files["folder"] / "runs"
    run = train(recipe, runs / "student")
    folders = sorted(path.name for path in runs.iterdir())
    assert len(folders) == 3 and sum("seed5" in name for name in folders) == 1
    resolved = Recipe.load(run / "recipe.yaml")
    assert read_run(resolved.teacher.checkpoint).finished
    logs = {name: (runs / name / "log.jsonl").read_bytes() for name in folders}
    again = train(recipe, runs / "second")
    for name in folders:
        assert (runs / name / "log.jsonl").read_bytes() == logs[name], name
    newest = [load(path / "checkpoints" / "best")[0]["student"] for path in (run, again)]
    assert all((newest[0][key] == newest[1][key]).all() for key in newest[0])
    train(recipe, again, resume=True)  # what it waited for is its own recipe's, still


def test_what_a_student_lacks_is_told_before_its_teacher_is_trained(files, kd):
    by_teacher = {"name": "resnet14", "trained_by": files["teacher"]}
    runs, where = files["folder"] / "runs", files["folder"] / "student.yaml"
    for student, words in (
        (
            {"name": "resnet88"},
            "student.name: 'resnet88' is no known network; did you mean resnet8",
        ),
        ({"name": "resnet8", "checkpoint": str(runs / "no.pt")}, "no.pt: no such file or folder"),
        ({"name": f"run:{runs}"}, f"{runs} is not a run directory: it does not exist"),
    ):
        recipe = student_of(files, by_teacher, student=student)
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            train(recipe, runs / "student")
        assert not runs.exists()
    where.write_text(student_of(files, by_teacher, student={"name": "resnet88"}).explain())
    shown = kd("recipes", "show", where)
    assert shown.code == 2 and "student.name: 'resnet88' is no known network" in shown.err


def test_a_finished_teacher_is_used_whatever_it_was_trained_on(files):
    by_teacher = {"name": "resnet14", "trained_by": files["teacher"]}
    runs = files["folder"] / "runs"
    train(student_of(files, by_teacher), runs / "first")
    slow = tiny(
        files["digits"], "kd", teacher=by_teacher, data=FEW, run={"epochs": 1, "threads": 2}
    )
    log = next(runs.glob("*teacher*")) / "log.jsonl"
    before = log.read_bytes()
    train(slow, runs / "second")
    assert log.read_bytes() == before


def test_a_teacher_is_computed_as_its_student_is_and_stays_as_it_was_begun(files):
    by_teacher = {"name": "resnet14", "trained_by": files["teacher"]}
    root, runs = files["folder"] / "digits", files["folder"] / "runs"
    seen = []

    def begin(recipe, folder, resume):
        seen.append((recipe, resume))
        if not resume:
            create_folder(folder, recipe, world=1)
        return folder

    run = {"epochs": 1, "channels_last": False, "deterministic": False, "amp": "bf16"}
    first = tiny(root, "kd", teacher=by_teacher, run=run, data={"prefetch": 1})
    trained(first, runs, begin)
    trained(tiny(root, "kd", teacher=by_teacher, run={"epochs": 1}), runs, begin)
    (fresh, begun), (again, resumed) = seen
    assert (begun, resumed) == (False, True)
    for recipe in (fresh, again):
        settings = recipe.run
        assert (settings.amp, settings.channels_last, settings.deterministic) == (
            "bf16",
            False,
            False,
        )
    assert (fresh.data.prefetch, again.data.prefetch) == (1, first.data.prefetch + 1)


def test_what_a_run_keeps_is_trained_by_nobody_and_has_no_other_weights(files):
    kept = {"name": "run:somewhere", "trained_by": files["teacher"]}
    recipe = student_of(files, kept)
    with pytest.raises(FileNotFoundError, match="somewhere is not a run"):
        train(recipe, files["folder"] / "runs" / "c")
    with pytest.raises(ValueError, match="checkpoint: x.pt has no effect with name run:somewhere"):
        student_of(files, {"name": "run:somewhere", "checkpoint": "x.pt"})
    with pytest.raises(ValueError, match="slt: null stands for the teacher's network with random"):
        tiny(files["digits"], "slkd", teacher={"name": "run:somewhere"})


def test_options_that_do_not_fit_the_assistants_are_refused_before_anything_runs(files):
    for method, words in (
        ({"name": "dgkd", "drop": 2}, "method.drop: 2 leaves none of 2 guides"),
        ({"name": "slkd_sequential", "fusion": [0.5, 0.5]}, "2 weights for 1 assistants"),
    ):
        with pytest.raises(ValueError, match=words):
            tiny(files["digits"], method, assistants=[{"name": "resnet8"}])


def test_assistants_are_measured_as_the_teacher_is(files):
    recipe = tiny(
        files["digits"],
        "slkd_sequential",
        teacher={"name": "resnet14", "trained_by": files["teacher"], "trained_with": TRAINED},
        assistants=[{"name": "resnet8"}],
        run={"epochs": 1, "teacher_at_chance": "refuse"},
    )
    with pytest.raises(ValueError, match="assistants.0 resnet8: top-1 .* nothing to teach"):
        train(recipe, files["folder"] / "runs" / "d")


def test_circles_and_other_networks_are_refused(files):
    with pytest.raises(ValueError, match=r"teacher.trained_by: .*circle.yaml is a circle"):
        train(student_of(files, files["circle"]), files["folder"] / "runs" / "a")
    wrong = {"name": "resnet20", "trained_by": files["teacher"]}
    with pytest.raises(ValueError, match="trains a resnet14, and teacher is a resnet20"):
        train(student_of(files, wrong), files["folder"] / "runs" / "b")
    with pytest.raises(ValueError, match="needs trained_by"):
        student_of(files, {"name": "resnet8", "trained_with": ["run.seed=1"]})


def test_a_data_folder_of_any_name_is_handed_on(files):
    root = files["folder"] / "my #1 set: true"
    teacher = {"name": "resnet8", "trained_by": files["assistant"]}
    recipe = tiny(root, "kd", teacher=teacher, data=FEW)
    plain = {**recipe.model_dump(), "run": {**recipe.run.model_dump(), "epochs": 1}}
    run = train(Recipe.model_validate(plain), files["folder"] / "runs" / "student")
    teacher = Recipe.load(Recipe.load(run / "recipe.yaml").teacher.checkpoint / "recipe.yaml")
    assert teacher.data.root == root


def test_an_early_stop_keeps_the_schedule(files):
    recipe = tiny(
        files["digits"],
        "ce",
        data=FEW,
        run={"epochs": 4, "stop_epoch": 2},
        optim={"lr": 0.05, "schedule": "cosine"},
    )
    stopped = train(recipe, files["folder"] / "stopped")
    whole = train(
        recipe.model_copy(update={"run": recipe.run.model_copy(update={"stop_epoch": None})}),
        files["folder"] / "whole",
    )
    first, second = (read_run(path).evaluations for path in (stopped, whole))
    assert len(first) == 2 and len(second) == 4
    assert [r["top1"] for r in first] == [r["top1"] for r in second[:2]]
    assert read_run(stopped).finished


def test_a_stop_beyond_the_end_is_refused(files):
    with pytest.raises(ValueError, match="run.stop_epoch: 5 is beyond run.epochs=2"):
        tiny(files["folder"], "ce", run={"stop_epoch": 5})
