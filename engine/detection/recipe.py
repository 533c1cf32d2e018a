"""A recipe of detection: `task: detection` in a file makes it one."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ..recipe import problems
from ..recipe.optim import Optim
from ..recipe.run import Run
from ..recipe.schema import Expect, FilePath, RecipeBase, Strict
from .method import DKD, KD, NKD, Baseline

AnyMethod = Annotated[Baseline | KD | DKD | NKD, Field(discriminator="name")]


class CocoData(Strict):
    """Images and boxes in COCO's layout, and the sizes at which a detector sees them."""

    root: FilePath = Field(
        description="folder with annotations/instances_{train,val}2017.json, train2017/, val2017/"
    )
    val: bool = Field(True, description="false: no evaluation, only the training set is needed")
    min_size: int = Field(800, ge=32, description="short side of the images, pixels")
    max_size: int = Field(1333, ge=32, description="most pixels of the long side")
    flip: bool = Field(True, description="mirror half of the training images left to right")
    workers: int = Field(4, ge=1, description="decoding threads of a process")
    prefetch: int = Field(2, ge=1, description="batches prepared ahead")

    @model_validator(mode="after")
    def _works(self) -> CocoData:
        if self.min_size > self.max_size:
            raise ValueError(f"data.min_size: {self.min_size} is above data.max_size")
        return self


class Detector(Strict):
    """A Faster R-CNN with a ResNet and a feature pyramid (FPN)."""

    name: str = Field(min_length=1, description="torchvision:fasterrcnn_resnet50_fpn, ...")
    checkpoint: FilePath | None = Field(None, description="weights of all of it; null: random")
    hidden: int = Field(1024, ge=1, description="width of the box head's two layers")


class Student(Detector):
    """The detector that is trained."""

    backbone: FilePath | None = Field(
        None, description="weights of the ResNet as a classifier of ImageNet, to start from"
    )
    trained_stages: int = Field(
        3, ge=0, le=5, description="parts of the ResNet that are trained, from its end; 5: all"
    )
    proposals: int = Field(2000, ge=1, description="proposals of an image kept in training")
    rois: int = Field(512, ge=1, description="RoIs sampled from an image's proposals")

    @model_validator(mode="after")
    def _works(self) -> Student:
        if self.checkpoint is not None and self.backbone is not None:
            raise ValueError("student.backbone: student.checkpoint has its weights; give one")
        return self


class DetectionRecipe(RecipeBase):
    """Everything that decides what a run of detection computes."""

    task: Literal["detection"] = "detection"
    method: AnyMethod
    data: CocoData
    student: Student
    teacher: Detector | None = None
    optim: Optim
    run: Run
    expect: Expect | None = None

    @model_validator(mode="after")
    def _works(self) -> DetectionRecipe:
        found = problems.teacher(self.method, self.teacher is not None)
        unread = ("capture", "accumulate", "sync_batchnorm", "record")
        found += self.run.unused("task detection", "run", *unread)
        if self.expect is not None and self.expect.top1 is not None:
            found.append("expect.top1: detection is measured as AP; use expect.ap")
        if self.expect is not None and self.expect.also_in:
            found.append("expect.also_in: its cells are top-1, detection is measured as AP")
        if found:
            raise ValueError("\n".join(found))
        return self
