"""Recipes: every shipped one loads, words override, and what is wrong is said in full."""

from pathlib import Path

import pytest

from kdfuse.engine.methods import METHODS
from kdfuse.engine.recipe import yamlfile
from kdfuse.engine.recipe.data import Data, RandAugment
from kdfuse.engine.recipe.load import Recipe, recipes
from kdfuse.engine.recipe.optim import Optim
from kdfuse.engine.recipe.schema import RecipeError

KD = "digits/kd:resnet20-resnet8"


def problems_of(*args: object) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        Recipe.load(*args)  # type: ignore[arg-type]
    return str(caught.value).splitlines()


@pytest.mark.parametrize("name", recipes())
def test_shipped_recipe_loads_and_its_explanation_loads_again(name: str, tmp_path: Path) -> None:
    recipe = Recipe.load(name)
    assert recipe.name == name
    assert recipe.description
    resolved = tmp_path / "recipe.yaml"
    resolved.write_text(recipe.explain())
    assert Recipe.load(resolved) == recipe


def test_all_data_sets_have_recipes() -> None:
    files = {name.split(":")[0] for name in recipes()}
    digits = {f.removeprefix("digits/") for f in files if f.startswith("digits/")}
    assert digits == METHODS.keys() | {"together"}
    for data, more, less in (
        (
            "cifar100",
            {"slts", "takd"},
            {"mse", "tf_nkd", "jointrd_joint", "jointrd_ta_released"},
        ),
        (
            "imagenet",
            set(),
            {"dgkd", "dml", "fitnet", "kdsvd", "mse", "nst", "pkt", "rkd", "slkd_sequential", "sp",
             "vid", "jointrd_joint", "jointrd_ta_released"},
        ),
    ):  # fmt: skip
        written = {f.split("/")[1] for f in files if f.startswith(f"{data}/")}
        assert written == METHODS.keys() - less | more


def test_published_settings() -> None:
    dkd = Recipe.load("cifar100/dkd:resnet56-resnet20")
    assert dkd.method.model_dump() == {
        "name": "dkd", "temperature": 4, "alpha": 1, "beta": 2, "ce_weight": 1, "warmup": 20,
        "standardise": False,
    }  # fmt: skip
    assert dkd.run.batch == 64 and dkd.run.epochs == 240
    assert dkd.optim.lr == 0.05 and dkd.optim.weight_decay == 5e-4 and not dkd.optim.nesterov
    assert dkd.optim.milestones == (150, 180, 210)
    assert dkd.expect is not None and dkd.expect.top1 == 71.97
    kd = Recipe.load("imagenet/kd:resnet34-resnet18-batch256")
    assert (kd.optim.lr, kd.run.batch, kd.run.epochs) == (0.1, 256, 100)
    assert kd.student.name == "torchvision:resnet18" and kd.optim.milestones == (30, 60, 90)
    for row in ("nkd:deit3_small-deit_tiny", "nkd:deit3_large-deit_base", "uskd:deit_tiny"):
        deit = Recipe.load(f"imagenet/{row}").data
        assert deit.randaugment == RandAugment(magnitude=9, std=0.5, ops=2)
        assert (deit.erase, deit.repeats, deit.mixup, deit.cutmix) == (0.25, 1, 0.8, 1)


def test_a_file_with_one_row_needs_no_row() -> None:
    assert Recipe.load("digits/kd") == Recipe.load(KD)
    [line] = problems_of("cifar100/kd")
    assert "several rows" in line and "resnet32x4-resnet8x4" in line


def test_words_override() -> None:
    words = [
        "optim.lr=1e-4", "run.amp=off", "run.epochs=3", "data.root=other/place",
        "optim.name=adamw", "student.normalize={mean: [0, 0, 0], std: [1, 1, 1]}",
    ]  # fmt: skip
    recipe = Recipe.load(KD, words)
    assert recipe.optim.lr == 1e-4 and isinstance(recipe.optim.lr, float)
    assert recipe.run.amp == "off" and recipe.run.epochs == 3
    assert recipe.data.root == Path("other/place")
    assert recipe.student.normalize is not None and recipe.student.normalize.std == (1, 1, 1)
    assert Recipe.load(KD).optim.lr == 0.05


