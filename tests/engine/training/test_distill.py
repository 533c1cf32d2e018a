"""distill(): objects of a program instead of a recipe, trained as a recipe trains."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from same import assert_same, assert_same_run
from tiny import tiny
from torch import nn
from torch.utils.data import TensorDataset
from torchvision.datasets import ImageFolder

from kdfuse.engine import Stopped, distill, train
from kdfuse.engine.data.sources.digits import open_digits
from kdfuse.engine.methods import KD, SLKD, SimKD
from kdfuse.engine.models import HANDED, create
from kdfuse.engine.recipe.data import Data
from kdfuse.engine.run.checkpoint import load
from kdfuse.engine.run.past import read_run
from kdfuse.engine.training.evaluate import evaluate

pytestmark = pytest.mark.slow(25)
EXACT = ["run.speed=exact", "run.threads=1", "run.teacher_at_chance=allow"]


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder of digits, 32 of a class."""
    root = tmp_path_factory.mktemp("digits")
    open_digits(Data(source="digits", root=root), "train")
    for path in (root / "train").rglob("*.jpg"):
        if int(path.stem) > 400:
            path.unlink()
    return root


class Network(nn.Module):
    def __init__(self, classes, width=8):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.last = nn.Linear(width, classes)

    def forward(self, images):
        return self.last(self.stem(images).mean((2, 3)))


class Answer(Network):
    """Its logits within something."""

    def __init__(self, kind):
        super().__init__(4)
        self.kind = kind

    def forward(self, images):
        return self.kind([("logits", super().forward(images))])


class Chance(Network):
    """Says the first class of all images."""

    def forward(self, images):
        return 0 * super().forward(images)


class Empty(nn.Module):
    """Takes no number of classes."""

    def __init__(self):
        super().__init__()


class Cells:
    """Tensors with random noise; from its `broken` call on it fails."""

    def __init__(self, n, broken=None):
        self.n, self.broken = n, broken
        self.targets = [row % 4 for row in range(n)]

    def __len__(self):
        return self.n

    def __getitem__(self, row):
        if self.broken is not None and row == self.broken:
            raise OSError("the disk is gone")
        image = torch.zeros(3, 8, 8)
        image[row % 3, row % 4] = 1.0
        return image + 0.1 * torch.randn(3, 8, 8), self.targets[row]


def seeded(make):
    torch.manual_seed(3)
    return make()


def test_a_folder_trains_to_the_bytes_of_its_recipe(tmp_path, root):
    """The same plan, pixels and weights, be they a recipe's or objects."""
    teacher = seeded(lambda: create("resnet8", 10))
    torch.save(teacher.state_dict(), tmp_path / "teacher.pt")
    recipe = tiny(
        root,
        "kd",
        data={"source": "folder", "subset": None, "size": 32, "augment": "pad_crop", "flip": True}
        | {"scale": (0.08, 1.0), "loader": "auto", "workers": 2},
        teacher={"name": "resnet8", "checkpoint": tmp_path / "teacher.pt"},
        run={"speed": "exact", "log_every": 50, "eval_batch": 256},
    )
    whole = train(recipe, tmp_path / "recipe")
    found = distill(
        "resnet8",
        teacher,
        ImageFolder(root / "train"),
        ImageFolder(root / "val"),
        "kd",
        out=tmp_path / "own",
        epochs=2,
        lr=0.05,
        settings=["optim.schedule=constant", "run.device=cpu", *EXACT],
    )
    steps = found.last["step"]
    mine, theirs = (
        load(run / "checkpoints" / f"step-{steps:08d}")[0] for run in (found.folder, whole)
    )
    assert_same(mine, theirs)


def own(out, train_set, **changes):
    words = {"method": "slkd", "epochs": 3, "batch": 16, "slt": Network, "settings": EXACT}
    words |= {"student": seeded(lambda: Network(4)), "teacher": seeded(lambda: Network(4, 16))}
    words |= changes
    first = [words.pop(name) for name in ("student", "teacher")]
    return distill(*first, train_set, Cells(24), words.pop("method"), out=out, **words)


