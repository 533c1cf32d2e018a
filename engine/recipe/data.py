"""The section `data` of a recipe: which images, and what is done to them."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, Field, model_validator

from . import registered
from .schema import IMAGENET, FilePath, Normalize, Pair, Strict

Ours = Literal["folder", "tar", "digits", "cifar10", "cifar100", "glyphs", "synthetic", "own"]
CLASSES = {"digits": 10, "cifar10": 10, "cifar100": 100, "glyphs": 100}  # sources with a fixed set
DECODED_BY = {"hybrid": ("dali",), "gpu": ("dali", "torchvision")}  # the CPU: by every loader
IN_MEMORY = ("cifar10", "cifar100", "glyphs", "synthetic")  # sources without a file for each image


def _known(source: str) -> str:
    known = [*get_args(Ours), *registered.SOURCES]
    if source not in known:
        raise registered.unknown(source, known)
    return source


Source = Annotated[str, AfterValidator(_known)]


class RandAugment(Strict):
    """RandAugment's options; engine/data/augment.py has its ops and their ranges."""

    magnitude: float = Field(9.0, ge=0, le=10, description="mean strength of an op; 10: the most")
    std: float = Field(
        0.5, ge=0, description="standard deviation of the strength, which is clipped to 0..10"
    )
    ops: int = Field(2, ge=1, description="ops drawn for an image; each is done half of the time")


