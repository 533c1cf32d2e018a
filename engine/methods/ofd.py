"""Overhauled feature distillation (Heo et al. 2019): a margin and a partial distance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from .method import Networks, Outputs, Terms
from .parts.connector import Connectors
from .parts.feature import FeatureMethod
from .parts.pooling import pooled_to


class OFD(FeatureMethod):
    """CE + feature_weight * sum_i 2^-(n-1-i) d(connector(student_i), max(teacher_i, margin_i)).

    Heo et al., "A Comprehensive Overhaul of Feature Distillation", ICCV 2019, with the defaults of
    the code released for CIFAR; for ImageNet it has feature_weight = 1e-4. Features are those
    before the ReLU. d is the squared difference, summed over an image's values and averaged over
    the images, but 0 where the teacher's value is not positive and the student's is below it. The
    margin is what a channel's negative values are on average; see `margins`. A teacher's map of
    another size is pooled to the student's.

    The released code leaves the teacher in training mode, so that its BatchNorm has the statistics
    of the batch: of each process's own images, as that of the connectors.
    """

    name: Literal["ofd"] = "ofd"
    default_taps: ClassVar[str] = "stages.pre"

    feature_weight: float = Field(1e-3, ge=0, description="weight of the feature loss")
    teacher_batchnorm: Literal["train", "eval"] = Field(
        "train",
        description="statistics of the teacher's BatchNorm; train: the batch's, as in the released "
        "code; eval: its running ones",
    )

    @property
    def teacher_mode(self) -> Literal["eval", "train"]:
        return self.teacher_batchnorm

    @property
    def takes_taps(self) -> Literal["none", "values", "layers"]:
        return "layers"

    def head(self, networks: Networks) -> Overhaul:
        assert networks.teacher is not None
        named = networks.points["teacher"]
        taps = list(networks.shapes["teacher"])
        norms = norms_before(networks.teacher, [named.get(t, t) for t in taps], networks.size)
        for tap, norm in zip(taps, norms, strict=True):
            if norm is None or norm.weight is None:
                raise ValueError(
                    f"method ofd takes its margins from BatchNorm layers, and the teacher has none "
                    f"of {tap}'s channels, with weights, before {tap}; name other points with "
                    "method.teacher_taps, or take another method for this teacher"
                )
        connectors = Connectors(self.name, networks.shapes)
        return Overhaul(connectors, [margins(norm) for norm in norms if norm is not None])

    def features(self, out: Outputs, target: Tensor) -> Terms:
        pairs = self.pairs(out)
        values = []
        for i, (_, teacher) in enumerate(pairs):
            student = out.head[f"connected{i}"].float()
            height, width = student.shape[2:]
            teacher = pooled_to(teacher, height, width)
            value = partial_l2(student, teacher, out.head[f"margin{i}"])
            values.append(value / 2 ** (len(pairs) - 1 - i))
        return {"ofd": torch.stack(values).sum()}


class Overhaul(nn.Module):
    """The connectors, and the teacher's margins as constants beside them."""

    def __init__(self, connectors: Connectors, margins: Sequence[Tensor]) -> None:
        super().__init__()
        self.connectors = connectors
        for i, margin in enumerate(margins):
            self.register_buffer(f"margin{i}", margin.view(1, -1, 1, 1))

    def forward(self, out: Outputs, target: Tensor, index: Tensor) -> dict[str, Tensor]:
        return {**self.connectors(out, target, index), **dict(self.named_buffers(recurse=False))}


def partial_l2(student: Tensor, teacher: Tensor, margin: Tensor) -> Tensor:
    """The paper's partial L2 distance of student and teacher (N, C, H, W); 0-dim.

    `margin` is (1, C, 1, 1) and not positive.
    """
    wanted = torch.maximum(teacher, margin)
    counts = (student > wanted) | (teacher > 0)
    return (student - wanted).square().where(counts, 0.0).sum() / len(student)


def margins(norm: nn.BatchNorm2d) -> Tensor:
    """E[x | x < 0] of each channel of a BatchNorm's output, x ~ N(bias, weight^2); (C,) float32.

    Where less than 0.1 % of the values are negative it is -3 |weight|, as in the released code.
    """
    mean, std = norm.bias.detach().double(), norm.weight.detach().double().abs()
    below = torch.special.ndtr(-mean / std)
    density = torch.exp(-((mean / std) ** 2) / 2) / math.sqrt(2 * math.pi)
    return torch.where(below > 0.001, mean - std * density / below, -3 * std).float()


def norms_before(
    network: nn.Module, paths: Sequence[str], size: int
) -> list[nn.BatchNorm2d | None]:
    """The BatchNorm before each point (a module's path, with ":in" its input) of a network.

    It is the one that ran last, up to the point itself, among those with the point's number of
    channels: the last of a residual block, as the released code has it by name, wherever the
    block's shortcut has no BatchNorm of its own or runs it first. The network is left as it was.
    """
    ran: list[nn.BatchNorm2d] = []
    found: dict[str, nn.BatchNorm2d | None] = {}

    def look(path: str, value: Tensor) -> None:
        fitting = [norm for norm in ran if norm.num_features == value.shape[1]]
        found[path] = fitting[-1] if fitting else None

    hooks = [
        module.register_forward_hook(lambda module, args, output: ran.append(module))
        for module in network.modules()
        if isinstance(module, nn.BatchNorm2d)
    ]
    for path in dict.fromkeys(paths):
        module = network.get_submodule(path.removesuffix(":in"))
        if path.endswith(":in"):
            hook = module.register_forward_pre_hook(lambda m, args, p=path: look(p, args[0]))
        else:
            hook = module.register_forward_hook(lambda m, args, output, p=path: look(p, output))
        hooks.append(hook)
    training, first = network.training, next(network.parameters())
    try:
        with torch.no_grad():
            network.eval()(torch.zeros(1, 3, size, size, device=first.device, dtype=first.dtype))
    finally:
        for hook in hooks:
            hook.remove()
        network.train(training)
    return [found[path] for path in paths]