def test_a_run_that_fails_goes_on_to_the_same_bytes(tmp_path):
    whole = own(tmp_path / "whole", Cells(64), settings=[*EXACT, "run.checkpoint_every=1"])
    broken = Cells(64, broken=17)
    with pytest.raises(ValueError, match=r"train\[17\]: OSError: the disk is gone"):
        own(tmp_path / "cut", broken, settings=[*EXACT, "run.checkpoint_every=1"])
    assert not HANDED
    broken.broken = None
    settings = [*EXACT, "run.checkpoint_every=1"]
    with pytest.raises(ValueError, match=r"cannot resume .*\n  student's tensors: \d+ values, "):
        own(tmp_path / "cut", broken, student=Network(4, 12), settings=settings)
    cut = own(tmp_path / "cut", broken, student=Network(4), settings=settings)
    assert "student's first weights are others" in cut.past.of_kind("note")[0]["text"]
    assert_same_run(cut.folder, whole.folder, 12)
    again = own(tmp_path / "cut", Cells(64), settings=[*EXACT, "run.checkpoint_every=1"])
    assert again.last == cut.last


class Dim(Cells):
    def __getitem__(self, row):
        image, label = super().__getitem__(row)
        return image / 2, label


def test_a_finished_run_is_that_of_its_objects(tmp_path):
    wide = partial(Network, width=12)
    wide.__qualname__ = "Network"
    first = own(tmp_path / "run", Cells(64), epochs=1)
    for named, train_set, changes in (
        ("student's first weights", Cells(64), {"student": Network(4)}),
        ("student's tensors", Cells(64), {"student": Network(4, 12)}),
        ("teacher's weights", Cells(64), {"teacher": Network(4, 16)}),
        ("slt's tensors", Cells(64), {"slt": wide}),
        ("training images", Dim(64), {}),
    ):
        with pytest.raises(ValueError, match="cannot return the finished") as refused:
            own(tmp_path / "run", train_set, epochs=1, **changes)
        lines = str(refused.value).splitlines()
        assert lines[1].startswith(f"  {named}: ") and "undo that" in lines[-1], refused.value
    for changes in ({}, {"student": Network(4), "resume": True}):
        assert own(tmp_path / "run", Cells(64), epochs=1, **changes).last == first.last


def test_objects_stay_as_they_are(tmp_path):
    student, teacher = Network(4).train(), Network(4, 16).train()
    before = copy.deepcopy([student.state_dict(), teacher.state_dict()])
    found = distill(student, teacher, Cells(64), Cells(24), KD(), out=tmp_path / "run", epochs=1,
                    settings=EXACT)  # fmt: skip
    assert_same([student.state_dict(), teacher.state_dict()], before)
    assert student.training and teacher.training
    assert not torch.equal(found.network("last").last.weight, student.last.weight)


def test_a_network_is_what_was_evaluated(tmp_path):
    """SimKD deploys a projector and the teacher's classifier behind the student."""
    student, teacher = seeded(lambda: create("resnet8", 4)), seeded(lambda: create("resnet14", 4))
    data = Cells(48)
    method = SimKD(factor=2)
    found = distill(student, teacher, data, Still(), method, out=tmp_path / "run", epochs=1,
                    batch=16, settings=EXACT)  # fmt: skip
    network = found.network("last")
    images = torch.stack([Still()[row][0] for row in range(len(Still()))])
    with torch.no_grad():
        right = (network(images).argmax(1) == torch.arange(24) % 4).double().mean()
    assert not network.training
    assert found.last["top1"] == pytest.approx(100 * right.item())


class Still:
    """Tensors without noise."""

    def __len__(self):
        return 24

    def __getitem__(self, row):
        image = torch.zeros(3, 8, 8)
        image[row % 3, row % 4] = 1.0
        return image, row % 4


