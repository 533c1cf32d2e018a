"""Where networks put the images of some classes: t-SNE of what their classifiers read.

Van der Maaten and Hinton, "Visualizing Data using t-SNE" (JMLR 2008).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .drawing import WIDTH, Drawing, Panel, frame, places, short, text

if TYPE_CHECKING:
    from .answers import Answers

TITLE = "t-SNE of the features"
IMAGES, CLASSES = 2000, 20  # at most
FEWEST = 10  # images
SEED, PERPLEXITY = 0, 30.0
DIMENSIONS = 50  # to which longer features are reduced first, as in the paper


def sample(target: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    """The numbers of at most IMAGES images of at most CLASSES classes, both evenly spread.

    `target` are the classes (n,) of all images.
    """
    chosen = np.unique(np.linspace(0, classes - 1, min(classes, CLASSES)).round().astype(int))
    each = IMAGES // len(chosen)
    found = []
    for number in chosen:
        own = np.flatnonzero(target == number)
        spread = np.linspace(0, len(own) - 1, min(len(own), each)).round().astype(int)
        found.append(own[spread])
    return np.sort(np.concatenate(found))


def numbers(answers: Answers) -> dict[str, Any]:
    """The place of each image in the map of each network, and why one has none."""
    label = answers.target[answers.sampled]
    chosen = np.unique(label)
    maps, missing = {}, {}
    for name, network in answers.networks.items():
        features = network.features
        if features is None:
            missing[name] = network.no_features
        elif len(features) < FEWEST:
            missing[name] = f"a map needs {FEWEST} images, and there are {len(features)}"
        elif not np.ptp(features, 0).any():
            missing[name] = "its features are the same for all images"
        else:
            maps[name] = {"dimensions": features.shape[1], "map": _map(features)}
    return {
        "of_classes": len(answers.classes),
        "classes": [answers.classes[i] for i in chosen.tolist()],
        "labels": np.searchsorted(chosen, label).tolist(),
        "seed": SEED,
        "perplexity": _perplexity(len(label)),
        "networks": maps,
        "missing": missing,
    }


def _map(features: NDArray[np.float32]) -> list[list[float]]:
    # Seconds to import, which the page at the end of a run need not wait for.
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    # Sums over threads come in no order, and a last digit makes another map.
    with threadpool_limits(1):
        if min(features.shape) > DIMENSIONS:
            features = PCA(DIMENSIONS, random_state=SEED).fit_transform(features)
        made = TSNE(
            init="pca", perplexity=_perplexity(len(features)), random_state=SEED
        ).fit_transform(features)
    return made.round(2).tolist()


def _perplexity(images: int) -> float:
    """It has to be below the number of images."""
    return min(PERPLEXITY, (images - 1) / 3)


def draw(found: dict[str, Any]) -> Drawing:
    labels, names = found["labels"], found["classes"]
    few = (
        f"{len(names)} of {found['of_classes']} classes"
        if len(names) < found["of_classes"]
        else (f"all {len(names)} classes")
    )
    without = "".join(f" Without {name}: {why}." for name, why in found["missing"].items())
    words = (
        f"What the classifier of each network reads, for the same {len(labels)} images of {few} "
        f"(at most {IMAGES:,} and {CLASSES}, evenly spread). Perplexity {found['perplexity']:.3g}, "
        f"seed {found['seed']}. Neighbours in a map are neighbours in the network; distances "
        f"between groups, and places, mean little.{without}"
    )
    panels = [
        _panel(f"{name}, {of['dimensions']} features", of["map"], labels)
        for name, of in found["networks"].items()
    ]
    return Drawing(words, [*panels, _legend(names)] if panels else [])


def _panel(title: str, places_of: list[list[float]], labels: list[int]) -> Panel:
    points, kinds = np.array(places_of), np.array(labels)
    low, high = points.min(0), points.max(0)
    scale = (WIDTH - 16) / (high - low).max()
    # In the middle of the square; the y axis goes down.
    points = (points - (low + high) / 2) * scale * (1, -1) + WIDTH / 2 + (0, 20)
    body = [frame(0.5, 20.5, WIDTH - 1, WIDTH - 1)]
    body += [
        places(points[kinds == kind].tolist(), kind, opacity=0.75)
        for kind in np.unique(kinds).tolist()
    ]
    return Panel(title, WIDTH + 22, body)


def _legend(names: list[str]) -> Panel:
    body, rows = [], -(-len(names) // 2)
    for kind, name in enumerate(names):
        x, y = kind // rows * WIDTH / 2, 36 + 18 * (kind % rows)
        body += [places([(x + 5, y - 4)], kind, 7), text(x + 16, y, short(name, 20))]
    return Panel("Classes", 40 + 18 * rows, body)