class Data(Strict):
    """Where the images come from and what is done to them before a network sees them."""

    source: Source = Field(
        description="folder: root/{train,val}/<class>/; tar: root/{train,val}/*.tar; digits: a "
        "folder written once under root from scikit-learn; cifar10, cifar100: the official archive "
        "under root; glyphs: drawn once under root; synthetic: computed, no files; own: what "
        "engine.distill was given; or a name that a module of --import registers"
    )
    root: FilePath | None = Field(None, description="folder of the images")
    classes: int | None = Field(
        None, ge=2, description="number of classes; checked against the source, needed by synthetic"
    )
    size: int = Field(224, ge=1, description="side of the images a network sees, pixels")
    augment: Literal["random_resized_crop", "pad_crop", "none"] = Field(
        "random_resized_crop", description="training crop"
    )
    scale: Pair = Field((0.08, 1.0), description="random_resized_crop: area, share of the image")
    ratio: Pair = Field((3 / 4, 4 / 3), description="random_resized_crop: width / height")
    padding: int = Field(4, ge=0, description="pad_crop: black border on each side, pixels")
    flip: bool = Field(True, description="mirror half of the training images left to right")
    mixup: float = Field(
        0.0, ge=0, description="alpha of lambda's Beta(alpha, alpha); 0: off; both: one a step"
    )
    cutmix: float = Field(0.0, ge=0, description="as mixup; both mix neighbours of the epoch")
    smoothing: float = Field(
        0.0, ge=0, lt=1, description="share of a label that all classes get in equal parts"
    )
    randaugment: RandAugment | None = Field(
        None, description="ops done to the crop, timm's rand-m9-mstd0.5-inc1 as {}; null: none"
    )
    erase: float = Field(
        0.0, ge=0, le=1, description="probability of a box of noise over the crop (random erasing)"
    )
    repeats: int = Field(
        1, ge=1, description="crops of each image in a step; an epoch shows 1 / repeats of the set"
    )
    eval_resize: int | None = Field(
        256, ge=1, description="short side before the centre crop, pixels; null: straight to size"
    )
    subset: int | None = Field(
        None, ge=1, description="keep the first so many training images of each class; null: all"
    )
    loader: Literal["auto", "dali", "torchvision", "resident"] = Field(
        "auto",
        description="resident: all images are decoded once and stay where the run computes; auto: "
        "resident for at most 512 MiB of pixels, of images of one size or seen whole, with nothing "
        "done after the crop; else dali where it is installed and reads the source, else "
        "torchvision",
    )
    workers: int = Field(2, ge=1, description="decoding threads of a process")
    prefetch: int = Field(2, ge=1, description="batches prepared ahead")
    normalize: Normalize = IMAGENET
    bad_images: int = Field(16, ge=0, description="more unreadable files than this stop the run")
    decode: Literal["auto", "cpu", "hybrid", "gpu"] = Field(
        "auto",
        description="where images are decoded. cpu: there, and resized there; hybrid, by loader "
        "dali: on the CPU, resized on the GPU; gpu, by dali and torchvision: both there; auto: "
        "cpu, and why is printed",
    )
    hw_decoder_load: float = Field(
        0.65,
        ge=0,
        le=1,
        description="decode gpu by loader dali: share of the JPEGs for the GPU's own JPEG "
        "decoders, where it has any; CUDA decodes the rest",
    )
    images: int | None = Field(
        None,
        ge=1,
        description="training images; null: 1024 of synthetic, 50000 of glyphs",
    )

    @model_validator(mode="after")
    def _works(self) -> Data:
        found = self._source_problems() + self._crop_problems() + self._decode_problems()
        if found:
            raise ValueError("\n".join(found))
        return self

    @property
    def softening(self) -> list[str]:
        """The keys in use that make training labels class probabilities."""
        names = ("mixup", "cutmix", "smoothing")
        return [f"data.{name}" for name in names if getattr(self, name) > 0]

    @property
    def after_crop(self) -> list[str]:
        """The keys in use that change the pixels of training crops."""
        used = {"data.randaugment": self.randaugment is not None, "data.erase": self.erase > 0}
        return [name for name, on in used.items() if on]

    @property
    def fraction_seen(self) -> str:
        """What to add of an evaluation that sees a small part of each image; "" of any other."""
        if self.eval_resize is None or self.eval_resize <= 2 * self.size:
            return ""
        share = 100 * (self.size / self.eval_resize) ** 2
        return (
            f"; data.eval_resize = {self.eval_resize} leaves {share:.0f}% of a square image to "
            f"data.size = {self.size} in evaluation; ImageNet's share is that of "
            f"data.eval_resize={round(self.size * 256 / 224)}"
        )

    def _source_problems(self) -> list[str]:
        found: list[str] = []
        if self.source in registered.SOURCES:  # of root, classes and images it reads what it wants
            return found
        if self.source not in ("synthetic", "glyphs"):
            found += self.unused(f"source {self.source}", "data", "images")
        if self.source in ("synthetic", "own"):
            found += self.unused(f"source {self.source}", "data", "root")
        if self.source == "synthetic" and self.classes is None:
            found.append("data.classes: source synthetic needs the number of classes")
        if self.source == "own":
            found += self.unused("source own", "data", "subset")
        if self.source not in ("synthetic", "own") and self.root is None:
            found.append(f"data.root: source {self.source} needs a folder; add data.root=DIR")
        fixed = CLASSES.get(self.source)
        if fixed is not None and self.classes not in (None, fixed):
            found.append(
                f"data.classes: the {self.source} have {fixed} classes, got {self.classes}"
            )
        if self.source in IN_MEMORY and self.loader == "dali":
            found.append(
                f"data.loader: dali reads files and source {self.source} has none; use auto"
            )
        return found

    def _crop_problems(self) -> list[str]:
        found = []
        if self.loader == "resident" and self.after_crop:
            found.append(
                "data.loader: resident crops on the device, where it cannot do "
                f"{' and '.join(self.after_crop)}; use auto"
            )
        for name, (low, high) in (("scale", self.scale), ("ratio", self.ratio)):
            if not 0 < low <= high:
                found.append(f"data.{name}: need 0 < low <= high, got [{low}, {high}]")
        if self.scale[1] > 1:
            found.append(f"data.scale: a share of the image, at most 1, got {self.scale[1]}")
        if self.eval_resize is not None and self.eval_resize < self.size:
            found.append(
                f"data.eval_resize: {self.eval_resize} is below data.size {self.size}, the centre "
                "crop would leave the image; raise it or set null"
            )
        if self.augment != "random_resized_crop":
            found += self.unused(f"augment {self.augment}", "data", "scale", "ratio")
        if self.augment != "pad_crop":
            found += self.unused(f"augment {self.augment}", "data", "padding")
        return found

    def _decode_problems(self) -> list[str]:
        found = []
        if self.decode != "gpu":
            found += self.unused(f"decode {self.decode}", "data", "hw_decoder_load")
        elif self.loader == "torchvision":
            found += self.unused("loader torchvision", "data", "hw_decoder_load")
        if self.decode in ("auto", "cpu"):
            return found
        if self.source in IN_MEMORY:
            return [
                *found,
                f"data.decode: {self.decode} decodes files and source {self.source} has none; "
                "use auto",
            ]
        loaders = DECODED_BY[self.decode]
        if self.loader not in ("auto", *loaders):
            found.append(
                f"data.decode: {self.decode} is done by loader {' or '.join(loaders)}, got loader "
                f"{self.loader}; set data.loader={loaders[0]} or data.decode=auto"
            )
        if self.after_crop:
            found.append(
                f"data.decode: {self.decode} leaves no crop on the CPU for "
                f"{' and '.join(self.after_crop)}; use data.decode=cpu"
            )
        return found
