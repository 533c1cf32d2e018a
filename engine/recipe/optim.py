"""The section `optim` of a recipe: the optimiser, its schedule, and what comes of a bad step."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from .schema import Pair, Strict

# What an optimiser reads beside lr and weight_decay.
READ_BY = {
    "sgd": ("momentum", "nesterov", "skip_limit", "rollback_lr"),
    "adamw": ("betas", "skip_limit", "rollback_lr"),
    "lamb": ("betas", "adapt"),
    "lars": ("momentum", "nesterov", "trust", "adapt"),
}
ALL_READ = tuple(dict.fromkeys(field for fields in READ_BY.values() for field in fields))


class Optim(Strict):
    """The optimiser of the student (and of each SL-T, which has its own) and its schedule."""

    name: Literal["sgd", "adamw", "lamb", "lars"] = Field(
        "sgd", description="lamb and lars (large batches) need timm"
    )
    lr: float = Field(gt=0, description="learning rate, at the global batch that scale says")
    scale: Literal["none", "linear", "sqrt"] = Field(
        "none",
        description="none: lr is for run.batch; linear, sqrt: for scale_batch, and lr and min_lr "
        "are multiplied by run.batch / scale_batch or its square root",
    )
    scale_batch: int = Field(256, ge=1, description="linear, sqrt: images of the batch of lr")
    layer_decay: float | None = Field(
        None,
        gt=0,
        le=1,
        description="factor of the rate from each layer of the student to the one before it; "
        "networks of timm; null: one rate for all",
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="sgd, lars")
    nesterov: bool = Field(False, description="sgd, lars: look-ahead momentum")
    betas: Pair = Field((0.9, 0.999), description="adamw, lamb: decay of the two moments, per step")
    trust: float = Field(1e-3, gt=0, description="lars: trust coefficient (eta in the paper)")
    adapt: Literal["all", "decayed"] = Field(
        "all",
        description="lamb, lars: tensors whose rate follows their norms; all: as in the papers; "
        "decayed: those with weight decay, the rest at lr",
    )
    weight_decay: float = Field(
        5e-4, ge=0, description="sgd, lars: L2 term; adamw, lamb: decay beside the moments"
    )
    decay: Literal["all", "matrices"] = Field(
        "all", description="what decays; matrices: not biases, nor the parameters of norms"
    )
    schedule: Literal["step", "cosine", "constant"] = "step"
    milestones: Annotated[tuple[float, ...], Field(strict=False)] = Field(
        (), description="step: the rate drops after so many finished epochs"
    )
    gamma: float = Field(0.1, gt=0, le=1, description="step: factor of each drop")
    warmup_epochs: float = Field(0.0, ge=0, description="epochs of linear growth from 0")
    min_lr: float = Field(0.0, ge=0, description="cosine: rate at the end")
    ema: float | None = Field(
        None, gt=0, lt=1, description="decay per step of the averaged student; null: no average"
    )
    clip: float | None = Field(
        None, gt=0, description="largest norm of all gradients of an optimiser; null: not clipped"
    )
    skip_limit: int = Field(
        10,
        ge=0,
        description="sgd, adamw: steps in a row that may be skipped, as their loss or gradients "
        "are not finite; one more and the run goes back to a checkpoint, once, and then stops; "
        "0, and lamb, lars: the first one stops it",
    )
    rollback_lr: float = Field(
        1.0, gt=0, le=1, description="factor of the rate once the run went back"
    )

    @property
    def skips(self) -> int:
        """skip_limit, or 0 for an optimiser that cannot leave out a step on the device."""
        return self.skip_limit if "skip_limit" in READ_BY[self.name] else 0

    @model_validator(mode="after")
    def _works(self) -> Optim:
        read = READ_BY[self.name]
        unread = [field for field in ALL_READ if field not in read]
        found = self.unused(f"optim.name {self.name}", "optim", *unread)
        if "nesterov" in read and self.nesterov and self.momentum == 0:
            found.append("optim.nesterov: needs optim.momentum above 0")
        if self.adapt == "decayed" and "adapt" in read and self.weight_decay == 0:
            found.append(
                "optim.adapt: decayed leaves nothing to adapt with optim.weight_decay 0; set "
                "optim.adapt=all, or a weight decay"
            )
        if self.scale == "none":
            found += self.unused("optim.scale none", "optim", "scale_batch")
        if self.skip_limit == 0:
            found += self.unused("optim.skip_limit 0", "optim", "rollback_lr")
        if not all(0 <= beta < 1 for beta in self.betas):
            found.append(f"optim.betas: each in [0, 1), got {list(self.betas)}")
        if self.schedule != "step":
            found += self.unused(f"schedule {self.schedule}", "optim", "milestones", "gamma")
        if self.schedule != "cosine":
            found += self.unused(f"schedule {self.schedule}", "optim", "min_lr")
        if self.min_lr > self.lr:
            found.append(f"optim.min_lr: {self.min_lr} is above optim.lr {self.lr}")
        rising = all(a < b for a, b in zip(self.milestones, self.milestones[1:], strict=False))
        if not rising or (self.milestones and self.milestones[0] <= 0):
            found.append(f"optim.milestones: positive and rising, got {list(self.milestones)}")
        if found:
            raise ValueError("\n".join(found))
        return self
