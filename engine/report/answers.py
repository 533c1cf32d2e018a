"""What the networks of a run say of its validation set: all that pictures are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .correlation import Moments

STUDENT, TEACHER = "student", "teacher"


class Network:
    """The answers of one network, batch by batch."""

    def __init__(self, moments: bool = False) -> None:
        """`moments`: for `Moments` of the logits, whose size is the classes' squared."""
        self.moments = Moments() if moments else None
        self.no_features = ""  # why there are none
        self._top1: list[NDArray[np.int64]] = []
        self._confidence: list[NDArray[np.float64]] = []
        self._features: list[NDArray[np.float32]] = []

    def add(self, logits: NDArray[np.floating], features: NDArray[np.float32] | None) -> None:
        """Take logits (b, C), which are finite, and the features (k, D) of some of the images."""
        wide = logits.astype(np.float64)
        shifted = np.exp(wide - wide.max(1, keepdims=True))
        self._top1.append(wide.argmax(1))  # of equal ones the lower class, as in evaluation
        self._confidence.append(1 / shifted.sum(1))  # the largest softmax
        if self.moments is not None:
            self.moments.add(wide)
        if features is not None:
            self._features.append(features)

    @property
    def top1(self) -> NDArray[np.int64]:
        """(n,) the class of the largest logit."""
        return np.concatenate(self._top1)

    @property
    def confidence(self) -> NDArray[np.float64]:
        """(n,) its probability, at temperature 1."""
        return np.concatenate(self._confidence)

    @property
    def features(self) -> NDArray[np.float32] | None:
        """(m, D) what the classifier reads, of the images of the sample."""
        return np.concatenate(self._features) if self._features else None


@dataclass(frozen=True)
class Answers:
    """n validation images of C classes, and what each network says of them.

    The names of the networks are "student", "SL-T 0", ... and "teacher", where it can be had.
    """

    classes: list[str]
    target: NDArray[np.int64]  # (n,)
    rows: NDArray[np.int64]  # (n,) numbers in the validation set
    sampled: NDArray[np.bool_]  # (n,) the images whose features are kept
    networks: dict[str, Network]
    image: Callable[[int], Image.Image | None]  # of a row, whole, RGB; None: it cannot be read
    no_teacher: str = ""  # why there is none
    about: dict[str, Any] = field(default_factory=dict)  # the checkpoint, what JSON can hold
