"""Features of a teacher that were recorded: methods learn from them what they learn from it."""

from contextlib import closing

import pytest
import torch
from tiny import tiny

from kdfuse.engine.cache.forms import Form
from kdfuse.engine.cache.header import read
from kdfuse.engine.cache.replay import Recorded
from kdfuse.engine.cache.shards import CacheError
from kdfuse.engine.cli.cache import show
from kdfuse.engine.cli.export import export
from kdfuse.engine.models import create
from kdfuse.engine.recipe.load import Recipe
from kdfuse.engine.run.checkpoint import load
from kdfuse.engine.run.past import read_run
from kdfuse.engine.training.classification import Classification
from kdfuse.engine.training.evaluate import evaluate
from kdfuse.engine.training.ranks import join
from kdfuse.engine.training.recording import record
from kdfuse.engine.training.start import train

pytestmark = pytest.mark.slow(25)

SIMKD = ["pool:in"]
STAGES = ["stage1", "stage2", "stage3"]
EXACT = {"number": "float32", "tap_number": "float32"}


def recipe_of(root, method, taps, **changes):
    weights = root.parent / "tapped-teacher.pth"
    if not weights.exists():
        torch.manual_seed(1)
        torch.save(create("resnet14", 10).state_dict(), weights)
    teacher = {"name": "resnet14", "checkpoint": weights}
    run = {"speed": "exact", "batch": 32, **changes.pop("run", {})}
    exact = EXACT if taps else {"number": "float32"}
    data = {"subset": 16, **changes.pop("data", {})}
    cache = exact | {"taps": taps} | changes.pop("cache", {})
    return tiny(root, method, teacher=teacher, cache=cache, data=data, run=run, **changes)


def from_cache(recipe, folder, **teacher):
    plain = recipe.model_dump()
    kept = recipe.method.takes_taps == "layers"
    plain["teacher"] |= {"cache": folder} | ({} if kept else {"checkpoint": None}) | teacher
    return Recipe.model_validate(plain)


def state_of(run):
    (newest,) = (run / "checkpoints").glob(f"step-{read_run(run).records[-1]['step']:08d}")
    return load(newest)


