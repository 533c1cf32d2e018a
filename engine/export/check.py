"""An exported file is run on images of the run's validation set, beside the run's own network."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..data.loaders import make_loader
from ..data.loaders.feed import on_device
from ..data.manifest import Manifest
from ..data.quarantine import BadImagesError
from ..data.sources import open_source
from ..training.evaluate import hits
from ..training.process import settings
from ..training.ranks import choose_device
from ..training.speed import settled
from .chosen import Chosen
from .formats import Classifier, Runner

Count = int | Literal["all"]
DEFAULT = 256
BATCH = 64
# How far a logit may be from the network's own, as a share of the largest one, or of 1 where all
# are smaller: float32 sums in another order; and where the run computed in fewer bits (bfloat16,
# TF32), how far its recorded accuracy rests on other logits.
TOLERANCE, REDUCED = 1e-3, 2e-2


@dataclass(frozen=True)
class Checked:
    """What a file and the run's own network, in float32, said of the same images."""

    images: int
    of: int  # images of the validation set
    difference: float  # the largest of a logit
    allowed: float
    top1: float  # percent, of the file
    own: float  # of the network
    recorded: float | None  # of the run, where all images were asked for

    def __str__(self) -> str:
        text = (
            f"checked on {self.images} of {self.of} validation images: top-1 {self.top1:.2f}, the "
            f"run's own network in float32 {self.own:.2f}; logits differ by at most "
            f"{self.difference:.2g} (allowed {self.allowed:.2g})"
        )
        return text if self.recorded is None else f"{text}; the run recorded {self.recorded:.2f}"


def count_of(check: int | str) -> Count:
    """`check` as a number of images or "all"; ValueError for anything else."""
    if str(check).isdecimal():
        return int(check)
    if check == "all":
        return "all"
    raise ValueError(
        f"check = {check!r}: on how many validation images the file is run: a number, all, or 0"
    )


def validation(chosen: Chosen, count: Count) -> Manifest:
    """The validation set, for so many images to be checked.

    Raises ValueError where it is not there or not the run's, or where the run recorded no accuracy
    to compare that of "all" with.
    """
    if count == "all" and chosen.evaluation.get(chosen.top1_key) is None:
        raise ValueError(
            f"check = 'all': {chosen.past.path} recorded no accuracy of {chosen.name} at step "
            f"{chosen.facts['step']} ({chosen.which}); check a number of images"
        )
    with _or_unchecked():
        images = open_source(chosen.recipe.data, "val")
    if images.digest != chosen.facts["sources"].get("validation images", images.digest):
        raise ValueError(
            f"data.root={chosen.recipe.data.root}: the validation images are others than the run's;"
            " bring those back, or give --check 0 to write the file without running it"
        )
    return images


