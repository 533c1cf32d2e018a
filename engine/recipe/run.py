"""The section `run` of a recipe: how long, how large, on what and with which numerics it trains."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from .schema import LISTED, FilePath, Strict

# Left at null they are what `speed` comes to; the recipe in a run's folder has all of them.
LEFT_OPEN = ("amp", "tf32", "compile", "deterministic")


Compiled = Literal["student", "teacher", "slts"]
Tracker = Literal["tensorboard", "wandb", "mlflow"]


class Run(Strict):
    """How long, how large and on what a run trains."""

    epochs: int = Field(ge=1, description="passes over the training set")
    stop_epoch: int | None = Field(
        None, ge=1, description="end after so many epochs, on the schedule of all; null: run all"
    )
    batch: int = Field(ge=1, description="images of a step over all processes together")
    eval_batch: int = Field(256, ge=1, description="images of an evaluation step, all processes")
    seed: int = Field(0, ge=0, lt=2**63, description="weights, order and crops follow from it")
    speed: Literal["fast", "exact"] = Field(
        "fast",
        description="what amp, tf32, compile and deterministic are where they are null; fast: by "
        "the device; exact: float32, eager, the same bytes every time",
    )
    amp: Literal["off", "bf16"] | None = Field(
        None, description="number type of the forward pass; null: by run.speed"
    )
    tf32: bool | None = Field(
        None, description="float32 products of a GPU in TF32; null: by run.speed"
    )
    channels_last: bool = Field(True, description="NHWC layout of images and weights")
    compile: bool | None = Field(None, description="torch.compile the networks; null: by run.speed")
    compile_only: Annotated[tuple[Compiled, ...], Field(strict=False), LISTED] | None = Field(
        None, description="which of student, teacher and slts compile; null: all that are there"
    )
    capture: bool = Field(
        False, description="the step of one process as a CUDA graph; not measured yet"
    )
    accumulate: int = Field(
        1, ge=1, description="parts of a process's batch whose gradients make one step"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where present")
    reduce: Literal["float32", "bf16"] = Field(
        "float32", description="type in which processes send each other their gradients"
    )
    sync_batchnorm: bool = Field(
        False, description="BatchNorm over the images of all processes, on GPUs; slow with NHWC"
    )
    timeout: float = Field(
        600.0, gt=0, description="seconds a process waits for the others before it calls them lost"
    )
    threads: int | None = Field(None, ge=1, description="CPU threads of torch; null: its default")
    log_every: int = Field(
        50,
        ge=1,
        description="steps between two records in log.jsonl, which a terminal shows",
    )
    trackers: Annotated[tuple[Tracker, ...], Field(strict=False), LISTED] | None = Field(
        None,
        description="where the log's numbers go too, of tensorboard, wandb, mlflow; null: to "
        "tensorboard where it is installed",
    )
    checkpoint_every: int | None = Field(
        None, ge=1, description="steps between two checkpoints; null: after each epoch"
    )
    keep: int = Field(2, ge=1, description="newest checkpoints kept, beside the best")
    eval_every: int = Field(1, ge=1, description="epochs between two evaluations")
    time_limit: float | None = Field(
        None,
        gt=0,
        description="minutes after the start of the process, or of the torchrun above it, by "
        "which the run has stopped with a checkpoint; null: none",
    )
    deterministic: bool | None = Field(
        None, description="refuse operations whose result may vary; null: by run.speed"
    )
    record: FilePath | None = Field(
        None, description="folder for what the SL-Ts of slkd say in each step, in the form cache.*"
    )
    teacher_at_chance: Literal["refuse", "allow"] = Field(
        "refuse", description="what to do with a teacher that knows no more than chance"
    )

    @property
    def compiled(self) -> tuple[str, ...]:
        """The roles whose networks compile."""
        return (self.compile_only or get_args(Compiled)) if self.compile else ()

    @model_validator(mode="after")
    def _works(self) -> Run:
        if self.compile_only == ():
            raise ValueError("run.compile_only: [] chooses none; set run.compile=false for that")
        if self.compile is False and self.compile_only is not None:
            raise ValueError(
                f"run.compile_only: {list(self.compile_only)} has no effect with "
                "run.compile=false; leave one of them out"
            )
        if self.stop_epoch is not None and self.stop_epoch > self.epochs:
            raise ValueError(
                f"run.stop_epoch: {self.stop_epoch} is beyond run.epochs={self.epochs}; lower it "
                "or leave it out"
            )
        return self