@pytest.mark.parametrize("layout", [True, False], ids=["channels last", "channels first"])
@pytest.mark.parametrize(
    "method, taps",
    [
        ("simkd", SIMKD),
        ({"name": "simkd", "projectors": "all", "only_right": True}, ["stage1", "stage2", *SIMKD]),
        ("fitnet", None),
        ("at", None),
        ("rkd", None),
        ({"name": "ofd", "teacher_batchnorm": "eval"}, None),
        ({"name": "reviewkd", "kd_weight": 0.5}, None),
        ("crd", None),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_student_ends_with_the_bytes_of_the_live_teachers(few, tmp_path, method, taps, layout):
    if not layout and method not in ("simkd", "at"):
        pytest.skip("the layout is no matter of the method")
    run = {"channels_last": layout}
    plain = recipe_of(few, method, taps or STAGES, data={"flip": True}, run=run)
    if taps is None:
        with closing(Classification(plain, join("cpu"))) as live:
            taps = list(live.networks.main.reads["teacher"])
        plain = recipe_of(few, method, taps, data={"flip": True}, run=run)
    record(plain, tmp_path / "cache")
    live = state_of(train(plain, tmp_path / "live"))
    told = state_of(train(from_cache(plain, tmp_path / "cache"), tmp_path / "told"))
    assert live[1]["results"] == told[1]["results"]
    for part in ("student", "head", "optimizers"):
        torch.testing.assert_close(live[0][part], told[0][part], rtol=0, atol=0)


@pytest.fixture(scope="module")
def simkd(few, tmp_path_factory):
    """A recipe of SimKD, and the folder with its cache `c` of float16."""
    folder = tmp_path_factory.mktemp("taps")
    recipe = recipe_of(few, "simkd", SIMKD, cache={"tap_number": "float16"})
    record(recipe, folder / "c")
    return recipe, folder


def test_rows_hold_the_features_to_float16(simkd):
    recipe, folder = simkd
    header = read(folder / "c")
    assert header.form.taps == (("pool:in", (64, 4, 4)),)
    assert header.form.row.itemsize == 4 * 10 + 2 * 64 * 4 * 4
    with closing(Classification(recipe, join("cpu"))) as live:
        batch = next(iter(live.epoch(0, 0)))
        out = live.networks.outputs(batch.images, batch.target, batch.index)["main"]
    logits, feature = Recorded(folder / "c").at(0, 0, range(32))
    assert torch.equal(logits, out.teacher)
    assert torch.equal(feature, out.teacher_taps["pool:in"].half())


def test_show_names_the_features(simkd, capsys):
    show(simkd[1] / "c")
    assert "features        pool:in 64 x 4 x 4, float16" in capsys.readouterr().out


def test_what_it_deploys_needs_neither_teacher_nor_cache(simkd):
    recipe, folder = simkd
    told = from_cache(recipe, folder / "c")
    run = train(told, folder / "run")
    (folder / "c").rename(folder / "away")
    try:
        assert evaluate(run)["best"]["top1"] == read_run(run).best["top1"]
        export(run, folder / "student.pt2")
    finally:
        (folder / "away").rename(folder / "c")


def test_the_weights_are_those_that_were_recorded(simkd, tmp_path):
    recipe, folder = simkd
    torch.save(create("resnet14", 10).state_dict(), tmp_path / "other.pth")
    other = from_cache(recipe, folder / "c", checkpoint=tmp_path / "other.pth")
    with pytest.raises(CacheError, match=r"teacher\.checkpoint: not the weights of .*c \("):
        train(other, tmp_path / "run")


def test_features_that_are_missing_are_named(simkd, few, tmp_path):
    _, folder = simkd
    lacking = from_cache(recipe_of(few, "fitnet", ()), folder / "c")
    message = (
        r"fitnet reads stage2 of its teacher, and the cache holds pool:in; .*\[pool:in,stage2\]"
    )
    with pytest.raises(ValueError, match=message):
        train(lacking, tmp_path / "run")


@pytest.mark.parametrize(
    "method, given, cache, message",
    [
        ("simkd", {"checkpoint": None}, {}, "simkd builds on layers .*; give teacher.checkpoint"),
        ({"name": "ofd"}, {}, {}, "method ofd needs more of its teacher than what can be recorded"),
        ("kd", {}, {"taps": ["a", "a"]}, "cache.taps: a point stands twice"),
        ("kd", {}, {"taps": ["a"], "form": "top_k"}, "cache.taps: .* set cache.form=full"),
        (
            "kd",
            {},
            {"tap_number": "float32"},
            "cache.tap_number: .* has no effect with no cache.taps",
        ),
        ("kd", {"checkpoint": "x.pth"}, {}, "teacher.checkpoint: x.pth has no effect with teacher"),
    ],
    ids=str,
)
def test_recipes_that_do_not_fit_are_refused(few, method, given, cache, message):
    teacher = {"name": "resnet14", "cache": "c", **given}
    with pytest.raises(ValueError, match=message):
        tiny(few, method, teacher=teacher, cache=cache)


def test_a_point_that_is_not_there_is_named(few, tmp_path):
    with pytest.raises(ValueError, match="tap 'stage9': no such point"):
        record(recipe_of(few, "kd", ["stage9"]), tmp_path / "c")


def test_float16_is_not_left():
    form = Form("full", 3, None, taps=(("a", (2,)),))
    logits, key = torch.zeros(1, 3), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="tap_number: float16 does not hold a feature of 7"):
        form.encode(logits, key, key, [torch.tensor([[0.0, 7e4]])])
    with pytest.raises(ValueError, match="features at a are not finite"):
        form.encode(logits, key, key, [torch.tensor([[0.0, torch.nan]])])