def compare(run: Runner, out: Path, chosen: Chosen, images: Manifest, count: Count) -> Checked:
    """Run the file `out` on `count` of these images, spread evenly over the set, and on a batch of
    another size.

    Raises ValueError where a logit, or the class of an image, is another than the run's own
    network has, or of "all" the accuracy than the run recorded.
    """
    own = Classifier(chosen.normalise, chosen.network)
    differences: list[Tensor] = []  # the largest of each batch
    sizes: list[Tensor] = []
    gaps: list[Tensor] = []  # of the network's two largest logits
    margins: list[Tensor] = []  # of its largest one before that of the file's class
    found = torch.zeros(2, 4, dtype=torch.float64)  # as `hits`, of the file and of the network
    with torch.no_grad(), closing(_batches(chosen, images, count)) as batches:
        for pixels, target in batches:
            wanted, said = own(pixels), _run(run, out, pixels, chosen.classes)
            if not sizes:  # the last batch may be as large as the others
                other = pixels[:1] if len(pixels) > 1 else pixels.repeat(2, 1, 1, 1)
                differences.append((_run(run, out, other, chosen.classes) - wanted[:1]).abs().max())
            differences.append((said - wanted).abs().max())
            sizes.append(wanted.abs().max())
            largest = wanted.topk(2).values
            gaps.append(largest[:, 0] - largest[:, 1])
            margins.append(largest[:, 0] - wanted.gather(1, said.argmax(1)[:, None])[:, 0])
            found += torch.stack([hits(said, target), hits(wanted, target)])
    scale = max(torch.stack(sizes).max().item(), 1.0)
    difference, allowed = torch.stack(differences).max().item(), TOLERANCE * scale
    (right, _, rows, _), (own_right, *_) = found.tolist()
    others = int((torch.cat(margins) > allowed).sum())
    if others or not difference <= allowed:  # NaN is no number below
        raise ValueError(
            f"out = {out}: not the run's network: on {int(rows)} validation images a logit differs "
            f"by {difference:.2g} (allowed {allowed:.2g}), and {others} have another class"
        )
    recorded = None
    if count == "all":
        close = int((torch.cat(gaps) <= 2 * scale * _precision(chosen)).sum())
        recorded = _as_recorded(out, chosen, int(right), int(rows), close)
    top1, own_top1 = 100 * right / rows, 100 * own_right / rows
    of = len(images.target)
    return Checked(int(rows), of, difference, allowed, top1, own_top1, recorded)


def _as_recorded(out: Path, chosen: Chosen, right: int, rows: int, close: int) -> float:
    """The accuracy that the run recorded, which `right` of so many rows have to be, but for those
    whose class is so close to another that rounding decides."""
    recorded: float = chosen.evaluation[chosen.top1_key]
    if abs(right - recorded * rows / 100) > close + 0.5:
        raise ValueError(
            f"out = {out}: its top-1 is {100 * right / rows:.2f}, and the run recorded "
            f"{recorded:.2f} for these weights; of {rows} images rounding decides {close}"
        )
    return recorded


def _run(run: Runner, out: Path, images: Tensor, classes: int) -> Tensor:
    wanted = (len(images), classes)
    try:
        logits = run(images)
    except Exception as error:  # each runtime has errors of its own
        raise ValueError(
            f"out = {out}: the file does not run on {wanted[0]} images: {error}"
        ) from error
    if tuple(logits.shape) != wanted:
        raise ValueError(
            f"out = {out}: the file gives {tuple(logits.shape)}, wants logits {wanted}"
        )
    return logits


def _precision(chosen: Chosen) -> float:
    """How far the logits behind the recorded accuracy may be off, as a share of the largest."""
    run = chosen.recipe.run
    reduced = run.amp == "bf16" or (run.tf32 and chosen.facts["machine"]["device"] == "cuda")
    return REDUCED if reduced else TOLERANCE


def _batches(
    chosen: Chosen, images: Manifest, count: Count
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """uint8 images (n, 3, size, size) and labels (n,) on the CPU, as an evaluation sees them."""
    n = len(images.target)
    wanted = n if count == "all" else min(count, n)
    device = choose_device("cpu" if chosen.recipe.run.device == "cpu" else "auto")
    recipe = settled(chosen.recipe, device)
    with settings(recipe.run):
        with _or_unchecked():
            loader = make_loader(
                images,
                recipe.data,
                min(BATCH, wanted),
                seed=recipe.run.seed,
                train=False,
                device=device,
                rows=np.arange(wanted) * n // wanted,
            )
        with closing(loader):
            batches = on_device(loader.epoch(0), device)
            while True:
                with _or_unchecked():
                    batch = next(batches, None)
                if batch is None:
                    return
                yield batch.images[: batch.valid].cpu(), batch.target[: batch.valid].cpu()


@contextmanager
def _or_unchecked() -> Iterator[None]:
    """An error of the images names the way without them."""
    try:
        yield
    except (OSError, ValueError, BadImagesError) as error:
        raise ValueError(
            f"{error}\n  the file is run on the run's validation images; --check 0 writes it "
            "without"
        ) from error