def test_small_pictures_are_seen_in_their_size_and_others_in_224(tmp_path):
    def pictures(side):
        rng = np.random.default_rng(0)
        images = [
            Image.fromarray(rng.integers(0, 255, (side, side, 3), np.uint8)) for _ in range(8)
        ]
        return [(image, row % 2) for row, image in enumerate(images)]

    student = Network(2)

    def data(side, *settings, **size):
        found = distill(student, None, pictures(side), pictures(side), "ce", batch=4, epochs=1,
                        out=tmp_path / f"{side}{size}", settings=[*EXACT, *settings],
                        **size)  # fmt: skip
        return found.past.recipe["data"]

    seen = data(20)
    assert (seen["size"], seen["augment"], seen["eval_resize"]) == (20, "pad_crop", None)
    assert data(20, "data.loader=torchvision") == seen  # which is finished, by another loader
    Image.new("RGB", (20, 20)).save(tmp_path / "picture.png")
    gone = [(str(tmp_path / name), 0) for name in ("gone.png", "picture.png")]
    with pytest.warns(UserWarning, match="unreadable image .*gone.png"):
        found = distill(Network(2), None, gone, gone, "ce", out=tmp_path / "gone", epochs=1,
                        batch=2, classes=["a", "b"], settings=EXACT)  # fmt: skip
    assert found.past.recipe["data"]["size"] == 20
    seen = data(65)
    assert (seen["size"], seen["augment"]) == (224, "random_resized_crop")
    assert seen["eval_resize"] == 256
    assert data(65, size=28)["eval_resize"] == 32


def test_float_images_of_0_to_255_are_told_of(tmp_path, capsys):
    images = torch.zeros(8, 3, 8, 8)
    for most, told in ((3.0, ""), (255.0, "train[0] has values up to 255: float32 images")):
        images[:, 0, 0] = most
        data = TensorDataset(images, torch.arange(8) % 4)
        distill(Network(4), None, data, data, "ce", out=tmp_path / str(most), epochs=1, batch=4,
                settings=EXACT)  # fmt: skip
        assert capsys.readouterr().err.partition(" are taken")[0] == told


def test_what_a_run_learned_teaches_the_next(tmp_path, root):
    first = distill("resnet8", None, Cells(64), Cells(24), "ce", out=tmp_path / "one", epochs=2,
                    settings=EXACT)  # fmt: skip
    by_path = distill("resnet8", first.folder, Cells(64), Cells(24), out=tmp_path / "two",
                      epochs=1, settings=EXACT)  # fmt: skip
    by_module = distill("resnet8", first.network(), Cells(64), Cells(24), out=tmp_path / "three",
                        epochs=1, settings=EXACT)  # fmt: skip
    assert by_path.last["train_kd"] == by_module.last["train_kd"]


def test_a_folder_does_not_have_the_objects_of_its_run(tmp_path):
    """Its names would stand for the objects of the run at work."""
    teacher = distill(Network(4, 16), None, Cells(64), Cells(24), "ce", out=tmp_path / "one",
                      epochs=1, settings=EXACT)  # fmt: skip
    with pytest.raises(ValueError, match=r"run:.*one: its own:student:Network .*run.network\(\)"):
        distill(Network(4, 16), teacher.folder, Cells(64), Cells(24), out=tmp_path / "two",
                epochs=1, settings=EXACT)  # fmt: skip