def test_home_is_expanded() -> None:
    assert Recipe.load(KD, ["data.root=~/set"]).data.root == Path.home() / "set"


def test_all_problems_at_once_one_line_each() -> None:
    words = [
        "optim.learning=1", "run.batch_size=3", "lr=1", "method.temprature=3", "run.epochs=ten",
        "run.seed=1.5", "run.amp=fp16", "run.keep=true", "data.flip=yes", "optim.weight_decay=-1",
        "data.scale=[1, 2, 3]", "data.root=[", "nonsense",
    ]  # fmt: skip
    found = problems_of(KD, words)
    assert len(found) == len(words)
    text = "\n".join(found)
    for line in (
        "run.batch_size: unknown key; did you mean run.batch?",
        "lr: unknown key; did you mean optim.lr?",
        "method.temprature: unknown key; did you mean method.temperature?",
        "run.epochs: got the text 'ten', wants a whole number",
        "run.seed: got 1.5, wants a whole number",
        "run.amp: got the text 'fp16', wants one of off, bf16",
        "run.keep: got true, wants a whole number",
        "data.flip: got the text 'yes', wants true or false",
        "optim.weight_decay: got -1, wants a number at least 0",
        "data.scale: got [1, 2, 3], wants 2 values",
        "nonsense: wants the form key=value, as in optim.lr=0.1",
    ):
        assert line in found, text
    assert any(line.startswith("optim.learning: unknown key; optim has name, lr") for line in found)
    assert any(line.startswith("data.root: line 1: not valid YAML") for line in found)


def test_teacher_goes_with_method() -> None:
    assert problems_of(KD, ["teacher=null"]) == [
        "teacher: method kd needs one; add teacher.name=NETWORK"
    ]
    [line] = problems_of("digits/ce:resnet8", ["teacher.name=resnet20"])
    assert line.startswith("teacher: method ce uses none")
    [line] = problems_of(KD, ["slt.name=resnet8"])
    assert line.startswith("slt: method kd has no SL-Ts")


def test_teacher_is_missed_beside_other_problems() -> None:
    assert "teacher: method kd needs one; add teacher.name=NETWORK" in problems_of(
        KD, ["teacher=null", "run.epochs=0"]
    )


def test_unknown_method_and_its_neighbour() -> None:
    [line] = problems_of(KD, ["method.name=kdd"])
    assert line.startswith("method.name: got the text 'kdd'") and line.endswith("mean kd?")


def test_an_evaluation_of_a_fraction_of_the_image_is_told() -> None:
    told = {size: Recipe.load("photos/kd", [f"data.size={size}"]).data for size in (224, 128, 48)}
    assert not told[224].fraction_seen and not told[128].fraction_seen
    assert "256 leaves 4% of a square image" in told[48].fraction_seen
    assert told[48].fraction_seen.endswith("data.eval_resize=55")
    assert not Recipe.load(KD).data.fraction_seen  # to size as a whole


def test_one_word_is_a_list_of_it() -> None:
    words = ["run.trackers=tensorboard", "cache.taps=pool:in", "run.compile=true"]
    recipe = Recipe.load(KD, [*words, "run.compile_only=student"])
    assert recipe.run.trackers == ("tensorboard",) and recipe.cache.taps == ("pool:in",)
    assert recipe.run.compile_only == ("student",)
    [line] = problems_of(KD, ["optim.milestones=3"])
    assert line == "optim.milestones: got 3, wants a list, as in [a, b]"


def test_a_methods_options_are_not_anothers() -> None:
    [line] = problems_of(KD, ["method={name: nkd, kd_weight: 1, temperature: 1}"])
    assert line == "method.kd_weight: unknown key; did you mean method.ce_weight?"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cifar10/kd:resnet56-resnet20", "did you mean cifar100/kd:resnet56-resnet20?"),
        ("cifar100/kd:resnet56-resnet21", "did you mean resnet56-resnet20?"),
        (
            "../recipes/digits/kd",
            "digits/kd; did you mean digits/kd?; kdfuse recipes --all lists them",
        ),
        ("optim.lr", "no recipe optim.lr; a setting is given its value as optim.lr=VALUE"),
    ],
)
def test_unknown_names(name: str, words: str) -> None:
    [line] = problems_of(name)
    assert words in line


