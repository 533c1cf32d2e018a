"""A student, a teacher and a method on one batch of digits, for the tests of feature methods."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from steps import step_with
from tiny import tiny

from kdfuse.engine.training.build import build

CLASSES, IMAGES = 10, 64


def digits(size=16):
    """uint8 images (IMAGES, 3, size, size), their labels and their numbers."""
    found = load_digits()
    images = torch.tensor(found.images[:IMAGES], dtype=torch.float32)[:, None] * 15
    images = F.interpolate(images, (size, size)).to(torch.uint8).expand(-1, 3, -1, -1)
    return images, torch.tensor(found.target[:IMAGES]).long(), torch.arange(IMAGES)


def made(method, student="resnet8", teacher="resnet14", size=16, **sections):
    """The recipe and its distiller, ready to train, with the same random weights in each call."""
    data = {"source": "synthetic", "classes": CLASSES, "subset": None, "size": size}
    networks = {"student": {"name": student}, "teacher": {"name": teacher}}
    recipe = tiny(None, method, data=data, **networks, **sections)
    torch.manual_seed(0)
    distiller = build(recipe, CLASSES, torch.device("cpu"), digits(size)[1])
    distiller.prepare(recipe.run.compiled)
    return recipe, distiller.train()


def losses(distiller, term, steps=20, lr=0.02, epoch=0.0):
    """One term after each step on the same batch; every parameter must get a gradient."""
    optimizer = torch.optim.SGD(distiller.parameters(), lr=lr, momentum=0.9)
    step, batch = step_with(optimizer, distiller, epoch), digits()
    found = [float(step(*batch)[term]) for _ in range(steps)]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in distiller.parameters())
    return found
