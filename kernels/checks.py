"""Checks of a loss's arguments: each error names the argument, its value and the cure."""

import math
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor


def finite(value: float) -> bool:
    """`math.isfinite` in comparisons, which torch.compile traces."""
    return -math.inf < value < math.inf


def constant(name: str, value: object) -> None:
    if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} requires grad, but gets none from this loss; pass {name}.item(), or multiply "
            "the loss by it"
        )


def check_number(name: str, value: object) -> None:
    """A tensor of one number is one, too."""
    constant(name, value)
    if isinstance(value, float | int):
        return
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} must be one number, got a tensor of {tuple(value.shape)}")
    elif not isinstance(value, Real | torch.SymFloat | torch.SymInt):
        raise TypeError(f"{name} must be a number, got {value!r}")


def positive(name: str, value: float) -> float:
    check_number(name, value)
    if not (value > 0 and finite(value)):
        raise ValueError(f"{name} must be a positive number, got {value}")
    return float(value)


def weight(name: str, value: float) -> float:
    check_number(name, value)
    if not finite(value):
        raise ValueError(f"{name} must be a finite number, got {value}")
    return float(value)


def scale(temperature: float, t_squared: bool) -> float:
    """The factor of a term at this temperature: T^2 keeps gradients comparable over T, or 1."""
    return temperature * temperature if t_squared else 1.0


def as_list(teacher: Tensor | Sequence[Any], name: str) -> list[Any]:
    if not isinstance(teacher, Iterable):
        raise TypeError(
            f"{name} must be a tensor of logits, or a sequence of them, got "
            f"{type(teacher).__name__}"
        )
    tensors = [teacher] if isinstance(teacher, Tensor) else list(teacher)
    if not tensors:
        raise ValueError(f"{name} must hold at least one tensor of logits, got an empty sequence")
    return tensors


def check_weights(name: str, weights: Sequence[float] | None, count: int) -> list[float]:
    """`count` finite weights >= 0, equal ones by default."""
    if weights is None:
        return [1.0 / count] * count
    if isinstance(weights, Tensor) and weights.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} requires grad, but gets none from this loss; pass {name}.detach()"
        )
    if isinstance(weights, str) or not isinstance(weights, Iterable):
        raise TypeError(f"{name} must be a sequence of {count} numbers, got {weights!r}")
    values = [weight(f"{name}[{k}]", w) for k, w in enumerate(weights)]
    if len(values) != count:
        raise ValueError(
            f"{name} must hold {count} weights, one for each set of logits, got {len(values)}"
        )
    if any(w < 0 for w in values):
        raise ValueError(f"{name} must not be negative, got {values}")
    return values


def check_logits(name: str, x: Tensor, like: Tensor | None = None) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor of logits, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must have a floating type, got {x.dtype}; are these labels?")
    if x.dim() != 2:
        raise ValueError(f"{name} must have shape (N, C), got {tuple(x.shape)}")
    if x.shape[1] < 2:
        raise ValueError(f"{name} must have at least 2 classes, got shape {tuple(x.shape)}")
    if like is not None and x.shape != like.shape:
        raise ValueError(
            f"{name} must have the student's shape {tuple(like.shape)}, got {tuple(x.shape)}"
        )
    if like is not None and x.device != like.device:
        raise ValueError(f"{name} is on {x.device}, the student on {like.device}; move one of them")


def check_teacher(name: str, x: Tensor, student: Tensor) -> None:
    check_logits(name, x, student)
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} requires grad, but gets none from this loss; pass {name}.detach()"
        )


def check_target(target: Tensor | None, student: Tensor, probabilities: bool, op: str) -> None:
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor, got {type(target).__name__}")
    if target.device != student.device:
        raise ValueError(
            f"target is on {target.device}, the student on {student.device}; move one of them"
        )
    if target.dim() == 2 and target.is_floating_point():
        if not probabilities:
            raise ValueError(
                f"{op} is defined for class indices; got probabilities {tuple(target.shape)}"
            )
        if target.shape != student.shape:
            raise ValueError(
                f"target must have the student's shape {tuple(student.shape)}, "
                f"got {tuple(target.shape)}"
            )
        if target.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "target requires grad, but gets none from this loss; pass target.detach()"
            )
        return
    if target.dtype != torch.int64:
        raise TypeError(
            f"target must be int64 class indices, got {target.dtype}; use target.long()"
        )
    if target.shape != student.shape[:1]:
        raise ValueError(f"target must have shape ({student.shape[0]},), got {tuple(target.shape)}")


def check_range(target: Tensor, classes: int, ignore_index: int) -> None:
    """For the reference; on a GPU a device-side assert, so that nothing waits for the device."""
    outside = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if target.device.type != "cpu":
        torch._assert_async(~outside.any(), "kdfuse: target outside the classes")
    elif outside.any():
        row = int(outside.nonzero()[0])
        raise ValueError(
            f"target[{row}] is {int(target[row])}, outside the {classes} classes; mark rows to "
            f"skip with ignore_index ({ignore_index})"
        )


def check_denominator(denominator: Tensor | float, hidden: bool) -> None:
    """hidden: the values of tensors cannot be read now. Nothing waits for a GPU."""
    if isinstance(denominator, Tensor):
        check_number("denominator", denominator)
        if not hidden and denominator.device.type == "cpu":
            positive("denominator", denominator.item())
    else:
        positive("denominator", denominator)