def test_missing_file_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        Recipe.load("nowhere.yaml:row")


def test_own_file_with_rows(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "method: {name: ce}\n"
        "data: {source: synthetic, classes: 4, size: 32}\n"
        "student: {name: resnet8}\n"
        "optim: {lr: 1e-1, momentum: 0.8}\n"
        "run: {epochs: 1, batch: 8}\n"
        "rows:\n  a:\n  b:\n    optim: {lr: 2e-1}\n"
    )
    assert Recipe.load(path.as_posix() + ":a").optim.lr == 0.1
    other = Recipe.load(f"{path}:b")
    assert (other.optim.lr, other.optim.momentum, other.name) == (0.2, 0.8, "mine:b")
    assert problems_of(f"{path}:c") == ["mine has no row c (rows: a, b)"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3: key a stands twice, first on line 1"),
        ("a: {b: 1, b: 2}\n", "key b stands twice"),
        ("a: !!python/object/apply:os.system ['true']\n", "line 1: not valid YAML"),
        ("a: [1\n", "not valid YAML"),
        ("1: 2\n", "the key 1 is not text"),
        ("just text\n", "wants keys and values"),
        ("a: \x00", "not valid YAML"),
    ],
)
def test_bad_yaml_is_refused_by_file(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        yamlfile.read(path)
    assert words in str(caught.value) and "bad.yaml" in str(caught.value)


def test_yaml_scalars() -> None:
    text = "[off, yes, 1e-4, 1E3, -.5, 010, 1:30, 2024-01-01, ~, true, 7, .inf, '7']"
    assert yamlfile.parse(text) == [
        "off", "yes", 1e-4, 1000.0, -0.5, "010", "1:30", "2024-01-01", None, True, 7,
        float("inf"), "7",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"source": "folder"}, "data.root: source folder needs a folder"),
        ({"source": "synthetic"}, "data.classes: source synthetic needs"),
        ({"source": "synthetic", "classes": 3, "loader": "dali"}, "data.loader: dali reads files"),
        ({"source": "synthetic", "classes": 3, "root": "x"}, 'data.root: "x" has no effect'),
        ({"source": "digits", "root": "x", "classes": 9}, "digits have 10 classes, got 9"),
        ({"source": "digits", "root": "x", "images": 5}, "data.images: 5 has no effect"),
        ({"source": "digits", "root": "x", "size": 300}, "data.eval_resize: 256 is below"),
        ({"source": "digits", "root": "x", "scale": [0.5, 0.1]}, "data.scale: need 0 < low"),
        ({"source": "digits", "root": "x", "scale": [0.5, 2]}, "data.scale: a share"),
        ({"source": "digits", "root": "x", "padding": 2}, "data.padding: 2 has no effect"),
        (
            {
                "source": "digits",
                "root": "x",
                "loader": "resident",
                "erase": 0.25,
                "randaugment": {},
            },
            "data.loader: resident crops on the device, where it cannot do data.randaugment and ",
        ),
        ({"source": "digits", "root": "x", "erase": 1.5}, "less than or equal to 1"),
        ({"source": "digits", "root": "x", "repeats": 0}, "greater than or equal to 1"),
        ({"source": "digits", "root": "x", "randaugment": {"magnitude": 11}}, "or equal to 10"),
        ({"source": "digits", "root": "x", "randaugment": {"ops": 0}}, "or equal to 1"),
        ({"source": "digits", "root": "x", "randaugment": {"std": -1}}, "or equal to 0"),
    ],
)
def test_data_that_cannot_work(settings: dict, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        Data(**settings)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lr": 0}, "greater than 0"),
        ({"lr": float("nan")}, "finite"),
        ({"lr": 1, "nesterov": True, "momentum": 0.0}, "optim.nesterov: needs"),
        ({"lr": 1, "milestones": [30, 20]}, "optim.milestones: positive and rising"),
        ({"lr": 1, "milestones": [0, 20]}, "optim.milestones: positive and rising"),
        ({"lr": 1, "schedule": "cosine", "milestones": [3]}, "optim.milestones: [3.0] has no"),
        ({"lr": 1, "min_lr": 0.1}, "optim.min_lr: 0.1 has no effect with schedule step"),
        ({"lr": 0.1, "min_lr": 0.2, "schedule": "cosine"}, "is above optim.lr"),
        ({"lr": 1, "name": "adamw", "nesterov": True}, "optim.nesterov: true has no effect"),
        ({"lr": 1, "name": "adamw", "betas": [0.9, 1]}, "optim.betas: each in [0, 1)"),
        ({"lr": 1, "betas": [0.8, 0.9]}, "optim.betas"),
        ({"lr": 1, "name": "lamb", "momentum": 0.8}, "optim.momentum: 0.8 has no effect with"),
        ({"lr": 1, "name": "lamb", "nesterov": True}, "optim.nesterov: true has no effect with"),
        ({"lr": 1, "name": "lamb", "trust": 0.1}, "optim.trust: 0.1 has no effect with optim.name"),
        ({"lr": 1, "name": "lamb", "betas": [1, 0.9]}, "optim.betas: each in [0, 1)"),
        ({"lr": 1, "name": "lars", "betas": [0.8, 0.9]}, "optim.betas: [0.8, 0.9] has no effect"),
        ({"lr": 1, "name": "lars", "nesterov": True, "momentum": 0.0}, "optim.nesterov: needs"),
        ({"lr": 1, "name": "lars", "trust": 0}, "greater than 0"),
        ({"lr": 1, "trust": 0.1}, "optim.trust: 0.1 has no effect with optim.name sgd"),
        ({"lr": 1, "name": "adamw", "trust": 0.1}, "optim.trust: 0.1 has no effect"),
        ({"lr": 1, "adapt": "decayed"}, 'optim.adapt: "decayed" has no effect with optim.name sgd'),
        ({"lr": 1, "name": "adamw", "adapt": "decayed"}, 'optim.adapt: "decayed" has no effect'),
        (
            {"lr": 1, "name": "lars", "adapt": "decayed", "weight_decay": 0},
            "optim.adapt: decayed leaves nothing to adapt with optim.weight_decay 0",
        ),
        ({"lr": 1, "scale_batch": 512}, "optim.scale_batch: 512 has no effect with optim.scale"),
        ({"lr": 1, "scale": "linear", "scale_batch": 0}, "greater than or equal to 1"),
        ({"lr": 1, "scale": "cubic"}, "'none', 'linear' or 'sqrt'"),
        ({"lr": 1, "layer_decay": 0}, "greater than 0"),
        ({"lr": 1, "layer_decay": 1.1}, "less than or equal to 1"),
    ],
)
def test_optim_that_cannot_work(settings: dict, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        Optim(**settings)
    assert words in str(caught.value)


def test_a_scaled_recipe_shows_the_rate_that_was_given() -> None:
    recipe = Recipe.load(KD, ["optim.scale=linear", "run.batch=1024"])
    assert recipe.optim.lr == 0.05
    assert "  lr: 0.05  #" in recipe.explain() and "  scale: linear  #" in recipe.explain()


def test_another_method_over_a_recipe_names_the_cause():
    with pytest.raises(RecipeError, match="is written for kd, and its other options stay"):
        Recipe.load("cifar100/kd:resnet32x4-resnet8x4", ["method.name=dkd"])


def test_a_part_of_randaugment_switches_it_on() -> None:
    assert Recipe.load(KD).data.randaugment is None
    found = Recipe.load(KD, ["data.randaugment.magnitude=7"]).data.randaugment
    assert found is not None and (found.magnitude, found.std, found.ops) == (7, 0.5, 2)
    assert Recipe.load(KD, ["data.randaugment={}"]).data.randaugment is not None
    [line] = problems_of(KD, ["data.randaugment.level=7"])
    assert line.startswith("data.randaugment.level: unknown key")


def test_a_memory_of_images_takes_no_repeats() -> None:
    crd = "digits/crd"
    [line] = problems_of(crd, ["data.repeats=3"])
    assert line == (
        "method: crd remembers one row for each image, which data.repeats=3 would write several "
        "times a step; set data.repeats to 1"
    )
    assert Recipe.load(KD, ["data.repeats=3"]).data.repeats == 3


def test_a_classifiers_published_number_is_top1() -> None:
    with pytest.raises(RecipeError, match="expect.ap: classification is measured as top-1"):
        Recipe.load("digits/ce:resnet8", ["expect={ap: 38.0, source: x}"])