def test_only_its_program_can_evaluate_it(tmp_path):
    found = own(tmp_path / "run", Cells(64), epochs=1)
    with pytest.raises(ValueError, match="the program that called kdfuse.engine.distill"):
        evaluate(found.folder)


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"slt": None}, "slt: method slkd trains networks beside the student"),
        (
            {"slt": lambda classes: Network(classes + 1)},
            r"slt: this Network gives \(1, 5\) .*wants logits \(1, 4\); its last layer",
        ),
        (
            {"method": {"name": "slkd", "slt": 3}},
            "method.slt: unknown key; did you mean method.slts",
        ),
        ({"method": "slkt"}, "slkd"),
        ({"settings": ["optim.rl=3"]}, "optim.rl: unknown key; did you mean optim.lr"),
        ({"size": 9}, "size: 9, and the tensors of train are of 8 pixels"),
        ({"classes": ["a", "b"]}, r"train\[3\]: label 3 of 2 classes"),
        ({"settings": ["data.flip=true"]}, "data.flip=true: .* are tensors"),
        (
            {"student": nn.Sequential(nn.Conv2d(1, 4, 8), nn.Flatten())},
            r"student: this Sequential fails for an image \(1, 3, 8, 8\): .* to have 1 channels.*"
            r"; it has to take images \(N, 3, 8, 8\)$",
        ),
        ({"teacher": Network(4).double()}, "teacher: this Network has weights of torch.float64"),
        ({"student": Network(4).requires_grad_(False)}, "student: no parameter of this Network"),
        ({"slt": lambda classes: nn.Flatten()}, r"slt: this Flatten gives \(1, 192\) for an image"),
        ({"slt": lambda classes: None}, "slt: its function gave None, wants an nn.Module; let it"),
        ({"student": Answer(tuple)}, "student: this Answer gives a tuple .* the logits alone"),
        ({"student": Answer(dict)}, "student: this Answer gives a dict"),
        ({"teacher": Network(9)}, r"teacher: this Network gives \(1, 9\) .* each of the 4 classes"),
        ({"teacher": "runs/teacher"}, r"teacher: 'runs/teacher' is no .*Path\('runs/teacher'\)"),
        (
            {"method": "simkd", "slt": None},
            r'resnet\*, or give the .* class an attribute taps = {"pooled": MODULE_PATH, "class',
        ),
        (
            {"method": "at", "slt": None},
            'method.student_taps, or give .* class an attribute taps = {"stage1": MODULE_PATH}',
        ),
        (
            {"settings": EXACT[:2], "teacher": seeded(lambda: Chance(4))},
            r"so it has nothing to teach. Check that the object has its trained weights, .* or set",
        ),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, changes, text):
    with pytest.raises(ValueError, match=text) as refused:
        own(tmp_path / "run", Cells(64), **changes)
    assert not HANDED and "\n" not in str(refused.value)


@pytest.mark.parametrize("maker", [lambda: Network(4), Empty])
def test_a_function_takes_the_number_of_classes(tmp_path, maker):
    with pytest.raises(TypeError, match=r"student: .*\(\) cannot be called with the number of cl"):
        own(tmp_path / "run", Cells(64), student=maker)


def test_a_run_that_was_told_to_stop_says_how_to_go_on(tmp_path):
    soon = [*EXACT, "run.time_limit=0.001"]
    with pytest.raises(Stopped):
        own(tmp_path / "run", Cells(64), epochs=1, settings=soon)
    (note,) = read_run(tmp_path / "run").of_kind("note")
    wanted = "stopped by run.time_limit, the same call of distill goes on from step-00000001"
    assert note["text"] == wanted
    assert own(tmp_path / "run", Cells(64), epochs=1).last["step"] == 4


def test_self_learning_teachers_begin_with_weights_of_their_own(tmp_path):
    with pytest.raises(TypeError, match="slt: wants a function .* got a module .Network.*lambda"):
        own(tmp_path / "run", Cells(64), slt=Network(4))


def test_a_method_that_no_recipe_knows_is_refused(tmp_path):
    class Mine(SLKD):
        pass

    with pytest.raises(ValueError, match="register it first"):
        own(tmp_path / "run", Cells(64), method=Mine())


def test_a_validation_set_of_another_kind_is_refused(tmp_path):
    picture = Image.new("RGB", (8, 8))
    with pytest.raises(ValueError, match="val: its images are pictures"):
        distill(Network(4), None, Cells(16), [(picture, 0)], "ce", out=tmp_path, epochs=1)
