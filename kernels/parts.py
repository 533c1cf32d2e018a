"""A process's part of the classes, as the losses take it in place of the student's logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class ClassPart:
    """The student's logits where each process of a group holds some of the classes of every row.

    `kd_loss(ClassPart(student, first_class=..., classes=..., group=...), teacher, target)` and
    dkd_loss, nkd_loss, wttm_loss, tf_nkd_loss and slkd_loss in the same way. The other logits are
    this process's part too, plain tensors of the student's shape; `target` holds class indices
    among all classes. The parts may differ in size, and together they hold every class once.

    Every process of the group calls the loss with the same rows, target and settings, and gets the
    same loss, that of the whole rows; backward() gives each the gradient of its own logits. A call
    reads the part once for the statistics of its rows, exchanges them in one collective of W rows
    of S float64 for each row of logits (S = 18 for kd_loss with one teacher), and reads it again
    for the gradient; backward() exchanges nothing. On a GPU the passes are plain PyTorch.

    Attributes:
        logits: (N, C_part), floating-point; C_part may be 0.
        first_class: the class of the first column.
        classes: C, of all parts together.
        group: of the processes that hold the parts; None: the default group.
    """

    logits: Tensor
    first_class: int
    classes: int
    group: ProcessGroup | None = None


Logits = Tensor | ClassPart
