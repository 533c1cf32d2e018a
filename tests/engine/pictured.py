"""Networks with made-up answers and the folder of a run, for the tests of pictures."""

from pathlib import Path

import numpy as np
from PIL import Image

from kdfuse.engine.recipe.load import Recipe
from kdfuse.engine.report.answers import Answers, Network
from kdfuse.engine.run.log import RunLog

NAMES = ("student", "SL-T 0", "teacher")


def said(logits: np.ndarray, features: np.ndarray | None = None) -> Network:
    """A network that gave these logits, in batches of seven."""
    network = Network(moments=True)
    for at in range(0, len(logits), 7):
        part = None if features is None else features[at : at + 7]
        network.add(logits[at : at + 7], part)
    return network


def answers(count: int, images: int, name: str = "class <{}> & co", **more) -> Answers:
    """Networks that are right more often than not; the teacher more than the others."""
    rng = np.random.default_rng(1)
    target = np.arange(images) % count
    networks = {}
    for own, sure in zip(NAMES, (2.0, 2.5, 4.0), strict=True):
        logits = rng.normal(size=(images, count)).astype(np.float32)
        logits[np.arange(images), target] += sure
        features = rng.normal(size=(images, 8)).astype(np.float32)
        networks[own] = said(logits, features + 4 * np.eye(8, dtype=np.float32)[target % 8])
    photo = Image.effect_noise((90, 60), 50).convert("RGB")
    more = {"about": {"checkpoint": "best", "step": 10, "device": "cpu"}} | more
    return Answers(
        [name.format(i) for i in range(count)],
        target,
        np.arange(images),
        np.ones(images, bool),
        networks,
        lambda row: photo.copy(),
        **more,
    )


def run_of(folder: Path, recipe: str = "cifar100/slkd:resnet32x4-resnet8x4") -> Path:
    """A finished run whose best evaluation is that of step 10."""
    folder.mkdir()
    (folder / "recipe.yaml").write_text(Recipe.load(recipe).explain())
    with RunLog(folder, 10, 1) as log:
        log.step(10, 1.0, {"loss": 1.0}, 100.0, 0.0)
        log.epoch(1, {"top1": 50.0, "top5": 60.0})
        log.end({})
    return folder
